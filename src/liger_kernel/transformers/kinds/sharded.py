"""Activations that are DTensors, as sequence parallelism makes them: what a rank holds is computed where it lies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from liger_kernel.ops.sharded import is_dtensor


def own_rows(x: Any, parameters: tuple) -> tuple[Any, tuple, Callable] | None:
    """(this rank's rows of x, the parameters (C,) for them, what makes a DTensor like x of their result).

    None where a row of x (..., C) is not whole here, or a parameter is not the same on all ranks. The gradient of a
    parameter is a part of the sum where the rows are split.
    """
    from torch.distributed.tensor import Partial, Replicate

    last = x.dim() - 1
    if any(p.is_partial() or p.is_shard(last) or p.is_shard(-1) for p in x.placements):
        return None
    sums = [Partial() if p.is_shard() else Replicate() for p in x.placements]
    found = []
    for parameter in parameters:
        if parameter is not None:
            whole = is_dtensor(parameter) and parameter.device_mesh == x.device_mesh
            if not whole or not all(p.is_replicate() for p in parameter.placements):
                return None
            parameter = parameter.to_local(grad_placements=sums)
        found.append(parameter)
    return x.to_local(), tuple(found), like(x)


def elementwise(function: Callable, x: Any, y: Any) -> Any:
    """function(x, y) of what this rank holds of two DTensors; None where they are not split alike or not yet summed."""
    if not is_dtensor(y) or (x.device_mesh, x.placements) != (y.device_mesh, y.placements):
        return None
    if any(p.is_partial() for p in x.placements):
        return None
    return like(x)(function(x.to_local(), y.to_local()))


def like(x: Any) -> Callable:
    """What makes a DTensor of x's shape and placements of a rank's own part."""
    from torch.distributed.tensor import DTensor

    def back(part):
        return DTensor.from_local(part, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=x.stride())

    return back
