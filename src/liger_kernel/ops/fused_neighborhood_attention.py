"""Neighbourhood attention in one dimension (Hassani et al. 2023, arXiv:2204.07143): a query sees the keys around it.

    s_ij = scale * q_i . k_j           |i - j| <= dilation * (K - 1) / 2 and dilation divides i - j; cut at the ends
    p_ij = exp(s_ij - lse_i)           o_i = sum_j p_ij v_j
    ds_ij = p_ij * (do_i . v_j - do_i . o_i)
    dq_i = scale * sum_j ds_ij k_j     dk_j = scale * sum_i ds_ij q_i     dv_j = sum_i p_ij do_i

Shapes    q, k, v, o: (B, H, S, D); lse (B, H, S).
Numerics  all in fp32, cast once at the end to q's dtype; the backward takes o in that dtype.
Memory    keeps q, k, v, o and lse: nothing of S x S, and of S x K in the torch pair for a moment only.
Needs     an odd K, so that who sees whom is symmetric: each row's dk and dv are sums over that row's own neighbours.
"""

from __future__ import annotations

import math

import torch

from liger_kernel.ops.core import Case, Contract, Kernels, kernels, outputs, upcast

# Reference


def reference(query, key, value, kernel_size=7, dilation=1, scale=None):
    """The same mathematics in plain torch, differentiable: the oracle of the tests."""
    q, k, v = upcast(query), upcast(key), upcast(value)
    place = torch.arange(q.shape[-2], device=q.device)
    apart = place[:, None] - place
    seen = (apart.abs() <= dilation * (kernel_size // 2)) & (apart % dilation == 0)
    s = (q @ k.transpose(-1, -2)) * scale_of(scale, q)
    return (s.masked_fill(~seen, float("-inf")).softmax(-1) @ v).to(query.dtype)


def scale_of(scale, q):
    """The factor of the scores: 1 / sqrt(D) where none is given."""
    return 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)


# Torch pair


def _shifts(seq, kernel_size, dilation):
    """For each neighbour (n, rows that have it, where theirs are)."""
    for n in range(kernel_size):
        shift = (n - kernel_size // 2) * dilation
        first, last = max(0, -shift), min(seq, seq - shift)
        if first < last:
            yield n, slice(first, last), slice(first + shift, last + shift)


def _forward(q, k, v, kernel_size, dilation, scale):
    """-> (o, lse)."""
    wide_q, wide_k, wide_v = upcast(q), upcast(k), upcast(v)
    s = wide_q.new_full((*q.shape[:-1], kernel_size), float("-inf"))
    for n, mine, theirs in _shifts(q.shape[-2], kernel_size, dilation):
        s[..., mine, n] = (wide_q[..., mine, :] * wide_k[..., theirs, :]).sum(-1).mul_(scale)
    lse = s.logsumexp(-1)
    p = s.softmax(-1)  # exp(s - lse) would carry the rounding of a large lse
    o = torch.zeros_like(wide_q)
    for n, mine, theirs in _shifts(q.shape[-2], kernel_size, dilation):
        o[..., mine, :] += p[..., mine, n, None] * wide_v[..., theirs, :]
    return o.to(q.dtype), lse


def _backward(do, q, k, v, o, lse, kernel_size, dilation, scale):
    wide_q, wide_k, wide_v, wide_do = upcast(q), upcast(k), upcast(v), upcast(do)
    delta = (wide_do * o).sum(-1)
    dq, dk, dv = (torch.zeros_like(wide_q) for _ in range(3))
    for _, mine, theirs in _shifts(q.shape[-2], kernel_size, dilation):
        q_i, k_j, v_j, do_i = (
            wide_q[..., mine, :],
            wide_k[..., theirs, :],
            wide_v[..., theirs, :],
            wide_do[..., mine, :],
        )
        p = (q_i * k_j).sum(-1).mul_(scale).sub_(lse[..., mine]).exp_()
        ds = (do_i * v_j).sum(-1).sub_(delta[..., mine]).mul_(p).mul_(scale)[..., None]
        dq[..., mine, :] += ds * k_j
        dk[..., theirs, :] += ds * q_i
        dv[..., theirs, :] += p[..., None] * do_i
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


TORCH = Kernels(_forward, _backward)


# Autograd


class LigerFusedNeighborhoodAttentionFunction(torch.autograd.Function):
    """apply(query, key, value, kernel_size=7, dilation=1, scale=None) -> o."""

    @staticmethod
    def forward(ctx, query, key, value, kernel_size=7, dilation=1, scale=None):
        check(query, key, value, kernel_size, dilation)
        q, k, v = query.contiguous(), key.contiguous(), value.contiguous()
        ctx.options = kernel_size, dilation, scale_of(scale, q)
        o, lse = kernels("fused_neighborhood_attention", q).forward(q, k, v, *ctx.options)
        ctx.save_for_backward(q, k, v, o, lse)
        return outputs(o)

    @staticmethod
    def backward(ctx, do):
        saved = ctx.saved_tensors
        dq, dk, dv = kernels("fused_neighborhood_attention", do).backward(do.contiguous(), *saved, *ctx.options)
        return dq, dk, dv, None, None, None


# Functional


def liger_fused_neighborhood_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kernel_size: int = 7,
    dilation: int = 1,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of each query to the kernel_size keys around it, dilation apart -> (B, H, S, D) like query.

    query, key, value: (B, H, S, D), one float dtype; near the ends a query has fewer keys. kernel_size: odd. scale: of
    the scores, default 1 / sqrt(D). Raises ValueError for shapes, dtypes, devices or options that do not fit
    (arXiv:2204.07143, arXiv:2209.15001).
    """
    return LigerFusedNeighborhoodAttentionFunction.apply(query, key, value, kernel_size, dilation, scale)


def check(query, key, value, kernel_size, dilation) -> None:
    """ValueError for what cannot be honoured."""
    check_window(kernel_size, dilation)
    kinds = [(t.dtype, t.device, tuple(t.shape)) for t in (query, key, value)]
    if query.dim() != 4 or not query.is_floating_point() or any([kind != kinds[0] for kind in kinds]):
        raise ValueError(
            f"fused_neighborhood_attention: query, key, value must be (B, H, S, D) of one float dtype, got {kinds}"
        )


def check_window(kernel_size, dilation) -> None:
    """ValueError for a window that is none, or has no middle."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"fused_neighborhood_attention: kernel_size must be odd and positive, got {kernel_size}")
    if dilation < 1:
        raise ValueError(f"fused_neighborhood_attention: dilation must be at least 1, got {dilation}")


# Contract


def _case(shape, dtype, device, **options):
    return Case(tuple([torch.randn(shape, dtype=dtype, device=device) for _ in range(3)]), options)


def _cases(dtype, device):
    return [
        _case((2, 3, 17, 8), dtype, device),
        _case((1, 2, 21, 5), dtype, device, kernel_size=5, dilation=3, scale=0.7),
        _case((1, 1, 4, 16), dtype, device, kernel_size=9),
        _case((1, 2, 3, 8), dtype, device, kernel_size=3, dilation=5),
        _case((2, 1, 1, 3), dtype, device, kernel_size=1),
        _case((2, 2, 0, 8), dtype, device),
    ]


def _timed(dtype, device):
    return {"4x32x4096x128": _case((4, 32, 4096, 128), dtype, device)}


CONTRACT = Contract(
    call=lambda query, key, value, kernel_size=7, dilation=1, scale=None: LigerFusedNeighborhoodAttentionFunction.apply(
        query, key, value, kernel_size, dilation, scale
    ),
    reference=reference,
    cases=_cases,
    timed=_timed,
    bytes_moved=lambda q, *rest, **options: 12 * q.numel() * q.element_size(),
)
