"""Sparsemax in Triton; the mathematics is in liger_kernel.ops.sparsemax.

sum max(x - tau, 0) - 1 is convex in tau and made of straight pieces, so Newton's steps from max(x) - 1, which is left
of its zero, reach it from the left in finitely many: each drops elements from the support, until one drops none.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from liger_kernel.backends import device_of
from liger_kernel.ops.core import Kernels
from liger_kernel.ops.kernels.blocks import RowTiles, as_rows, int64, launch, load_tile, programs_for

# Kernels: Capital = memory, lower case = registers, ALL_CAPS = compile time.


@triton.jit
def _above(x, count, total):
    """How many elements of each row lie above (total - 1) / count, and their sum, as columns."""
    inside = x * count > total - 1.0
    size = tl.sum(tl.where(inside, 1.0, 0.0), axis=1)[:, None]
    return size, tl.sum(tl.where(inside, x, 0.0), axis=1)[:, None]


@triton.jit
def _above_in_memory(X, N, live, largest, count, total, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The same of rows at X that do not fit one block, relative to their largest element."""
    row = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    sizes = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    sums = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, N, BLOCK):
        mask = live & (start + cols < N)
        x = tl.load(X + row * N + start + cols, mask=mask, other=float("-inf")).to(tl.float32) - largest
        inside = x * count > total - 1.0
        sizes += tl.where(inside, 1.0, 0.0)
        sums += tl.where(inside, x, 0.0)
    return tl.sum(sizes, axis=1)[:, None], tl.sum(sums, axis=1)[:, None]


@triton.jit
def _above_tau(x, count, total):
    """x - tau, or 0 outside of the support; NaN stays."""
    tau = (total - 1.0) / tl.maximum(count, 1.0)
    return tl.where((x * count <= total - 1.0) | (x < tau), 0.0, x - tau)


@triton.jit(do_not_specialize=["R"])
def _forward_kernel(X, Y, R, N, ROWS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr):
    row = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    for tile in range(tl.program_id(0), tl.cdiv(R, ROWS), tl.num_programs(0)):
        base = int64(tile) * ROWS * N
        live = tile * ROWS + row < R
        one = tl.full((ROWS, 1), 1.0, dtype=tl.float32)
        zero = tl.zeros((ROWS, 1), dtype=tl.float32)
        if LOOP:
            top = tl.full((ROWS, BLOCK), float("-inf"), dtype=tl.float32)
            nans = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
            for start in range(0, N, BLOCK):
                mask = live & (start + cols < N)
                x = tl.load(X + base + row * N + start + cols, mask=mask, other=float("-inf")).to(tl.float32)
                top = tl.maximum(top, x)
                nans += tl.where(x != x, 1.0, 0.0)
        else:
            mask = live & (cols < N)
            x = tl.load(X + base + row * N + cols, mask=mask, other=float("-inf")).to(tl.float32)
            top = x
            nans = tl.where(x != x, 1.0, 0.0)
        largest = tl.where(live, tl.max(top, axis=1)[:, None], 0.0)
        largest = tl.where(tl.sum(nans, axis=1)[:, None] > 0.0, float("nan"), largest)  # a maximum passes over NaN
        if LOOP:
            count, total = _above_in_memory(X + base, N, live, largest, one, zero, ROWS, BLOCK)
        else:
            x -= largest
            count, total = _above(x, one, zero)
        dropped = 1.0
        while dropped > 0.0:
            if LOOP:
                size, remains = _above_in_memory(X + base, N, live, largest, count, total, ROWS, BLOCK)
            else:
                size, remains = _above(x, count, total)
            fewer = size < count  # more, by rounding, would bring elements back without end
            dropped = tl.sum(tl.sum(tl.where(fewer, count - size, 0.0), axis=1), axis=0)
            count = tl.where(fewer, size, count)
            total = tl.where(fewer, remains, total)
        if LOOP:
            for start in range(0, N, BLOCK):
                mask = live & (start + cols < N)
                x = tl.load(X + base + row * N + start + cols, mask=mask, other=0.0).to(tl.float32) - largest
                y = _above_tau(x, count, total).to(Y.dtype.element_ty)
                tl.store(Y + base + row * N + start + cols, y, mask=mask)
        else:
            tl.store(Y + base + row * N + cols, _above_tau(x, count, total).to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _above_in_row(X, N, largest, count, total, BLOCK: tl.constexpr):
    """_above of the row at X, relative to its largest element, as scalars."""
    cols = tl.arange(0, BLOCK)
    sizes = tl.zeros((BLOCK,), dtype=tl.float32)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, N, BLOCK):
        x = tl.load(X + start + cols, mask=start + cols < N, other=float("-inf")).to(tl.float32) - largest
        inside = x * count > total - 1.0
        sizes += tl.where(inside, 1.0, 0.0)
        sums += tl.where(inside, x, 0.0)
    return tl.sum(sizes, axis=0), tl.sum(sums, axis=0)


