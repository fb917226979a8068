"""Attention residuals in Triton; the mathematics is in liger_kernel.ops.attn_res.

A program takes a tile of rows through all blocks: its logits are a register tile of ROWS x BLOCKS, and the forward
weighs each block as it reads it, rescaling what it has summed when a larger logit comes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from liger_kernel.ops.core import Kernels
from liger_kernel.ops.kernels.blocks import RowTiles, exp, int64, launch, power_of_2_from, sum_rows

# Kernels: Capital = memory, lower case = registers, ALL_CAPS = compile time.


@triton.jit
def _load(V, i, tile, start, R, N, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows tile * ROWS ... of block i from column `start`, as (ROWS, BLOCK) in fp32, zeros outside."""
    row = tl.arange(0, ROWS)[:, None]
    cols = start + tl.arange(0, BLOCK)[None, :]
    base = (int64(i) * R + int64(tile) * ROWS) * N
    return tl.load(V + base + row * N + cols, mask=(tile * ROWS + row < R) & (cols < N), other=0.0).to(tl.float32)


@triton.jit
def _store(V, v, i, tile, start, R, N, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.arange(0, ROWS)[:, None]
    cols = start + tl.arange(0, BLOCK)[None, :]
    base = (int64(i) * R + int64(tile) * ROWS) * N
    tl.store(V + base + row * N + cols, v.to(V.dtype.element_ty), mask=(tile * ROWS + row < R) & (cols < N))


@triton.jit
def _direction(Query, Norm, start, N, BLOCK: tl.constexpr):
    """u as (1, BLOCK)."""
    cols = start + tl.arange(0, BLOCK)[None, :]
    query = tl.load(Query + cols, mask=cols < N, other=0.0).to(tl.float32)
    return query * tl.load(Norm + cols, mask=cols < N, other=0.0).to(tl.float32)


@triton.jit
def _put(tile, i, value, BLOCKS: tl.constexpr):
    """tile (ROWS, BLOCKS) with value (ROWS, 1) in column i."""
    return tl.where(tl.arange(0, BLOCKS)[None, :] == i, value, tile)


@triton.jit
def _take(tile, i, BLOCKS: tl.constexpr):
    """Column i of a tile (ROWS, BLOCKS), as (ROWS, 1)."""
    return tl.sum(tl.where(tl.arange(0, BLOCKS)[None, :] == i, tile, 0.0), axis=1)[:, None]


@triton.jit(do_not_specialize=["R"])
def _forward_kernel(
    V, Query, Norm, Out, Alpha, Rstd, R, N, n_blocks,
    EPS: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, ROWS)[:, None]
    block = tl.arange(0, BLOCKS)[None, :]
    for tile in range(tl.program_id(0), tl.cdiv(R, ROWS), tl.num_programs(0)):
        logits = tl.full((ROWS, BLOCKS), float("-inf"), tl.float32)
        rstds = tl.zeros((ROWS, BLOCKS), dtype=tl.float32)
        highest = tl.full((ROWS, 1), float("-inf"), tl.float32)
        if not LOOP:
            u = _direction(Query, Norm, 0, N, BLOCK)
            out = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
            total = tl.zeros((ROWS, 1), dtype=tl.float32)
        for i in range(n_blocks):
            if LOOP:
                squares = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
                products = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
                for start in range(0, N, BLOCK):
                    v = _load(V, i, tile, start, R, N, ROWS, BLOCK)
                    squares += v * v
                    products += v * _direction(Query, Norm, start, N, BLOCK)
            else:
                v = _load(V, i, tile, 0, R, N, ROWS, BLOCK)
                squares = v * v
                products = v * u
            rstd = tl.rsqrt(tl.sum(squares, axis=1)[:, None] / N + EPS)
            logit = tl.sum(products, axis=1)[:, None] * rstd
            rstds = _put(rstds, i, rstd, BLOCKS)
            logits = _put(logits, i, logit, BLOCKS)
            if not LOOP:  # the largest weighs 1 exactly: a difference of logits may be contracted to one of products
                lesser = exp(-tl.abs(logit - highest))
                kept = tl.where(logit > highest, lesser, 1.0)
                weight = tl.where(logit > highest, 1.0, lesser)
                out = out * kept + v * weight
                total = total * kept + weight
            highest = tl.maximum(highest, logit)
        weights = exp(logits - highest)
        alpha = weights / tl.sum(weights, axis=1)[:, None]
        at = int64(tile) * ROWS + row + block.to(tl.int64) * R
        mask = (tile * ROWS + row < R) & (block < n_blocks)
        tl.store(Alpha + at, alpha, mask=mask)
        tl.store(Rstd + at, rstds, mask=mask)
        if LOOP:
            for start in range(0, N, BLOCK):
                out = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
                for i in range(n_blocks):
                    out += _take(alpha, i, BLOCKS) * _load(V, i, tile, start, R, N, ROWS, BLOCK)
                _store(Out, out, 0, tile, start, R, N, ROWS, BLOCK)
        else:
            _store(Out, out / total, 0, tile, 0, R, N, ROWS, BLOCK)


@triton.jit(do_not_specialize=["R"])
def _backward_kernel(
    dOut, V, Query, Norm, Alpha, Rstd, dV, dU, R, N, n_blocks,
    BLOCKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    """dU (programs, N): each program's share of du."""
    pid = tl.program_id(0)
    row = tl.arange(0, ROWS)[:, None]
    block = tl.arange(0, BLOCKS)[None, :]
    cols = tl.arange(0, BLOCK)[None, :]
    share = pid.to(tl.int64) * N
    if not LOOP:
        u = _direction(Query, Norm, 0, N, BLOCK)
        du = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for tile in range(pid, tl.cdiv(R, ROWS), tl.num_programs(0)):
        at = int64(tile) * ROWS + row + block.to(tl.int64) * R
        mask = (tile * ROWS + row < R) & (block < n_blocks)
        alpha = tl.load(Alpha + at, mask=mask, other=0.0)
        rstd = tl.load(Rstd + at, mask=mask, other=0.0)
        along = tl.zeros((ROWS, BLOCKS), dtype=tl.float32)  # <u, v_i>
        g = tl.zeros((ROWS, BLOCKS), dtype=tl.float32)  # <dh, v_i> at first
        if not LOOP:
            dh = _load(dOut, 0, tile, 0, R, N, ROWS, BLOCK)
        for i in range(n_blocks):
            if LOOP:
                sum_u = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
                sum_dh = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
                for start in range(0, N, BLOCK):
                    v = _load(V, i, tile, start, R, N, ROWS, BLOCK)
                    sum_u += v * _direction(Query, Norm, start, N, BLOCK)
                    sum_dh += v * _load(dOut, 0, tile, start, R, N, ROWS, BLOCK)
            else:
                v = _load(V, i, tile, 0, R, N, ROWS, BLOCK)
                sum_u = v * u
                sum_dh = v * dh
            along = _put(along, i, tl.sum(sum_u, axis=1)[:, None], BLOCKS)
            g = _put(g, i, tl.sum(sum_dh, axis=1)[:, None], BLOCKS)
        g = alpha * (g - tl.sum(alpha * g, axis=1)[:, None])
        slope = g * rstd
        pull = slope * rstd * rstd * along / N
        if LOOP:
            for start in range(0, N, BLOCK):
                direction = _direction(Query, Norm, start, N, BLOCK)
                dh_part = _load(dOut, 0, tile, start, R, N, ROWS, BLOCK)
                terms = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
                for i in range(n_blocks):
                    v = _load(V, i, tile, start, R, N, ROWS, BLOCK)
                    tilt = _take(slope, i, BLOCKS)
                    dv = _take(alpha, i, BLOCKS) * dh_part + tilt * direction - _take(pull, i, BLOCKS) * v
                    _store(dV, dv, i, tile, start, R, N, ROWS, BLOCK)
                    terms += tilt * v
                mine = dU + share + start + cols  # in memory: no row of the sum fits a block
                summed = tl.load(mine, mask=start + cols < N, other=0.0) + tl.sum(terms, axis=0)[None, :]
                tl.store(mine, summed, mask=start + cols < N)
            tl.debug_barrier()  # the next row reads these sums
        else:
            for i in range(n_blocks):
                v = _load(V, i, tile, 0, R, N, ROWS, BLOCK)
                tilt = _take(slope, i, BLOCKS)
                dv = (
                    _take(alpha, i, BLOCKS) * dh
                    + tilt * _direction(Query, Norm, 0, N, BLOCK)
                    - _take(pull, i, BLOCKS) * v
                )
                _store(dV, dv, i, tile, 0, R, N, ROWS, BLOCK)
                du += tilt * v
    if not LOOP:
        tl.store(dU + share + cols, tl.sum(du, axis=0)[None, :], mask=cols < N)


# Launchers


def attn_res_forward(v, w_query, w_norm, eps, tiles=None):
    """v: (N, R, D), w_query, w_norm: (D,), contiguous -> h (R, D) like v, alpha and rstd (N, R) in fp32."""
    n_blocks, rows, cols = v.shape
    out = torch.empty(rows, cols, dtype=v.dtype, device=v.device)
    alpha, rstd = (torch.empty(n_blocks, rows, dtype=torch.float32, device=v.device) for _ in range(2))
    if v.numel():
        # Of short rows the tiles of ROWS x BLOCKS, and of ROWS x 1, are no longer small beside one of ROWS x BLOCK.
        live = 4 if cols > 1024 else 16 if cols > 512 else 32
        tiles = tiles or RowTiles.choose(rows, cols, v.device, live)
        launch(
            _forward_kernel, tiles.programs, v.device, v, w_query, w_norm, out, alpha, rstd, rows, cols, n_blocks,
            EPS=eps, BLOCKS=power_of_2_from(n_blocks), ROWS=tiles.rows, BLOCK=tiles.block, LOOP=tiles.loop,
            num_warps=tiles.num_warps,
        )  # fmt: skip
    return out, alpha, rstd


def attn_res_backward(dh, v, w_query, w_norm, alpha, rstd, tiles=None):
    """dh: (R, D), v: (N, R, D), contiguous -> dv like v, du (D,) in fp32, of w_query * w_norm."""
    n_blocks, rows, cols = v.shape
    dv = torch.empty_like(v)
    if not v.numel():
        return dv, torch.zeros(cols, dtype=torch.float32, device=v.device)
    # Live are v, dh, u, du, dv and what is summed, beside the tiles of ROWS x BLOCKS: a block of 8192 would spill.
    tiles = tiles or RowTiles.choose(rows, cols, v.device, live=9, walks=True)
    make = torch.zeros if tiles.loop else torch.empty
    partial = make(tiles.programs, cols, dtype=torch.float32, device=v.device)
    launch(
        _backward_kernel, tiles.programs, v.device,
        dh, v, w_query, w_norm, alpha, rstd, dv, partial, rows, cols, n_blocks,
        BLOCKS=power_of_2_from(n_blocks), ROWS=tiles.rows, BLOCK=tiles.block, LOOP=tiles.loop,
        num_warps=tiles.num_warps,
    )  # fmt: skip
    return dv, sum_rows(partial, torch.float32)


KERNELS = Kernels(attn_res_forward, attn_res_backward)
