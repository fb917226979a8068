"""Dynamic tanh, a layer in the place of a norm (Zhu et al. 2025, Transformers without Normalization, arXiv:2503.10622).

    y = gamma * t + beta        t = tanh(alpha * x)
    dx = dy * gamma * (1 - t^2) * alpha        dalpha = sum of dy * gamma * (1 - t^2) * x
    dgamma = sum over rows of dy * t           dbeta = sum over rows of dy

Shapes    x, y: (..., N), seen as R rows of N; alpha: (1,); gamma: (N,); beta: (N,) or None.
Numerics  all in fp32, cast once at the end to x's dtype; dalpha, dgamma and dbeta are summed in fp32.
Memory    keeps x and recomputes tanh.
Needs     one device.
"""

from __future__ import annotations

import torch

from liger_kernel.ops.core import Case, Contract, Kernels, kernels, outputs, sum_rows, upcast

# Reference


def reference(x, alpha, gamma, beta=None):
    """The same mathematics in plain torch, differentiable: the oracle of the tests."""
    y = upcast(gamma) * torch.tanh(upcast(alpha) * upcast(x))
    return (y if beta is None else y + upcast(beta)).to(x.dtype)


# Torch pair


def _forward(x, alpha, gamma, beta):
    y = torch.tanh_(upcast(alpha) * upcast(x)).mul_(gamma)
    return (y if beta is None else y.add_(beta)).to(x.dtype)


def _backward(dy, x, alpha, gamma, needs_beta):
    wide, wide_dy = upcast(x), upcast(dy)
    t = torch.tanh_(upcast(alpha) * wide)
    d_gamma = sum_rows(wide_dy * t)
    d_beta = sum_rows(wide_dy).to(gamma.dtype) if needs_beta else None
    inner = t.mul_(t).neg_().add_(1).mul_(wide_dy).mul_(gamma)
    d_alpha = (inner * wide).sum().view(alpha.shape)
    return inner.mul_(alpha).to(x.dtype), d_alpha.to(alpha.dtype), d_gamma.to(gamma.dtype), d_beta


TORCH = Kernels(_forward, _backward)


# Autograd


class LigerDyTFunction(torch.autograd.Function):
    """apply(x, alpha, gamma, beta) -> y; beta may be None."""

    @staticmethod
    def forward(ctx, x, alpha, gamma, beta):
        check(x, alpha, gamma, beta)
        x, gamma = x.contiguous(), gamma.contiguous()
        ctx.save_for_backward(x, alpha, gamma)
        return outputs(kernels("dyt", x).forward(x, alpha, gamma, None if beta is None else beta.contiguous()))

    @staticmethod
    def backward(ctx, dy):
        x, alpha, gamma = ctx.saved_tensors
        return kernels("dyt", x).backward(dy.contiguous(), x, alpha, gamma, ctx.needs_input_grad[3])


# Functional


def liger_dyt(x: torch.Tensor, alpha: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor | None) -> torch.Tensor:
    """gamma * tanh(alpha * x) + beta for x (..., N), any float dtype, alpha (1,), gamma (N,), beta (N,) or None.

    The result is like x. Raises ValueError for an alpha of several elements, and a gamma or beta that do not fit.
    """
    return LigerDyTFunction.apply(x, alpha, gamma, beta)


def liger_dyt_fwd(x, alpha, gamma, beta):
    """-> y, without autograd."""
    with torch.no_grad():
        return LigerDyTFunction.apply(x, alpha, gamma, beta)


def liger_dyt_bwd(dy, x, alpha, gamma, beta):
    """-> (dx, dalpha, dgamma, dbeta); dbeta is None without a beta."""
    check(x, alpha, gamma, beta)
    return kernels("dyt", x).backward(dy.contiguous(), x.contiguous(), alpha, gamma.contiguous(), beta is not None)


def check(x, alpha, gamma, beta):
    """ValueError for what cannot be honoured."""
    if not x.is_floating_point():
        raise ValueError(f"dyt: x must be of a floating dtype, got {x.dtype}")
    if alpha.numel() != 1:
        raise ValueError(f"dyt: alpha must have one element, got shape {tuple(alpha.shape)}")
    for name, p in (("gamma", gamma), ("beta", beta)):
        if p is not None and p.shape != x.shape[-1:]:
            raise ValueError(f"dyt: {name} of shape {tuple(p.shape)} does not fit rows of {x.shape[-1]}")
    for name, p in (("alpha", alpha), ("gamma", gamma), ("beta", beta)):
        if p is not None and p.device != x.device:
            raise ValueError(f"dyt: x is on {x.device} and {name} on {p.device}")


# Contract


def _case(shape, dtype, device, beta=True):
    x, alpha = torch.randn(shape, dtype=dtype, device=device), torch.tensor([0.5], dtype=dtype, device=device)
    gamma, b = (torch.randn(shape[-1], dtype=dtype, device=device) if given else None for given in (True, beta))
    return Case((x, alpha, gamma, b))


def _cases(dtype, device):
    shapes = ((2, 16, 64), (9, 7, 41), (1, 1), (0, 8), (3, 5000))
    return [_case(s, dtype, device, beta) for s in shapes for beta in (True, False)]


def _timed(dtype, device):
    return {f"{r}x{n}": _case((r, n), dtype, device) for r, n in ((16384, 4096), (65536, 1024), (2048, 65536))}


CONTRACT = Contract(
    call=lambda x, alpha, gamma, beta: LigerDyTFunction.apply(x, alpha, gamma, beta),
    reference=reference,
    cases=_cases,
    timed=_timed,
    bytes_moved=lambda x, *rest, **options: 5 * x.numel() * x.element_size(),
)
