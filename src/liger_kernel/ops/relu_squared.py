"""ReLU squared (So et al. 2021, Primer, arXiv:2109.08668).

    y = max(x, 0)^2        dx = 2 * max(x, 0) * dy

Shapes    x, y: (...).
Numerics  the square is taken in fp32 and cast once.
Memory    keeps x for backward.
Needs     a float dtype.
"""

from __future__ import annotations

import torch

from liger_kernel.ops.compat import relu_squared_backward, relu_squared_forward  # noqa: F401  upstream's signatures
from liger_kernel.ops.core import Case, Contract, Kernels, kernels, outputs

# Reference


def reference(x):
    """The same mathematics in plain torch, differentiable: the oracle of the tests."""
    return torch.square(torch.relu(x))


# Torch pair


def _forward(x):
    y = torch.relu(x)
    return y.mul_(y)


def _backward(dy, x):
    return torch.relu(x).mul_(2.0).mul_(dy)


TORCH = Kernels(_forward, _backward)


# Autograd


class LigerReLUSquaredFunction(torch.autograd.Function):
    """apply(X) -> Y."""

    @staticmethod
    def forward(ctx, X):
        if not X.is_floating_point():
            raise ValueError(f"relu_squared: x must have a float dtype, got {X.dtype}")
        X = X.contiguous()
        ctx.save_for_backward(X)
        return outputs(kernels("relu_squared", X).forward(X))

    @staticmethod
    def backward(ctx, dY):
        (X,) = ctx.saved_tensors
        return kernels("relu_squared", X).backward(dY.contiguous(), X)


# Functional


def liger_relu_squared(x: torch.Tensor) -> torch.Tensor:
    """max(x, 0)^2 of a tensor of any shape and float dtype; the result is like x. ValueError for other dtypes."""
    return LigerReLUSquaredFunction.apply(x)


# Contract


def _cases(dtype, device):
    shapes = ((2, 16, 64), (9, 7, 41), (1, 1), (0, 8), (3, 2101), (5,))
    return [Case((torch.randn(s, dtype=dtype, device=device),)) for s in shapes]


def _timed(dtype, device):
    shapes = ((8192, 14336), (8192, 24576))
    return {f"{r}x{c}": Case((torch.randn(r, c, dtype=dtype, device=device),)) for r, c in shapes}


CONTRACT = Contract(
    call=liger_relu_squared,
    reference=reference,
    cases=_cases,
    timed=_timed,
    bytes_moved=lambda x: 5 * x.numel() * x.element_size(),
)
