"""GroupNorm (Wu & He 2018, arXiv:1803.08494): each group of channels of a sample is normalised as one row.

    y = x_hat * w[c] + b[c]        x_hat = (x - mean) * rstd        rstd = 1 / sqrt(mean((x - mean)^2) + eps)
    dx = rstd * (m - mean(m) - x_hat * mean(m * x_hat))        m = dy * w[c]
    dw[c] = sum of dy * x_hat        db[c] = sum of dy        over samples and places

Shapes    x, y: (B, C, *), seen as B * G rows of C / G channels of L places; w, b: (C,); mean, rstd: (B, G) in fp32.
Numerics  all in fp32, cast once at the end to x's dtype; dw and db are summed in fp32.
Memory    keeps x, w, mean and rstd for backward.
Needs     x, w and b on one device; G divides C.
"""

from __future__ import annotations

import torch

from liger_kernel.ops.compat import group_norm_backward, group_norm_forward  # noqa: F401  upstream's signatures
from liger_kernel.ops.core import Case, Contract, Kernels, kernels, outputs, upcast

# Reference


def reference(x, w, b, num_groups, eps=1e-6):
    """The same mathematics in plain torch, differentiable: the oracle of the tests."""
    dtype, rows = x.dtype, upcast(x).flatten(1).unflatten(1, (num_groups, -1))
    centred = rows - rows.mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + eps)
    per_channel = (1, -1, *[1] * (x.dim() - 2))
    return (y.view(x.shape) * upcast(w).view(per_channel) + upcast(b).view(per_channel)).to(dtype)


# Torch pair


def _sizes(x):
    batch, channels = x.shape[:2]
    return batch, channels, x.numel() // max(1, batch * channels)


def _forward(x, w, b, num_groups, eps):
    wide = upcast(x)
    y, mean, rstd = torch.native_group_norm(wide, w.to(wide.dtype), b.to(wide.dtype), *_sizes(x), num_groups, eps)
    return y.to(x.dtype), mean, rstd


def _backward(dy, x, w, mean, rstd, num_groups, needs_dw, needs_db):
    if not x.numel():  # torch divides by the number of places
        return torch.empty_like(x), *(torch.zeros_like(w) if needed else None for needed in (needs_dw, needs_db))
    per_row = (*mean.shape, *[1] * (x.dim() - 1))
    centred = (upcast(x).unflatten(1, (num_groups, -1)) - mean.view(per_row)).view(x.shape)  # see layer_norm
    dx, dw, db = torch.ops.aten.native_group_norm_backward(
        upcast(dy), centred, torch.zeros_like(mean), rstd, w.to(rstd.dtype), *_sizes(x), num_groups,
        [True, needs_dw, needs_db],
    )  # fmt: skip
    return dx.to(x.dtype), dw.to(w.dtype) if needs_dw else None, db.to(w.dtype) if needs_db else None


TORCH = Kernels(_forward, _backward)


# Autograd


class LigerGroupNormFunction(torch.autograd.Function):
    """apply(X, affine_scaling_weight, affine_shifting_bias, num_channels, num_groups, eps) -> Y."""

    @staticmethod
    def forward(ctx, X, affine_scaling_weight, affine_shifting_bias, num_channels, num_groups, eps):
        W, B = affine_scaling_weight.contiguous(), affine_shifting_bias.contiguous()
        check(X, W, B, num_channels, num_groups)
        X = X.contiguous()
        y, mean, rstd = kernels("group_norm", X).forward(X, W, B, num_groups, eps)
        ctx.save_for_backward(X, W, mean, rstd)
        ctx.num_groups = num_groups
        return outputs(y)

    @staticmethod
    def backward(ctx, dY):
        X, W, mean, rstd = ctx.saved_tensors
        pair = kernels("group_norm", X)
        dX, dW, dB = pair.backward(dY.contiguous(), X, W, mean, rstd, ctx.num_groups, *ctx.needs_input_grad[1:3])
        return dX, dW, dB, None, None, None


# Functional


def liger_group_norm(
    X: torch.Tensor,
    affine_scaling_weight: torch.Tensor,
    affine_shifting_bias: torch.Tensor,
    num_channels: int,
    num_groups: int,
    eps: float,
) -> torch.Tensor:
    """GroupNorm of X (B, C, *), any float dtype, with a weight and a bias (C,); the result is like X.

    Raises ValueError for a weight or bias of another length or device, another number of channels than num_channels,
    and one that num_groups does not divide.
    """
    return LigerGroupNormFunction.apply(X, affine_scaling_weight, affine_shifting_bias, num_channels, num_groups, eps)


def check(x, w, b, num_channels, num_groups):
    """ValueError for what cannot be honoured."""
    if x.dim() < 2 or x.shape[1] != num_channels:
        raise ValueError(f"group_norm: x of shape {tuple(x.shape)} does not have {num_channels} channels")
    if num_groups < 1 or num_channels % num_groups:
        raise ValueError(f"group_norm: {num_groups} groups do not divide {num_channels} channels")
    if not x.is_floating_point():
        raise ValueError(f"group_norm: x must be of a floating dtype, got {x.dtype}")
    for name, p in (("weight", w), ("bias", b)):
        if p.shape != (num_channels,):
            raise ValueError(f"group_norm: {name} of shape {tuple(p.shape)} does not fit {num_channels} channels")
        if p.device != x.device:
            raise ValueError(f"group_norm: x is on {x.device} and the {name} on {p.device}")


# Contract


def _case(shape, groups, dtype, device, **options):
    x = torch.randn(shape, dtype=dtype, device=device) + 2  # a mean that must be taken out
    w, b = (torch.randn(shape[1], dtype=dtype, device=device) for _ in range(2))
    return Case((x, w, b), {"num_groups": groups} | options)


def _cases(dtype, device):
    sizes = (((2, 6, 5, 7), 3), ((3, 8, 16), 1), ((2, 4, 9), 4), ((5, 12), 2), ((1, 6, 90, 70), 2), ((0, 4, 3), 2))
    return [*(_case(s, g, dtype, device) for s, g in sizes), _case((2, 4, 0), 2, dtype, device)]


def _timed(dtype, device):
    sizes = (((32, 320, 64, 64), 32), ((8, 512, 128, 128), 32), ((64, 1280, 8, 8), 32))
    return {"x".join(map(str, s)): _case(s, g, dtype, device) for s, g in sizes}


CONTRACT = Contract(
    call=lambda x, w, b, num_groups, eps=1e-6: LigerGroupNormFunction.apply(x, w, b, x.shape[1], num_groups, eps),
    reference=reference,
    cases=_cases,
    timed=_timed,
    bytes_moved=lambda x, w, b, **options: 5 * x.numel() * x.element_size(),
)
