"""Attention residuals: softmax attention over the outputs of earlier blocks (Kimi Team 2026, arXiv:2603.15031).

    h = sum over i of a_i v_i        a = softmax over i of z_i        z_i = r_i <u, v_i>        u = w_query * w_norm
    r_i = 1 / sqrt(mean(v_i^2) + eps), so that z_i = <w_query, rms_norm(v_i) * w_norm>
    dv_i = a_i dh + g_i r_i (u - z_i r_i v_i / D)        g_i = a_i (<dh, v_i> - sum over j of a_j <dh, v_j>)
    dw_query = w_norm * du        dw_norm = w_query * du        du = sum over rows and i of g_i r_i v_i

Shapes    V: (N, ..., D), N blocks, seen as R rows of D each; w_query, w_norm: (D,); h: (..., D); a, r: (N, R) in fp32.
Numerics  all in fp32, cast once at the end to V's dtype; du is summed in fp32.
Memory    keeps V, a and r for backward; V is read once forward and twice backward, and no key is ever stored.
Needs     one device.
"""

from __future__ import annotations

import torch

from liger_kernel.ops.compat import attn_res_backward, attn_res_forward  # noqa: F401  upstream's helper signatures
from liger_kernel.ops.core import Case, Contract, Kernels, kernels, outputs, upcast

# Reference


def reference(v, w_query, w_norm, eps=1e-6):
    """The same mathematics in plain torch, differentiable: the oracle of the tests."""
    wide = upcast(v)
    keys = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * upcast(w_norm)
    weights = (keys * upcast(w_query)).sum(-1, keepdim=True).softmax(0)
    return (weights * wide).sum(0).to(v.dtype)


# Torch pair: one block at a time is widened


def _direction(w_query, w_norm):
    return upcast(w_query) * upcast(w_norm)


def _dot(a, b):
    """Not a matrix product, whose sums in fp32 are less exact on a CPU."""
    return (a * b).sum(-1)


def _forward(v, w_query, w_norm, eps):
    u = _direction(w_query, w_norm)
    logits, rstd = (torch.empty(v.shape[:2], dtype=u.dtype, device=v.device) for _ in range(2))
    for i, block in enumerate(v):
        wide = upcast(block)
        rstd[i] = _dot(wide, wide).div_(max(1, v.shape[-1])).add_(eps).rsqrt_()
        logits[i] = _dot(wide, u).mul_(rstd[i])
    alpha = logits.softmax(0)
    h = torch.zeros(v.shape[1:], dtype=u.dtype, device=v.device)
    for block, weight in zip(v, alpha):
        h.addcmul_(upcast(block), weight[:, None])
    return h.to(v.dtype), alpha, rstd


def _backward(dh, v, w_query, w_norm, alpha, rstd):
    u, dh = _direction(w_query, w_norm), upcast(dh)
    g = torch.stack([_dot(dh, upcast(block)) for block in v])
    g = g.sub_((alpha * g).sum(0)).mul_(alpha)
    dv, du = torch.empty_like(v), torch.zeros_like(u)
    for i, block in enumerate(v):
        wide, slope = upcast(block), g[i] * rstd[i]
        du += (wide * slope[:, None]).sum(0)
        pull = _dot(wide, u).mul_(rstd[i] * rstd[i] * slope).div_(max(1, v.shape[-1]))
        grad = dh * alpha[i][:, None]
        dv[i] = grad.add_(slope[:, None] * u).addcmul_(wide, pull[:, None], value=-1)
    return dv, du


TORCH = Kernels(_forward, _backward)


# Autograd


class LigerAttnResFunction(torch.autograd.Function):
    """apply(V_stacked, w_query, w_norm, eps) -> h."""

    @staticmethod
    def forward(ctx, V_stacked, w_query, w_norm, eps):
        check(V_stacked, w_query, w_norm)
        V, w_query, w_norm = as_blocks(V_stacked), w_query.contiguous(), w_norm.contiguous()
        h, alpha, rstd = kernels("attn_res", V).forward(V, w_query, w_norm, eps)
        ctx.save_for_backward(V, w_query, w_norm, alpha, rstd)
        ctx.shape = V_stacked.shape
        return outputs(h.view(ctx.shape[1:]))

    @staticmethod
    def backward(ctx, dh):
        dV, dw_query, dw_norm = gradients(dh, *ctx.saved_tensors)
        return dV.view(ctx.shape), dw_query, dw_norm, None


def as_blocks(v):
    """V as (N, R, D), contiguous."""
    return v.reshape(v.shape[0], v[0, ..., 0].numel(), v.shape[-1]).contiguous()


def gradients(dh, v, w_query, w_norm, alpha, rstd):
    """-> (dV like v, dw_query, dw_norm)."""
    dv, du = kernels("attn_res", v).backward(dh.reshape(v.shape[1:]).contiguous(), v, w_query, w_norm, alpha, rstd)
    return dv, (du * w_norm).to(w_query.dtype), (du * w_query).to(w_norm.dtype)


# Functional


def liger_attn_res(V: torch.Tensor, w_query: torch.Tensor, w_norm: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """softmax over i of <w_query, rms_norm(V[i]) * w_norm>, times V[i], summed over i: (N, ..., D) -> (..., D).

    V: the stacked outputs of N blocks, any float dtype; w_query, w_norm: (D,). The result has V's dtype.
    Raises ValueError for a V without a dimension of blocks or with none, and for weights that do not fit it.
    """
    return LigerAttnResFunction.apply(V, w_query, w_norm, eps)


def check(v, w_query, w_norm):
    """ValueError for what cannot be honoured."""
    if not v.is_floating_point():
        raise ValueError(f"attn_res: V must be of a floating dtype, got {v.dtype}")
    if v.dim() < 2 or not v.shape[0]:
        raise ValueError(f"attn_res: V must be (N, ..., D) with N of at least 1, got shape {tuple(v.shape)}")
    for name, p in (("w_query", w_query), ("w_norm", w_norm)):
        if p.shape != v.shape[-1:]:
            raise ValueError(f"attn_res: {name} of shape {tuple(p.shape)} does not fit rows of {v.shape[-1]}")
        if p.device != v.device:
            raise ValueError(f"attn_res: V is on {v.device} and {name} on {p.device}")


# Contract


def _case(shape, dtype, device, **options):
    v, w_norm = torch.randn(shape, dtype=dtype, device=device), torch.randn(shape[-1], dtype=dtype, device=device)
    return Case((v, torch.randn(shape[-1], dtype=dtype, device=device) / shape[-1] ** 0.5, w_norm), options)


def _cases(dtype, device):
    shapes = ((8, 2, 5, 64), (5, 9, 41), (3, 7, 1, 20), (6, 33), (4, 0, 8), (3, 2, 20000))  # the last: the column loop
    return [*(_case(s, dtype, device) for s in shapes), _case((1, 4, 16), dtype, device, eps=1e-3)]


def _timed(dtype, device):
    shapes = ((8, 8192, 4096), (9, 16384, 2048), (16, 4096, 7168), (32, 8192, 1024))
    return {"x".join(map(str, s)): _case(s, dtype, device) for s in shapes}


CONTRACT = Contract(
    call=lambda v, w_query, w_norm, eps=1e-6: LigerAttnResFunction.apply(v, w_query, w_norm, eps),
    reference=reference,
    cases=_cases,
    timed=_timed,
    bytes_moved=lambda v, *weights, **options: (3 * v.numel() + 2 * v[0].numel()) * v.element_size(),
)