@triton.jit(do_not_specialize=["R"])
def _forward_row_kernel(X, Y, R, N, BLOCK: tl.constexpr):
    """For a core without threads: a row per turn and its steps in scalars, since no while there carries a vector."""
    cols = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), R, tl.num_programs(0)):
        base = int64(row) * N
        top = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
        nans = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, N, BLOCK):
            x = tl.load(X + base + start + cols, mask=start + cols < N, other=float("-inf")).to(tl.float32)
            top = tl.maximum(top, x)
            nans += tl.where(x != x, 1.0, 0.0)
        largest = tl.where(tl.sum(nans, axis=0) > 0.0, float("nan"), tl.max(top, axis=0))
        count, total = _above_in_row(X + base, N, largest, 1.0, 0.0, BLOCK)
        dropped = 1.0
        while dropped > 0.0:
            size, remains = _above_in_row(X + base, N, largest, count, total, BLOCK)
            fewer = size < count
            dropped = tl.where(fewer, count - size, 0.0)
            count = tl.where(fewer, size, count)
            total = tl.where(fewer, remains, total)
        for start in range(0, N, BLOCK):
            mask = start + cols < N
            x = tl.load(X + base + start + cols, mask=mask, other=0.0).to(tl.float32) - largest
            tl.store(Y + base + start + cols, _above_tau(x, count, total).to(Y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["R"])
def _backward_kernel(dY, Y, dX, R, N, ROWS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr):
    row = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    for tile in range(tl.program_id(0), tl.cdiv(R, ROWS), tl.num_programs(0)):
        base = int64(tile) * ROWS * N
        if LOOP:
            live = tile * ROWS + row < R
            counts = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
            sums = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
            for start in range(0, N, BLOCK):
                mask = live & (start + cols < N)
                y = tl.load(Y + base + row * N + start + cols, mask=mask, other=0.0).to(tl.float32)
                dy = tl.load(dY + base + row * N + start + cols, mask=mask, other=0.0).to(tl.float32)
                counts += tl.where(y > 0.0, 1.0, 0.0)
                sums += tl.where(y > 0.0, dy, 0.0)
            mean = tl.sum(sums, axis=1)[:, None] / tl.maximum(tl.sum(counts, axis=1)[:, None], 1.0)
            for start in range(0, N, BLOCK):
                mask = live & (start + cols < N)
                y = tl.load(Y + base + row * N + start + cols, mask=mask, other=0.0).to(tl.float32)
                dy = tl.load(dY + base + row * N + start + cols, mask=mask, other=0.0).to(tl.float32)
                dx = tl.where(y > 0.0, dy - mean, 0.0)
                tl.store(dX + base + row * N + start + cols, dx.to(dX.dtype.element_ty), mask=mask)
        else:
            y = load_tile(Y, tile, R, N, ROWS, BLOCK).to(tl.float32)
            dy = load_tile(dY, tile, R, N, ROWS, BLOCK).to(tl.float32)
            count = tl.sum(tl.where(y > 0.0, 1.0, 0.0), axis=1)[:, None]
            mean = tl.sum(tl.where(y > 0.0, dy, 0.0), axis=1)[:, None] / tl.maximum(count, 1.0)
            dx = tl.where(y > 0.0, dy - mean, 0.0)
            mask = (tile * ROWS + row < R) & (cols < N)
            tl.store(dX + base + row * N + cols, dx.to(dX.dtype.element_ty), mask=mask)


# Launchers


def _launch(kernel, tiles, x, *tensors):
    if x.numel():
        rows, cols = as_rows(x)
        tiles = tiles or RowTiles.choose(rows, cols, x.device, live=4)
        launch(
            kernel, tiles.programs, x.device, *tensors, rows, cols,
            ROWS=tiles.rows, BLOCK=tiles.block, LOOP=tiles.loop, num_warps=tiles.num_warps,
        )  # fmt: skip


def sparsemax_forward(x, tiles=None):
    """x: (..., N) contiguous -> y like x."""
    y = torch.empty_like(x)
    if x.numel() and not device_of(x.device).threads:
        rows, cols = as_rows(x)
        block = (tiles or RowTiles.choose(rows, cols, x.device, live=4)).block
        launch(_forward_row_kernel, programs_for(rows, x.device), x.device, x, y, rows, cols, BLOCK=block, num_warps=1)
    else:
        _launch(_forward_kernel, tiles, x, x, y)
    return y


def sparsemax_backward(dy, y, tiles=None):
    """dy, y: (..., N) contiguous -> dx like y."""
    dx = torch.empty_like(y)
    _launch(_backward_kernel, tiles, y, dy, y, dx)
    return dx


KERNELS = Kernels(sparsemax_forward, sparsemax_backward)
