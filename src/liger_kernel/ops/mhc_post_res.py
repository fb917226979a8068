"""n residual streams after a layer, mixed and with its output added (Xie et al. 2025, mHC, arXiv:2512.24880).

    y_o = sum over i of h_res[o, i] x_i + h_post[o] f
    dx_i = sum over o of h_res[o, i] dy_o        dh_res[o, i] = <dy_o, x_i>
    df = sum over o of h_post[o] dy_o            dh_post[o] = <dy_o, f>

Shapes    x, y: (..., n, C), seen as R rows of n streams; f: (..., C); h_post: (..., n); h_res: (..., n, n).
Numerics  all in fp32, cast once at the end to x's dtype, df, dh_post and dh_res to those of f, h_post and h_res.
Memory    keeps x, f, h_post and h_res for backward.
Needs     one device.
"""

from __future__ import annotations

import torch

from liger_kernel.ops.core import Case, Contract, Kernels, kernels, outputs, upcast, wide
from liger_kernel.ops.mhc_pre import check_fits, check_streams

# Reference


def reference(x, f_out, h_post, h_res):
    """The same mathematics in plain torch, differentiable: the oracle of the tests."""
    x_wide, f, h_post, h_res = (t.to(wide(x.dtype)) for t in (x, f_out, h_post, h_res))
    mixed = (h_res[..., None] * x_wide[..., None, :, :]).sum(-2)
    return (mixed + h_post[..., None] * f[..., None, :]).to(x.dtype)


# Torch pair: one stream at a time is widened


def _forward(x, f, h_post, h_res):
    y = torch.empty_like(x)
    for o in range(x.shape[1]):
        total = upcast(f).to(wide(x.dtype)) * h_post[:, o, None]
        for i in range(x.shape[1]):
            total.addcmul_(upcast(x[:, i]), h_res[:, o, i, None])
        y[:, o] = total
    return y


def _backward(dy, x, f, h_post, h_res):
    dx, df, dh_post, dh_res = (torch.empty_like(t) for t in (x, f, h_post, h_res))
    df_sum = torch.zeros(f.shape, dtype=wide(x.dtype), device=f.device)
    for o in range(x.shape[1]):
        grad = upcast(dy[:, o])
        df_sum.addcmul_(grad, h_post[:, o, None])
        dh_post[:, o] = (grad * upcast(f)).sum(-1)
        for i in range(x.shape[1]):
            dh_res[:, o, i] = (grad * upcast(x[:, i])).sum(-1)
    for i in range(x.shape[1]):
        total = torch.zeros_like(df_sum)
        for o in range(x.shape[1]):
            total.addcmul_(upcast(dy[:, o]), h_res[:, o, i, None])
        dx[:, i] = total
    return dx, df.copy_(df_sum), dh_post, dh_res


TORCH = Kernels(_forward, _backward)


# Autograd


class LigerMHCPostResFunction(torch.autograd.Function):
    """apply(x, f_out, h_post, h_res) -> y."""

    @staticmethod
    def forward(ctx, x, f_out, h_post, h_res):
        check(x, f_out, h_post, h_res)
        given = x, f_out, h_post, h_res
        ctx.shapes = [t.shape for t in given]
        lead = x.dim() - 2
        saved = [t.reshape(-1, *t.shape[lead:]).contiguous() for t in given]
        ctx.save_for_backward(*saved)
        return outputs(kernels("mhc_post_res", saved[0]).forward(*saved).view(x.shape))

    @staticmethod
    def backward(ctx, dy):
        saved = ctx.saved_tensors
        grads = kernels("mhc_post_res", saved[0]).backward(dy.reshape(saved[0].shape).contiguous(), *saved)
        return tuple(d.view(shape) for d, shape in zip(grads, ctx.shapes))


# Functional


def liger_mhc_post_res(x: torch.Tensor, f_out: torch.Tensor, h_post: torch.Tensor, h_res: torch.Tensor) -> torch.Tensor:
    """sum over i of h_res[..., o, i] x[..., i, :] + h_post[..., o] f_out, for each stream o; the result is like x.

    x: (..., n, C), any float dtype; f_out: (..., C); h_post: (..., n); h_res: (..., n, n).
    Raises ValueError where the shapes or devices do not fit.
    """
    return LigerMHCPostResFunction.apply(x, f_out, h_post, h_res)


def check(x, f_out, h_post, h_res):
    """ValueError for what cannot be honoured."""
    check_streams("mhc_post_res", x)
    lead, (n, width) = x.shape[:-2], x.shape[-2:]
    check_fits(
        "mhc_post_res", x, f_out=(f_out, (*lead, width)), h_post=(h_post, (*lead, n)), h_res=(h_res, (*lead, n, n))
    )


# Contract


def _case(shape, dtype, device):
    # The weights are fp32 whatever x is, as liger_mhc_coeffs makes them.
    *lead, n, width = shape
    x, f = (torch.randn(s, dtype=dtype, device=device) for s in (shape, (*lead, width)))
    return Case((x, f, *(torch.rand(*lead, *s, dtype=wide(dtype), device=device) for s in ((n,), (n, n)))))


def _cases(dtype, device):
    return [_case(s, dtype, device) for s in ((2, 5, 4, 64), (7, 3, 41), (3, 1, 8), (0, 4, 8), (2, 4, 5000), (4, 70))]


def _timed(dtype, device):
    return {
        "x".join(map(str, s)): _case(s, dtype, device) for s in ((8192, 4, 4096), (4096, 4, 7168), (16384, 2, 2048))
    }


CONTRACT = Contract(
    call=lambda x, f_out, h_post, h_res: LigerMHCPostResFunction.apply(x, f_out, h_post, h_res),
    reference=reference,
    cases=_cases,
    timed=_timed,
    bytes_moved=lambda x, f_out, h_post, h_res: (5 * x.numel() + 3 * f_out.numel()) * x.element_size(),
)
