"""Residual add and RMSNorm in Triton: the RMSNorm kernels with a residual."""

from __future__ import annotations

from liger_kernel.ops.core import Kernels
from liger_kernel.ops.kernels.rms_norm import rms_norm_backward, rms_norm_forward


def fused_add_rms_norm_forward(x, r, w, eps, offset, casting_mode, tiles=None):
    """x, r: (..., N) contiguous, one dtype -> y and s like x, rstd (R,) in fp32."""
    return rms_norm_forward(x, w, eps, offset, casting_mode, x.dtype, residual=r, tiles=tiles)


def fused_add_rms_norm_backward(dy, ds, s, w, rstd, offset, casting_mode, in_place, needs_dw, tiles=None):
    """dy, ds, s: (..., N) contiguous -> dx like s, which is dr too, and dw like w (or None)."""
    return rms_norm_backward(dy, s, w, rstd, offset, casting_mode, in_place, needs_dw, ds=ds, tiles=tiles)


KERNELS = Kernels(fused_add_rms_norm_forward, fused_add_rms_norm_backward)
