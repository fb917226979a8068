"""GEGLU in Triton; the mathematics is in liger_kernel.ops.geglu, the kernels in gated.py."""

from __future__ import annotations

from liger_kernel.ops.core import Kernels
from liger_kernel.ops.kernels import gated

ACT = {"tanh": "gelu_tanh", "none": "gelu"}


def geglu_forward(a, b, approximate, config=None):
    """a, b: contiguous, one shape -> c."""
    return gated.forward(a, b, ACT[approximate], config=config)


def geglu_backward(dc, a, b, approximate, in_place=False, config=None):
    """-> da, db; in_place writes them over a and b."""
    return gated.backward(dc, a, b, ACT[approximate], in_place=in_place, config=config)


KERNELS = Kernels(geglu_forward, geglu_backward)
