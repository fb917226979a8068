"""Softmax over the last dimension.

    y = exp(x - max(x)) / sum(exp(x - max(x)))
    dx = y * (dy - sum(dy * y))

Shapes    x, y: (..., N), seen as R rows of N.
Numerics  all in fp32, cast once at the end to x's dtype; the backward uses the rounded y.
Memory    keeps y for backward.
Needs     nothing. A row of -inf only is NaN, as in torch.
"""

from __future__ import annotations

import torch

from liger_kernel.ops.core import Case, Contract, Kernels, kernels, outputs, upcast

# Reference


def reference(x):
    """The same mathematics in plain torch, differentiable: the oracle of the tests."""
    dtype, x = x.dtype, upcast(x)
    e = torch.exp(x - x.amax(-1, keepdim=True)) if x.numel() else x
    return (e / e.sum(-1, keepdim=True)).to(dtype)


# Torch pair


def _forward(x):
    return torch.softmax(x, -1)


def _backward(dy, y):
    return torch.ops.aten._softmax_backward_data(dy, y, -1, y.dtype)


TORCH = Kernels(_forward, _backward)


# Autograd


class LigerSoftmaxFunction(torch.autograd.Function):
    """apply(input_) -> y."""

    @staticmethod
    def forward(ctx, input_):
        check(input_)
        x = input_.contiguous()
        y = kernels("softmax", x).forward(x)
        ctx.save_for_backward(y)
        return outputs(y)

    @staticmethod
    def backward(ctx, dY):
        (y,) = ctx.saved_tensors
        return kernels("softmax", y).backward(dY.contiguous(), y)


# Functional


def liger_softmax(x: torch.Tensor) -> torch.Tensor:
    """Softmax over the last dim of x (..., N), any float dtype; the result is like x, also under autocast.

    Raises ValueError for a dtype that is not floating and for a tensor without dimensions.
    """
    return LigerSoftmaxFunction.apply(x)


def check(x):
    """ValueError for what cannot be honoured."""
    if not x.is_floating_point():
        raise ValueError(f"softmax: x must be of a floating dtype, got {x.dtype}")
    if not x.dim():
        raise ValueError("softmax: x has no dimension to take the softmax over")


# Contract


def _cases(dtype, device):
    shapes = ((2, 16, 64), (9, 7, 41), (1, 1), (0, 8), (3, 40000))  # the last needs the column loop
    return [Case((3 * torch.randn(shape, dtype=dtype, device=device),)) for shape in shapes]


def _timed(dtype, device):
    shapes = ((8192, 32768), (4096, 131072), (16384, 4096), (65536, 1024))
    return {f"{rows}x{cols}": Case((torch.randn(rows, cols, dtype=dtype, device=device),)) for rows, cols in shapes}


CONTRACT = Contract(
    call=LigerSoftmaxFunction.apply,
    reference=reference,
    cases=_cases,
    timed=_timed,
    bytes_moved=lambda x: 5 * x.numel() * x.element_size(),
)
