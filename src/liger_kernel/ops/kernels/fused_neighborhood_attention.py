"""Neighbourhood attention in Triton; the mathematics is in liger_kernel.ops.fused_neighborhood_attention.

A tile is some neighbouring rows of one head. Its window is walked neighbour by neighbour: the rows of all of them are
the same few lines of memory, so that all but the first walk find them in the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from liger_kernel.backends import device_of
from liger_kernel.ops.core import Kernels
from liger_kernel.ops.kernels.blocks import cdiv, exp, int64, launch, power_of_2_from, programs_for

# Kernels: T heads of S rows of N columns. Scale is a tensor of one element.


@triton.jit
def _load(X, base, at, cols, live, N):
    """The rows that lie `at` rows after base, as (ROWS, BLOCK) in fp32; zeros outside."""
    mask = live[:, None] & (cols < N)[None, :]
    return tl.load(X + base + at[:, None] * N + cols[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(X, base, at, cols, live, N, x):
    mask = live[:, None] & (cols < N)[None, :]
    tl.store(X + base + at[:, None] * N + cols[None, :], x.to(X.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "S"])
def _forward_kernel(Q, K, V, O, Lse, Scale, T, S, N, WINDOW: tl.constexpr, DILATION: tl.constexpr,
                    ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    scale = tl.load(Scale)
    n_tiles = tl.cdiv(S, ROWS)
    for tile in range(tl.program_id(0), T * n_tiles, tl.num_programs(0)):
        head = tile // n_tiles
        start = (tile - head * n_tiles) * ROWS
        first = int64(head) * S + int64(start)
        base = first * N
        here = start + row < S
        q = _load(Q, base, row, cols, here, N) * scale
        top = tl.full((ROWS,), -3.4028234663852886e38, dtype=tl.float32)  # finite: -inf minus -inf is NaN
        total = tl.zeros((ROWS,), dtype=tl.float32)
        o = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for n in range(WINDOW):
            other = row + (n - WINDOW // 2) * DILATION
            live = here & (start + other >= 0) & (start + other < S)
            k = _load(K, base, other, cols, live, N)
            v = _load(V, base, other, cols, live, N)
            s = tl.where(live, tl.sum(q * k, axis=1), float("-inf"))
            higher = tl.maximum(top, s)
            shrink = exp(top - higher)
            e = exp(s - higher)
            total = total * shrink + e
            o = o * shrink[:, None] + e[:, None] * v
            top = higher
        total = tl.where(here, total, 1.0)
        _store(O, base, row, cols, here, N, o / total[:, None])
        tl.store(Lse + first + row, top + tl.log(total), mask=here)


@triton.jit(do_not_specialize=["T", "S"])
def _backward_kernel(dO, Q, K, V, O, Lse, Scale, dQ, dK, dV, T, S, N, WINDOW: tl.constexpr, DILATION: tl.constexpr,
                     ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Of each row: as a query its dq, as a key its dk and dv, both from the same neighbours."""
    row = tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK)
    scale = tl.load(Scale)
    n_tiles = tl.cdiv(S, ROWS)
    for tile in range(tl.program_id(0), T * n_tiles, tl.num_programs(0)):
        head = tile // n_tiles
        start = (tile - head * n_tiles) * ROWS
        first = int64(head) * S + int64(start)
        base = first * N
        here = start + row < S
        q = _load(Q, base, row, cols, here, N) * scale
        k = _load(K, base, row, cols, here, N) * scale
        v = _load(V, base, row, cols, here, N)
        do = _load(dO, base, row, cols, here, N)
        delta = tl.sum(do * _load(O, base, row, cols, here, N), axis=1)
        lse = tl.load(Lse + first + row, mask=here, other=0.0)
        dq = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        dk = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        dv = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for n in range(WINDOW):
            other = row + (n - WINDOW // 2) * DILATION
            live = here & (start + other >= 0) & (start + other < S)
            their_q = _load(Q, base, other, cols, live, N)
            their_k = _load(K, base, other, cols, live, N)
            their_do = _load(dO, base, other, cols, live, N)
            p = tl.where(live, exp(tl.sum(q * their_k, axis=1) - lse), 0.0)
            dp = tl.sum(do * _load(V, base, other, cols, live, N), axis=1)
            dq += (p * (dp - delta))[:, None] * their_k
            their_delta = tl.sum(their_do * _load(O, base, other, cols, live, N), axis=1)
            their_lse = tl.load(Lse + first + other, mask=live, other=0.0)
            p = tl.where(live, exp(tl.sum(their_q * k, axis=1) - their_lse), 0.0)
            dp = tl.sum(their_do * v, axis=1)
            dk += (p * (dp - their_delta))[:, None] * their_q
            dv += p[:, None] * their_do
        _store(dQ, base, row, cols, here, N, dq * scale)
        _store(dK, base, row, cols, here, N, dk * scale)
        _store(dV, base, row, cols, here, N, dv)


# Launchers


def _launch(kernel, q, live, kernel_size, dilation, scale, *tensors, into=()):
    batch, heads, seq, n_cols = q.shape
    if not q.numel():
        return
    backend = device_of(q.device)
    block = power_of_2_from(n_cols)
    rows = max(1, min(2048, backend.max_block(live)) // block)
    num_warps = min(max(rows * block // (backend.warp_width * 16), 1), backend.max_warps)
    factor = torch.full((1,), scale, dtype=torch.float32, device=q.device)
    launch(
        kernel, programs_for(batch * heads * cdiv(seq, rows), q.device), q.device, *tensors, factor, *into,
        batch * heads, seq, n_cols,
        WINDOW=kernel_size, DILATION=dilation, ROWS=rows, BLOCK=block, num_warps=num_warps,
    )  # fmt: skip


def neighborhood_forward(q, k, v, kernel_size, dilation, scale):
    """q, k, v: (B, H, S, D) contiguous -> (o like q, lse (B, H, S) in fp32)."""
    o, lse = torch.empty_like(q), torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    _launch(_forward_kernel, q, 4, kernel_size, dilation, scale, q, k, v, o, lse)
    return o, lse


def neighborhood_backward(do, q, k, v, o, lse, kernel_size, dilation, scale):
    """All contiguous -> (dq, dk, dv) like q."""
    into = tuple([torch.empty_like(q) for _ in range(3)])
    _launch(_backward_kernel, q, 12, kernel_size, dilation, scale, do, q, k, v, o, lse, into=into)
    return into


KERNELS = Kernels(neighborhood_forward, neighborhood_backward)
