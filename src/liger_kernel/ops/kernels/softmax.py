"""Softmax in Triton; the mathematics is in liger_kernel.ops.softmax."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from liger_kernel.ops.core import Kernels
from liger_kernel.ops.kernels.blocks import RowTiles, as_rows, int64, launch

# Kernels: Capital = memory, lower case = registers, ALL_CAPS = compile time.


@triton.jit(do_not_specialize=["R"])
def _forward_kernel(X, Y, R, N, ROWS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr):
    row = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    for tile in range(tl.program_id(0), tl.cdiv(R, ROWS), tl.num_programs(0)):
        base = int64(tile) * ROWS * N
        live = tile * ROWS + row < R
        if LOOP:
            # Each lane keeps its own maximum and sum; starts at the lowest fp32, as -inf minus -inf is NaN.
            top = tl.full((ROWS, BLOCK), -3.4028234663852886e38, dtype=tl.float32)
            total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
            for start in range(0, N, BLOCK):
                mask = live & (start + cols < N)
                x = tl.load(X + base + row * N + start + cols, mask=mask, other=float("-inf")).to(tl.float32)
                higher = tl.maximum(top, x)
                total = total * tl.exp(top - higher) + tl.exp(x - higher)
                top = higher
            largest = tl.max(top, axis=1)[:, None]
            scale = 1 / tl.sum(total * tl.exp(top - largest), axis=1)[:, None]
            for start in range(0, N, BLOCK):
                mask = live & (start + cols < N)
                x = tl.load(X + base + row * N + start + cols, mask=mask, other=float("-inf")).to(tl.float32)
                y = tl.exp(x - largest) * scale
                tl.store(Y + base + row * N + start + cols, y.to(Y.dtype.element_ty), mask=mask)
        else:
            mask = live & (cols < N)
            x = tl.load(X + base + row * N + cols, mask=mask, other=float("-inf")).to(tl.float32)
            e = tl.exp(x - tl.max(x, axis=1)[:, None])
            y = e * (1 / tl.sum(e, axis=1)[:, None])
            tl.store(Y + base + row * N + cols, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["R"])
def _backward_kernel(dY, Y, dX, R, N, ROWS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr):
    row = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    for tile in range(tl.program_id(0), tl.cdiv(R, ROWS), tl.num_programs(0)):
        base = int64(tile) * ROWS * N
        live = tile * ROWS + row < R
        if LOOP:
            products = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
            for start in range(0, N, BLOCK):
                mask = live & (start + cols < N)
                y = tl.load(Y + base + row * N + start + cols, mask=mask, other=0.0).to(tl.float32)
                dy = tl.load(dY + base + row * N + start + cols, mask=mask, other=0.0).to(tl.float32)
                products += dy * y
            dot = tl.sum(products, axis=1)[:, None]
            for start in range(0, N, BLOCK):
                mask = live & (start + cols < N)
                y = tl.load(Y + base + row * N + start + cols, mask=mask, other=0.0).to(tl.float32)
                dy = tl.load(dY + base + row * N + start + cols, mask=mask, other=0.0).to(tl.float32)
                tl.store(dX + base + row * N + start + cols, (y * (dy - dot)).to(dX.dtype.element_ty), mask=mask)
        else:
            mask = live & (cols < N)
            y = tl.load(Y + base + row * N + cols, mask=mask, other=0.0).to(tl.float32)
            dy = tl.load(dY + base + row * N + cols, mask=mask, other=0.0).to(tl.float32)
            dot = tl.sum(dy * y, axis=1)[:, None]
            tl.store(dX + base + row * N + cols, (y * (dy - dot)).to(dX.dtype.element_ty), mask=mask)


# Launchers


def _choose(rows, cols, device):
    """A row that fits is one tile; the loop over one that does not keeps two more tiles."""
    whole = RowTiles.choose(rows, cols, device, live=2)
    return RowTiles.choose(rows, cols, device, live=4) if whole.loop else whole


def softmax_forward(x, tiles=None):
    """x: (..., N) contiguous -> y like x."""
    rows, cols = as_rows(x)
    y = torch.empty_like(x)
    if x.numel():
        tiles = tiles or _choose(rows, cols, x.device)
        launch(
            _forward_kernel, tiles.programs, x.device,
            x, y, rows, cols, ROWS=tiles.rows, BLOCK=tiles.block, LOOP=tiles.loop, num_warps=tiles.num_warps,
        )  # fmt: skip
    return y


def softmax_backward(dy, y, tiles=None):
    """dy, y: (..., N) contiguous -> dx like y."""
    rows, cols = as_rows(y)
    dx = torch.empty_like(y)
    if y.numel():
        tiles = tiles or RowTiles.choose(rows, cols, y.device, live=4)
        launch(
            _backward_kernel, tiles.programs, y.device,
            dy, y, dx, rows, cols, ROWS=tiles.rows, BLOCK=tiles.block, LOOP=tiles.loop, num_warps=tiles.num_warps,
        )  # fmt: skip
    return dx


KERNELS = Kernels(softmax_forward, softmax_backward)
