"""PolyNorm, an activation of three normalised powers (Zhuo et al. 2024, PolyCom, arXiv:2411.03884).

    y = c3 x^3 + c2 x^2 + c1 x + b        (c3, c2, c1) = w * (r3, r2, r1)        rp = 1 / sqrt(mean(x^2p) + eps)
    dx = sum over p of p cp x^(p-1) * (dy - x^p rp^2 mean(dy x^p))
    dw = sum over rows of (r3, r2, r1) * (sum dy x^3, sum dy x^2, sum dy x)        db = sum of dy

Shapes    x, y: (..., N), seen as R rows of N; w: (3,), of the third power first; b: one element;
          rstd: (R, 3) in fp32, in the order of w.
Numerics  all in fp32, cast once at the end to x's dtype; dw and db are summed in fp32.
Memory    keeps x, w and rstd for backward; in_place=True may write dx over dy.
Needs     one device; |x| below 2.6e6, where x^6 leaves fp32.
"""

from __future__ import annotations

import torch

from liger_kernel.ops.compat import poly_norm_backward, poly_norm_forward  # noqa: F401  upstream's helper signatures
from liger_kernel.ops.core import Case, Contract, Kernels, kernels, outputs, upcast

# Reference


def reference(x, w, b, eps=1e-6):
    """The same mathematics in plain torch, differentiable: the oracle of the tests."""
    dtype, x, y = x.dtype, upcast(x), upcast(b).reshape(())
    for weight, power in zip(upcast(w), (x**3, x**2, x), strict=True):
        y = y + weight * power * torch.rsqrt(power.pow(2).mean(-1, keepdim=True) + eps)
    return y.to(dtype)


# Torch pair


def _coefficients(w, rstd, shape):
    """c3, c2 and c1 as (..., 1)."""
    return (upcast(w) * rstd).view(*shape[:-1], 3).split(1, -1)


def _forward(x, w, b, eps):
    wide = upcast(x)
    square = wide * wide
    power = square.clone()
    means = [power.mean(-1)]
    for _ in range(2):
        means.insert(0, power.mul_(square).mean(-1))
    rstd = torch.stack(means, -1).add_(eps).rsqrt_().view(-1, 3)
    c3, c2, c1 = _coefficients(w, rstd, x.shape)
    y = torch.mul(wide, c3, out=power).add_(c2).mul_(wide).add_(c1).mul_(wide).add_(b.reshape(()))
    return y.to(x.dtype), rstd


def _backward(dy, x, w, rstd, in_place, needs_params):
    wide, wide_dy = upcast(x), upcast(dy)
    square = wide * wide
    product = wide_dy * wide
    sums = [product.sum(-1)]
    for _ in range(2):
        sums.insert(0, product.mul_(wide).sum(-1))
    sums = torch.stack(sums, -1).view(-1, 3)
    c3, c2, c1 = _coefficients(w, rstd, x.shape)
    means = (sums / max(1, x.shape[-1]) * rstd * rstd).view(*x.shape[:-1], 3)
    k3, k2, k1 = 3 * c3 * means[..., :1], 2 * c2 * means[..., 1:2], c1 * means[..., 2:]
    slope = torch.mul(wide, 3 * c3, out=product).add_(2 * c2).mul_(wide).add_(c1).mul_(wide_dy)
    dx = slope.sub_((square * k3).add_(k2).mul_(square).add_(k1).mul_(wide)).to(x.dtype)
    return dx, (sums * rstd).sum(0) if needs_params else None, wide_dy.sum() if needs_params else None


TORCH = Kernels(_forward, _backward)


# Autograd


class LigerPolyNormFunction(torch.autograd.Function):
    """apply(X, W, B, eps=1e-6, in_place=True) -> Y."""

    @staticmethod
    def forward(ctx, X, W, B, eps=1e-6, in_place=True):
        check(X, W, B)
        X, W = X.contiguous(), W.contiguous()
        y, rstd = kernels("poly_norm", X).forward(X, W, B, eps)
        ctx.save_for_backward(X, W, B, rstd)
        ctx.in_place = in_place
        return outputs(y)

    @staticmethod
    def backward(ctx, dY):
        X, W, B, rstd = ctx.saved_tensors
        return *gradients(dY, X, W, B, rstd, ctx.in_place, any(ctx.needs_input_grad[1:3])), None, None


def gradients(dy, x, w, b, rstd, in_place, needs_params):
    """-> (dx, dw, db), the last two in the dtypes and shapes of w and b, or None where they are not needed."""
    dx, dw, db = kernels("poly_norm", x).backward(dy.contiguous(), x, w, rstd, in_place, needs_params)
    return (dx, dw.to(w.dtype), db.to(b.dtype).view(b.shape)) if needs_params else (dx, None, None)


# Functional


def liger_poly_norm(
    X: torch.Tensor, W: torch.Tensor, B: torch.Tensor, eps: float = 1e-6, in_place: bool = True
) -> torch.Tensor:
    """W[0] norm(X^3) + W[1] norm(X^2) + W[2] norm(X) + B over the last dim of X (..., N), any float dtype.

    norm divides by the root mean square. W is (3,), B has one element; the result is like X. in_place=True permits
    the backward to write dX over the incoming gradient: pass False where that gradient is shared.
    Raises ValueError for a W or B of another size or on another device.
    """
    return LigerPolyNormFunction.apply(X, W, B, eps, in_place)


def check(x, w, b):
    """ValueError for what cannot be honoured."""
    if not x.is_floating_point():
        raise ValueError(f"poly_norm: x must be of a floating dtype, got {x.dtype}")
    if not x.dim():
        raise ValueError("poly_norm: x has no dimension to normalise")
    if w.shape != (3,):
        raise ValueError(f"poly_norm: weight must be of shape (3,), one per power, got {tuple(w.shape)}")
    if b.numel() != 1:
        raise ValueError(f"poly_norm: bias must have one element, got shape {tuple(b.shape)}")
    for name, p in (("weight", w), ("bias", b)):
        if p.device != x.device:
            raise ValueError(f"poly_norm: x is on {x.device} and the {name} on {p.device}")


# Contract


def _case(shape, dtype, device, **options):
    x, w, b = (torch.randn(size, dtype=dtype, device=device) for size in (shape, 3, 1))
    return Case((x, w, b), options)


def _cases(dtype, device):
    # One column is its own root mean square: its gradient is what eps leaves of a difference, so eps is large there.
    shapes = (((2, 16, 64), 1e-6), ((9, 7, 41), 1e-6), ((1, 1), 1.0), ((0, 8), 1e-6), ((2, 20000), 1e-6))
    return [_case(shape, dtype, device, eps=eps) for shape, eps in shapes]  # the last needs the column loop


def _timed(dtype, device):
    return {f"{r}x{n}": _case((r, n), dtype, device) for r, n in ((16384, 4096), (8192, 14336), (65536, 1024))}


CONTRACT = Contract(
    call=lambda x, w, b, eps=1e-6: LigerPolyNormFunction.apply(x, w, b, eps, False),
    reference=reference,
    cases=_cases,
    timed=_timed,
    bytes_moved=lambda x, w, b, **options: 5 * x.numel() * x.element_size(),
)
