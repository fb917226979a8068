"""Residual add, then RMSNorm (arXiv:1910.07467): what every pre-norm layer does between two blocks.

    s = x + r        y = s * rstd * (offset + w)        rstd = 1 / sqrt(mean(s^2) + eps)
    dx = dr = ds + rstd * (m - s * rstd^2 * mean(m * s))        m = dy * (offset + w)
    dw = sum over rows of dy * s * rstd

Shapes    x, r, y, s: (..., N), seen as R rows of N; w: (N,) or None; rstd: (R,) in fp32.
Numerics  s is rounded to the dtype of x + r before the norm, as the unfused add does; the casting modes are
          rms_norm's. ds is added in fp32. dw is summed in fp32.
Memory    keeps s, w and rstd for backward; in_place=True may write dx over dy. dx and dr are one tensor.
Needs     x and r of one shape; everything on one device.
"""

from __future__ import annotations

import torch

from liger_kernel.ops import rms_norm
from liger_kernel.ops.compat import (  # noqa: F401  upstream's helper signatures
    fused_add_rms_norm_backward,
    fused_add_rms_norm_forward,
)
from liger_kernel.ops.core import Case, Contract, Kernels, kernels, outputs

# Reference


def reference(x, r, w=None, eps=1e-6, offset=0.0, casting_mode="llama"):
    """The same mathematics in plain torch, differentiable: the oracle of the tests. -> (y, s)"""
    s = x + r
    return rms_norm.reference(s, w, eps, offset, casting_mode), s


# Torch pair


def _forward(x, r, w, eps, offset, casting_mode):
    s = x + r
    y, rstd = rms_norm.TORCH.forward(s, w, eps, offset, casting_mode, s.dtype)
    return y, s, rstd


def _backward(dy, ds, s, w, rstd, offset, casting_mode, in_place, needs_dw):
    return rms_norm.TORCH.backward(dy, s, w, rstd, offset, casting_mode, in_place, needs_dw, ds)


TORCH = Kernels(_forward, _backward)


# Autograd


class LigerFusedAddRMSNormFunction(torch.autograd.Function):
    """apply(X, R, W, eps, offset=0.0, casting_mode="llama", in_place=False) -> (Y, S)."""

    @staticmethod
    def forward(ctx, X, R, W, eps, offset=0.0, casting_mode="llama", in_place=False):
        casting_mode = check(X, R, W, casting_mode)
        ctx.dtypes = X.dtype, R.dtype
        dtype = torch.promote_types(X.dtype, R.dtype)
        X, R = X.to(dtype).contiguous(), R.to(dtype).contiguous()
        W = None if W is None else W.contiguous()
        y, s, rstd = kernels("fused_add_rms_norm", X).forward(X, R, W, eps, offset, casting_mode)
        ctx.save_for_backward(s, W, rstd)
        ctx.options = offset, casting_mode, in_place
        return outputs((y, s))

    @staticmethod
    def backward(ctx, dY, dS):
        s, W, rstd = ctx.saved_tensors
        pair = kernels("fused_add_rms_norm", s)
        needs_dw = ctx.needs_input_grad[2]
        dX, dW = pair.backward(dY.contiguous(), dS.contiguous(), s, W, rstd, *ctx.options, needs_dw)
        return dX.to(ctx.dtypes[0]), dX.to(ctx.dtypes[1]), dW, *[None] * 4


# Functional


def liger_fused_add_rms_norm(
    X: torch.Tensor,
    R: torch.Tensor,
    W: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    casting_mode: str = "llama",
    in_place: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(RMSNorm(X + R), X + R) for X and R (..., N), any float dtypes, and weight W (N,) or None.

    Both results have the dtype of X + R. casting_mode: "llama", "gemma" or "none", as in liger_rms_norm.
    in_place=True permits the backward to write dX over the incoming gradient of the first result.
    Raises ValueError for an unknown casting_mode, for X and R of different shapes or devices, and for a weight of
    another length or on another device.
    """
    return LigerFusedAddRMSNormFunction.apply(X, R, W, eps, offset, casting_mode, in_place)


def check(x, r, w, casting_mode):
    """casting_mode as its name; ValueError for what cannot be honoured."""
    if x.shape != r.shape:
        raise ValueError(f"fused_add_rms_norm: x of shape {tuple(x.shape)} and residual of shape {tuple(r.shape)}")
    if x.device != r.device:
        raise ValueError(f"fused_add_rms_norm: x is on {x.device} and the residual on {r.device}")
    return rms_norm.check(x, w, casting_mode, "fused_add_rms_norm")


# Contract


def _case(shape, dtype, device, affine=True, **options):
    x, r = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    return Case((x, r, torch.randn(shape[-1], dtype=dtype, device=device) if affine else None), options)


def _cases(dtype, device):
    modes = ({"casting_mode": "llama"}, {"casting_mode": "gemma", "offset": 1.0}, {"casting_mode": "none"})
    shapes = ((2, 16, 64), (9, 7, 41), (1, 1), (0, 8), (3, 40000))  # the last needs the column loop
    return [_case(s, dtype, device, affine, **mode) for s in shapes for affine in (True, False) for mode in modes]


def _timed(dtype, device):
    shapes = ((16384, 4096), (8192, 8192), (65536, 1024))
    return {f"{rows}x{cols}": _case((rows, cols), dtype, device) for rows, cols in shapes}


CONTRACT = Contract(
    call=lambda x, r, w, eps=1e-6, offset=0.0, casting_mode="llama": LigerFusedAddRMSNormFunction.apply(
        x, r, w, eps, offset, casting_mode, False
    ),
    reference=reference,
    cases=_cases,
    timed=_timed,
    bytes_moved=lambda x, r, w, **options: 8 * x.numel() * x.element_size(),
)
