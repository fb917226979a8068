"""Softmax in Triton; the mathematics is in liger_kernel.ops.softmax."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from liger_kernel.backends import device_of
from liger_kernel.ops.core import Kernels
from liger_kernel.ops.kernels.blocks import RowTiles, as_rows, exp, int64, launch, load_tile

# Kernels: Capital = memory, lower case = registers, ALL_CAPS = compile time.


@triton.jit(do_not_specialize=["R"])
def _forward_kernel(X, Y, R, N, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    for tile in range(tl.program_id(0), tl.cdiv(R, ROWS), tl.num_programs(0)):
        base = int64(tile) * ROWS * N
        mask = (tile * ROWS + row < R) & (cols < N)
        x = tl.load(X + base + row * N + cols, mask=mask, other=float("-inf")).to(tl.float32)
        e = exp(x - tl.max(x, axis=1)[:, None])
        y = e * (1 / tl.sum(e, axis=1)[:, None])
        tl.store(Y + base + row * N + cols, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["R"])
def _backward_kernel(dY, Y, dX, R, N, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    for tile in range(tl.program_id(0), tl.cdiv(R, ROWS), tl.num_programs(0)):
        base = int64(tile) * ROWS * N
        mask = (tile * ROWS + row < R) & (cols < N)
        y = load_tile(Y, tile, R, N, ROWS, BLOCK).to(tl.float32)
        dy = load_tile(dY, tile, R, N, ROWS, BLOCK).to(tl.float32)
        dot = tl.sum(dy * y, axis=1)[:, None]
        tl.store(dX + base + row * N + cols, (y * (dy - dot)).to(dX.dtype.element_ty), mask=mask)


# A row that does not fit one block is walked twice. The second walk goes backwards: it begins with what was read last,
# which the cache still holds where it does not hold whole rows.


@triton.jit(do_not_specialize=["R"])
def _forward_walk_kernel(X, Y, R, N, BLOCK: tl.constexpr, VEC: tl.constexpr):
    LANES: tl.constexpr = BLOCK // VEC  # each keeps its own maximum and sum
    lane = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    cols = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), R, tl.num_programs(0)):
        base = int64(row) * N
        top = tl.full((LANES,), -3.4028234663852886e38, dtype=tl.float32)  # finite: -inf minus -inf is NaN
        total = tl.zeros((LANES,), dtype=tl.float32)
        for start in range(0, N, BLOCK):
            mask = start + lane < N
            x = tl.load(X + base + start + lane, mask=mask, other=float("-inf"), eviction_policy="evict_last")
            x = x.to(tl.float32)
            higher = tl.maximum(top, tl.max(x, axis=1))
            total = total * exp(top - higher) + tl.sum(exp(x - higher[:, None]), axis=1)
            top = higher
        largest = tl.max(top, axis=0)
        scale = 1 / tl.sum(total * exp(top - largest), axis=0)
        end = tl.cdiv(N, BLOCK) * BLOCK
        for back in range(BLOCK, end + BLOCK, BLOCK):
            start = end - back
            mask = start + cols < N
            x = tl.load(X + base + start + cols, mask=mask, other=float("-inf"), eviction_policy="evict_first")
            y = exp(x.to(tl.float32) - largest) * scale
            tl.store(Y + base + start + cols, y.to(Y.dtype.element_ty), mask=mask, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["R"])
def _backward_walk_kernel(dY, Y, dX, R, N, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), R, tl.num_programs(0)):
        base = int64(row) * N
        products = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, N, BLOCK):
            mask = start + cols < N
            y = tl.load(Y + base + start + cols, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
            dy = tl.load(dY + base + start + cols, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
            products += dy * y
        dot = tl.sum(products, axis=0)
        end = tl.cdiv(N, BLOCK) * BLOCK
        for back in range(BLOCK, end + BLOCK, BLOCK):
            start = end - back
            mask = start + cols < N
            y = tl.load(Y + base + start + cols, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
            dy = tl.load(dY + base + start + cols, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
            dx = (y * (dy - dot)).to(dX.dtype.element_ty)
            tl.store(dX + base + start + cols, dx, mask=mask, eviction_policy="evict_first")


# Launchers


def _choose(rows, cols, device, live):
    """A row that fits is one tile. Of those that do not, a core walks one at a time, so that the cache holds them."""
    tiles = RowTiles.choose(rows, cols, device, live=live)
    if not tiles.loop:
        return tiles
    tiles = RowTiles.choose(rows, cols, device, live=4)
    return replace(tiles, programs=min(tiles.programs, device_of(device).cores(device)))


def _choose_forward(rows, cols, x):
    tiles, backend = _choose(rows, cols, x.device, live=2), device_of(x.device)
    lanes = tiles.num_warps * backend.warp_width
    if tiles.loop or not backend.threads or x.element_size() > 2 or lanes < 1024 or tiles.block < 32 * lanes:
        return tiles
    # Such a program fills a core, and the memory rests while it computes. Three that walk, of half the warps, do not
    # leave it idle: 3.18 TB/s, with the next row under way 3.54, walking 3.90 (H200 bf16, 8192x32768, 2026-11-29).
    return RowTiles(1, tiles.block // 4, True, tiles.num_warps // 2, min(rows, 3 * backend.cores(x.device)))


def softmax_forward(x, tiles=None):
    """x: (..., N) contiguous -> y like x."""
    rows, cols = as_rows(x)
    y = torch.empty_like(x)
    if not x.numel():
        return y
    tiles = tiles or _choose_forward(rows, cols, x)
    if tiles.loop:
        vec = 16 // x.element_size() if device_of(x.device).threads else tiles.block
        _launch(_forward_walk_kernel, tiles, x.device, x, y, rows, cols, BLOCK=tiles.block, VEC=vec)
    else:
        meta = dict(ROWS=tiles.rows, BLOCK=tiles.block)
        _launch(_forward_kernel, tiles, x.device, x, y, rows, cols, **meta)
    return y


def softmax_backward(dy, y, tiles=None):
    """dy, y: (..., N) contiguous -> dx like y."""
    rows, cols = as_rows(y)
    dx = torch.empty_like(y)
    if not y.numel():
        return dx
    # Two tiles of a 2-byte dtype take the registers of one in fp32.
    tiles = tiles or _choose(rows, cols, y.device, live=2 if y.element_size() <= 2 else 4)
    if tiles.loop:
        _launch(_backward_walk_kernel, tiles, y.device, dy, y, dx, rows, cols, BLOCK=tiles.block)
    else:
        meta = dict(ROWS=tiles.rows, BLOCK=tiles.block)
        _launch(_backward_kernel, tiles, y.device, dy, y, dx, rows, cols, **meta)
    return dx


def _launch(kernel, tiles, device, *args, **meta):
    launch(kernel, tiles.programs, device, *args, **meta, num_warps=tiles.num_warps)


KERNELS = Kernels(softmax_forward, softmax_backward)
