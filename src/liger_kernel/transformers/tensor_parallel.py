"""Heads whose weight tensor parallelism splits among ranks: how their calls are wrapped, and how to fuse them.

torch's parallelize_module puts hooks around the forward that make a DTensor of its input and a plain tensor of its
result; transformers puts a forward of its own in the instance (older ones hooks of their own, which are left alone).
Where the wrapping takes hidden states and gives back whole plain logits, these need not be computed at all.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

from liger_kernel.ops.sharded import is_dtensor

_TRANSFORMERS = ("transformers.distributed.", "transformers.integrations.tensor_parallel")
_TORCH = "torch.distributed.tensor._api"  # where distribute_module makes its hooks; others watch, as CommDebugMode does


class Passing:
    """A value on its way through an output hook, which takes it for a DTensor that it makes a plain tensor of."""

    placements = None  # those of no tensor, so that the hook redistributes

    def __init__(self, value: Any):
        self.value = value

    def redistribute(self, *args, **kwargs) -> Passing:
        return self

    def to_local(self) -> Any:
        return self.value


def style_of(bound: Any) -> Any:
    """The parallel style whose forward transformers has put in place of a module's own; None for other forwards."""
    if not inspect.isfunction(bound) or not bound.__module__.startswith(_TRANSFORMERS):
        return None
    return inspect.getclosurevars(bound).nonlocals.get("self")


def is_tensor_parallel(hook: Any) -> bool:
    """Whether a forward hook is one that torch's tensor parallelism puts around a module."""
    return (getattr(hook, "__module__", None) or "").startswith(_TORCH)


def why_not_split(head: Any, bound: Any) -> str | None:
    """Why a wrapped head, whose forward in the instance is `bound`, keeps its own logits."""
    if not _gives_whole_logits(head, bound):
        return "tensor parallelism leaves its logits split"
    weight: Any = getattr(head, "weight", None)
    if not is_dtensor(weight):
        return "it is wrapped by tensor parallelism, and its weight is not a DTensor"
    if weight.device_mesh.ndim == 1 and not is_split(weight):
        return f"its weight is a DTensor {tuple(weight.placements)}, not split by rows"
    return None


def _gives_whole_logits(head: Any, bound: Any) -> bool:
    """Whether a call of the head takes hidden states that are the same on all ranks and yields whole plain logits."""
    from torch.distributed.tensor import Replicate

    whole = Replicate(), (Replicate(),)
    if (style := style_of(bound)) is not None:
        layouts = getattr(style, "input_layouts", None), getattr(style, "output_layouts", None)
        return all(layout in whole for layout in layouts) and getattr(style, "use_local_output", False)
    ends = [*_output_layouts(head)]
    return len(ends) == 1 and ends[0][0] in whole and ends[0][1]


def _output_layouts(head: Any) -> Iterator[tuple]:
    """(placements, whether the result is made a plain tensor) of each output hook of tensor parallelism."""
    for hook in filter(is_tensor_parallel, head._forward_hooks.values()):
        prepare = inspect.getclosurevars(hook).nonlocals.get("output_fn")
        given = prepare.args if isinstance(prepare, functools.partial) else ()
        yield given if len(given) == 2 else (None, False)


def is_split(weight: Any) -> bool:
    """Whether a head's weight is a DTensor that the fused loss takes: split by rows on a mesh of one dimension."""
    return is_dtensor(weight) and weight.device_mesh.ndim == 1 and weight.placements[0].is_shard(0)


def on_mesh_of(weight: Any, hidden: Any) -> Any:
    """Hidden states, the same on all ranks, as a DTensor beside the weight. Their gradient is summed over the ranks."""
    if is_dtensor(hidden):
        return hidden
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(hidden, weight.device_mesh, [Replicate()], run_check=False)
