"""Sparsemax (Martins & Astudillo 2016, arXiv:1602.02068): the point of the simplex that is nearest to x.

    y = max(x - tau, 0)        tau such that y sums to 1
    dx = dy - mean of dy over the support, where y > 0; else 0

Shapes    x, y: any, with the rows along dim.
Numerics  all in fp32 relative to the row's maximum, cast once at the end to x's dtype. An element equal to tau, as
          happens among coarse values, is outside: k x > sum - 1 decides, which rounds less than x > (sum - 1) / k.
          The backward takes the support from the rounded y.
Memory    keeps y for backward.
Needs     at least one finite element per row; otherwise the row is NaN.
"""

from __future__ import annotations

import torch

from liger_kernel.ops.core import Case, Contract, Kernels, kernels, outputs, upcast

# Reference


def reference(x, dim=-1):
    """The same mathematics in plain torch, differentiable: the oracle of the tests."""
    wide = upcast(x).movedim(dim, -1)
    if not x.numel():
        return wide.movedim(-1, dim).to(x.dtype)
    wide = wide - wide.detach().amax(-1, keepdim=True)
    ordered = wide.sort(-1, descending=True).values
    sums = ordered.cumsum(-1)
    rank = torch.arange(1, sums.shape[-1] + 1, device=x.device, dtype=wide.dtype)
    size = (1 + rank * ordered > sums).sum(-1, keepdim=True)
    excess = sums.gather(-1, size - 1) - 1
    return torch.where(wide * size > excess, wide - excess / size, 0).movedim(-1, dim).to(x.dtype)


# Torch pair


def _forward(x):
    wide = upcast(x)
    if not x.numel():
        return torch.empty_like(x)
    wide = wide - wide.amax(-1, keepdim=True)
    ordered = wide.sort(-1, descending=True).values
    rank = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=wide.dtype)
    support = 1 + rank * ordered > ordered.cumsum(-1)
    size = support.sum(-1, keepdim=True)
    excess = ordered.masked_fill_(~support, 0).sum(-1, keepdim=True) - 1
    outside = wide * size <= excess
    return wide.sub_(excess / size).clamp_(min=0).masked_fill_(outside, 0).to(x.dtype)


def _backward(dy, y):
    support = y > 0
    live = upcast(dy).masked_fill(~support, 0)
    mean = live.sum(-1, keepdim=True) / support.sum(-1, keepdim=True)
    return (live - mean).masked_fill_(~support, 0).to(y.dtype)


TORCH = Kernels(_forward, _backward)


# Autograd


class LigerSparsemaxFunction(torch.autograd.Function):
    """apply(x, dim) -> y."""

    @staticmethod
    def forward(ctx, x, dim):
        check(x, dim)
        rows = x.movedim(dim, -1).contiguous()
        y = kernels("sparsemax", rows).forward(rows)
        ctx.save_for_backward(y)
        ctx.dim = dim
        return outputs(y.movedim(-1, dim))

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        dx = kernels("sparsemax", y).backward(dy.movedim(ctx.dim, -1).contiguous(), y)
        return dx.movedim(-1, ctx.dim), None


# Functional


def liger_sparsemax(input: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Sparsemax of input, any float dtype, over dim; the result is like input, its rows sum to 1.

    Raises ValueError for a dtype that is not floating and for a dim that input does not have.
    """
    return LigerSparsemaxFunction.apply(input, dim)


def check(x, dim):
    """ValueError for what cannot be honoured."""
    if not x.is_floating_point():
        raise ValueError(f"sparsemax: x must be of a floating dtype, got {x.dtype}")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"sparsemax: x of shape {tuple(x.shape)} has no dim {dim}")


# Contract


def _cases(dtype, device):
    sizes = (((2, 16, 64), -1), ((9, 7, 41), 1), ((1, 1), -1), ((0, 8), -1), ((3, 40000), -1))  # the last is walked
    return [Case((torch.randn(shape, dtype=dtype, device=device),), {"dim": dim}) for shape, dim in sizes]


def _timed(dtype, device):
    shapes = ((8192, 32768), (4096, 131072), (16384, 4096), (65536, 1024))
    return {f"{r}x{n}": Case((torch.randn(r, n, dtype=dtype, device=device),), {"dim": -1}) for r, n in shapes}


CONTRACT = Contract(
    call=lambda x, dim=-1: LigerSparsemaxFunction.apply(x, dim),
    reference=reference,
    cases=_cases,
    timed=_timed,
    bytes_moved=lambda x, **options: 5 * x.numel() * x.element_size(),
)
