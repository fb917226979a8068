"""What a layer reads of n residual streams (Xie et al. 2025, mHC, arXiv:2512.24880; Zhu et al. 2024, arXiv:2409.19606).

    x_in = sum over i of h_i x_i
    dx_i = h_i dx_in        dh_i = <dx_in, x_i>

Shapes    x: (..., n, C), seen as R rows of n streams; h: (..., n); x_in: (..., C).
Numerics  all in fp32, cast once at the end to x's dtype, dh to h's.
Memory    keeps x and h for backward.
Needs     one device.
"""

from __future__ import annotations

import torch

from liger_kernel.ops.core import Case, Contract, Kernels, kernels, outputs, upcast, wide

# Reference


def reference(x, h_pre):
    """The same mathematics in plain torch, differentiable: the oracle of the tests."""
    return (h_pre.to(wide(x.dtype))[..., None] * upcast(x)).sum(-2).to(x.dtype)


# Torch pair: one stream at a time is widened


def _forward(x, h):
    total = torch.zeros(x.shape[0], x.shape[2], dtype=wide(x.dtype), device=x.device)
    for stream, weight in zip(x.unbind(1), h.unbind(1)):
        total.addcmul_(upcast(stream), weight[:, None])
    return total.to(x.dtype)


def _backward(dout, x, h):
    grad, dx, dh = upcast(dout), torch.empty_like(x), torch.empty_like(h)
    for i in range(x.shape[1]):
        dx[:, i] = grad * h[:, i, None]
        dh[:, i] = (grad * upcast(x[:, i])).sum(-1)
    return dx, dh


TORCH = Kernels(_forward, _backward)


# Autograd


class LigerMHCPreFunction(torch.autograd.Function):
    """apply(x, h_pre) -> x_in."""

    @staticmethod
    def forward(ctx, x, h_pre):
        check(x, h_pre)
        ctx.shapes = x.shape, h_pre.shape
        x, h = x.reshape(-1, *x.shape[-2:]).contiguous(), h_pre.reshape(-1, h_pre.shape[-1]).contiguous()
        ctx.save_for_backward(x, h)
        return outputs(kernels("mhc_pre", x).forward(x, h).view(*ctx.shapes[0][:-2], x.shape[-1]))

    @staticmethod
    def backward(ctx, dout):
        x, h = ctx.saved_tensors
        grads = kernels("mhc_pre", x).backward(dout.reshape(-1, x.shape[-1]).contiguous(), x, h)
        return tuple(d.view(shape) for d, shape in zip(grads, ctx.shapes))


# Functional


def liger_mhc_pre(x: torch.Tensor, h_pre: torch.Tensor) -> torch.Tensor:
    """sum over i of h_pre[..., i] x[..., i, :]: x (..., n, C), any float dtype, and h_pre (..., n) -> (..., C) like x.

    Raises ValueError where the shapes or devices do not fit.
    """
    return LigerMHCPreFunction.apply(x, h_pre)


def check(x, h_pre):
    """ValueError for what cannot be honoured."""
    check_streams("mhc_pre", x)
    check_fits("mhc_pre", x, h_pre=(h_pre, x.shape[:-1]))


def check_streams(op, x):
    """ValueError unless x is (..., n, C) of a floating dtype."""
    if not x.is_floating_point():
        raise ValueError(f"{op}: x must be of a floating dtype, got {x.dtype}")
    if x.dim() < 2 or 0 in x.shape[-2:]:
        raise ValueError(f"{op}: x must be (..., n, C) with n and C of at least 1, got shape {tuple(x.shape)}")


def check_fits(op, x, **known):
    """ValueError unless each of name=(tensor, shape) has that shape and x's device."""
    for name, (tensor, shape) in known.items():
        if tensor.shape != shape:
            raise ValueError(
                f"{op}: {name} of shape {tuple(tensor.shape)} does not fit x of shape {tuple(x.shape)}: "
                f"it must be {tuple(shape)}"
            )
        if tensor.device != x.device:
            raise ValueError(f"{op}: x is on {x.device} and {name} on {tensor.device}")


# Contract


def _case(shape, dtype, device):
    # The weights are fp32 whatever x is, as liger_mhc_coeffs makes them.
    return Case(
        (torch.randn(shape, dtype=dtype, device=device), torch.rand(shape[:-1], dtype=wide(dtype), device=device))
    )


def _cases(dtype, device):
    return [_case(s, dtype, device) for s in ((2, 5, 4, 64), (7, 3, 41), (3, 1, 8), (0, 4, 8), (2, 4, 5000), (4, 70))]


def _timed(dtype, device):
    return {
        "x".join(map(str, s)): _case(s, dtype, device) for s in ((8192, 4, 4096), (4096, 4, 7168), (16384, 2, 2048))
    }


CONTRACT = Contract(
    call=lambda x, h_pre: LigerMHCPreFunction.apply(x, h_pre),
    reference=reference,
    cases=_cases,
    timed=_timed,
    bytes_moved=lambda x, h_pre: (3 * x.numel() + 2 * x[..., 0, :].numel()) * x.element_size(),
)
