"""ReLU squared as a module of its own, as models keep an activation in `act_fn`."""

from __future__ import annotations

import functools

import torch
from torch import nn

from liger_kernel.ops.relu_squared import reference
from liger_kernel.ops.sharded import is_dtensor
from liger_kernel.transformers import functional
from liger_kernel.transformers.kinds import probe
from liger_kernel.transformers.kinds.probe import MIN_SAME, Match

NAME = "activation"
_FLAG = "relu_squared"


def candidate(module: nn.Module) -> bool:
    """Nothing inside it, and one input."""
    empty = not (module._modules or module._buffers or module._parameters)
    return empty and len(probe.inputs(module)) == len(probe.required_inputs(module)) == 1


@probe.verified_once
def verify(module: nn.Module) -> Match | None:
    """A match where it is to the bit relu(x)^2, in fp32 and in bf16; None for every other activation."""
    x = 2 * probe.random(5, 64, seed=7)
    try:
        made = probe.twin(module, {}, {})
        same = [probe.same(probe.run(made, t), reference(t)) for t in (x, x.to(torch.bfloat16))]
    except Exception:  # any code of any model may run here
        return None
    return Match(NAME, _FLAG, _FLAG, _FLAG, 0.0) if min(same) >= MIN_SAME else None


@functools.cache
def forward(variant: str, name: str = "forward"):
    """The method that replaces its forward; `name` is the attribute it is bound under (pickle needs it)."""

    def method(self, *args, **kwargs):
        if len(args) != 1 or kwargs or is_dtensor(args[0]):
            return type(self).forward(self, *args, **kwargs)
        return functional.liger_relu_squared(args[0])

    method.__name__ = name
    return method
