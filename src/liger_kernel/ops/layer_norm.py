"""LayerNorm (Ba, Kiros & Hinton 2016, arXiv:1607.06450) over the last dimension.

    y = x_hat * w + b        x_hat = (x - mean) * rstd        rstd = 1 / sqrt(mean((x - mean)^2) + eps)
    dx = rstd * (m - mean(m) - x_hat * mean(m * x_hat))        m = dy * w
    dw = sum over rows of dy * x_hat        db = sum over rows of dy

Shapes    x, y: (..., N), seen as R rows of N; w, b: (N,), each of them or None; mean, rstd: (R,) in fp32.
Numerics  all in fp32, cast once at the end to x's dtype; dw and db are summed in fp32.
Memory    keeps x, w, mean and rstd for backward.
Needs     x, w and b on one device.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from liger_kernel.ops.compat import layer_norm_backward, layer_norm_forward  # noqa: F401  upstream's signatures
from liger_kernel.ops.core import Case, Contract, Kernels, kernels, outputs, upcast

# Reference


def reference(x, w=None, b=None, eps=1e-6):
    """The same mathematics in plain torch, differentiable: the oracle of the tests."""
    dtype, x = x.dtype, upcast(x)
    centred = x - x.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    if w is not None:
        y = y * upcast(w)
    if b is not None:
        y = y + upcast(b)
    return y.to(dtype)


# Torch pair: torch's own kernel where the values are the same, fp32 around it where it would round its sums


def _forward(x, w, b, eps):
    wide, shape = upcast(x), x.shape[-1:]
    like = [None if p is None else p.to(wide.dtype) for p in (w, b)]
    y, mean, rstd = torch.native_layer_norm(wide, shape, *like, eps)
    if wide is not x and all(p is None or p.dtype == x.dtype for p in (w, b)):
        y = F.layer_norm(x, shape, w, b, eps)  # nn.LayerNorm's bits; its statistics would be rounded to x's dtype
    return y.to(x.dtype), mean.flatten(), rstd.flatten()


def _backward(dy, x, w, b, mean, rstd, needs_dw, needs_db):
    needs_dw, needs_db = needs_dw and w is not None, needs_db and b is not None
    per_row = (*x.shape[:-1], 1)
    centred = x - mean.view(per_row)  # fp32; torch's kernel would take x * rstd - mean * rstd, which cancels
    like = [None if p is None else p.to(centred.dtype) for p in (w, b)]
    dx, dw, db = torch.ops.aten.native_layer_norm_backward(
        upcast(dy), centred, x.shape[-1:], torch.zeros_like(mean).view(per_row), rstd.view(per_row), *like,
        [True, needs_dw, needs_db],
    )  # fmt: skip
    return dx.to(x.dtype), dw.to(w.dtype) if needs_dw else None, db.to(b.dtype) if needs_db else None


TORCH = Kernels(_forward, _backward)


# Autograd


class LigerLayerNormFunction(torch.autograd.Function):
    """apply(X, W, B, eps, impl=None) -> Y. impl names the implementation for this call (default: the process's)."""

    @staticmethod
    def forward(ctx, X, W, B, eps, impl=None):
        check(X, W, B)
        X, W, B = X.contiguous(), None if W is None else W.contiguous(), None if B is None else B.contiguous()
        y, mean, rstd = kernels("layer_norm", X, impl).forward(X, W, B, eps)
        ctx.save_for_backward(X, W, B, mean, rstd)
        ctx.impl = impl
        return outputs(y)

    @staticmethod
    def backward(ctx, dY):
        X, *saved = ctx.saved_tensors
        pair = kernels("layer_norm", X, ctx.impl)
        dX, dW, dB = pair.backward(dY.contiguous(), X, *saved, *ctx.needs_input_grad[1:3])
        return dX, dW, dB, None, None


# Functional


def liger_layer_norm(X: torch.Tensor, W: torch.Tensor | None, B: torch.Tensor | None, eps: float) -> torch.Tensor:
    """LayerNorm of the last dim of X (..., N), any float dtype, with weight W and bias B (N,), each of them or None.

    The result is like X, also under autocast. Raises ValueError for a weight or bias of another length or device.
    """
    return LigerLayerNormFunction.apply(X, W, B, eps)


def check(x, w, b):
    """ValueError for what cannot be honoured."""
    if not x.is_floating_point():
        raise ValueError(f"layer_norm: x must be of a floating dtype, got {x.dtype}")
    for name, p in (("weight", w), ("bias", b)):
        if p is not None and p.shape != x.shape[-1:]:
            raise ValueError(f"layer_norm: {name} of shape {tuple(p.shape)} does not fit rows of {x.shape[-1]}")
        if p is not None and p.device != x.device:
            raise ValueError(f"layer_norm: x is on {x.device} and the {name} on {p.device}")


# Contract


def _case(shape, dtype, device, weight=True, bias=True, **options):
    x = torch.randn(shape, dtype=dtype, device=device) + 2  # a mean that must be taken out
    w, b = (torch.randn(shape[-1], dtype=dtype, device=device) if p else None for p in (weight, bias))
    return Case((x, w, b), options)


def _cases(dtype, device):
    shapes = ((2, 16, 64), (9, 7, 41), (1, 1), (0, 8), (3, 40000))  # the last needs the column loop
    # One column has no variance: 1 / sqrt(eps) multiplies what rounding is left of x - mean, so eps is not small there.
    eps = {(1, 1): 1.0}
    flags = [(w, b) for w in (True, False) for b in (True, False)]
    return [_case(s, dtype, device, w, b, eps=eps.get(s, 1e-6)) for s in shapes for w, b in flags]


def _timed(dtype, device):
    shapes = ((16384, 4096), (65536, 1024), (2048, 65536))
    return {f"{rows}x{cols}": _case((rows, cols), dtype, device) for rows, cols in shapes}


CONTRACT = Contract(
    call=lambda x, w, b, eps=1e-6: LigerLayerNormFunction.apply(x, w, b, eps),
    reference=reference,
    cases=_cases,
    timed=_timed,
    bytes_moved=lambda x, w, b, **options: 5 * x.numel() * x.element_size(),
)
