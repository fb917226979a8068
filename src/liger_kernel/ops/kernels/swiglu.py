"""SwiGLU in Triton; the mathematics is in liger_kernel.ops.swiglu, the kernels in gated.py."""

from __future__ import annotations

from liger_kernel.ops.core import Kernels
from liger_kernel.ops.kernels import gated


def swiglu_forward(a, b, gate_multiplier, down_multiplier, config=None):
    """a, b: contiguous, one shape -> c. a: (..., 2I) with b=None is the packed form -> c (..., I)."""
    if b is None:
        return gated.packed_forward(a, "silu", config)
    return gated.forward(a, b, "silu", gate_multiplier, down_multiplier, config)


def swiglu_backward(dc, a, b, gate_multiplier, down_multiplier, in_place=False, config=None):
    """-> da, db; in the packed form dy, None. in_place may write them over a and b."""
    if b is None:
        return gated.packed_backward(dc, a, "silu", in_place, config), None
    return gated.backward(dc, a, b, "silu", gate_multiplier, down_multiplier, in_place, config)


KERNELS = Kernels(swiglu_forward, swiglu_backward)
