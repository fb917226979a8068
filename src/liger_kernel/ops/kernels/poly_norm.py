"""PolyNorm in Triton; the mathematics is in liger_kernel.ops.poly_norm."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from liger_kernel.backends import device_of
from liger_kernel.ops.core import Kernels
from liger_kernel.ops.kernels.blocks import RowTiles, as_rows, int64, launch, load_tile, sum_rows

# Kernels: Capital = memory, lower case = registers, ALL_CAPS = compile time.


@triton.jit(do_not_specialize=["R"])
def _forward_kernel(
    X, W, B, Y, Rstd, R, N, EPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr
):
    row = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    w3 = tl.load(W).to(tl.float32)
    w2 = tl.load(W + 1).to(tl.float32)
    w1 = tl.load(W + 2).to(tl.float32)
    b = tl.load(B).to(tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(R, ROWS), tl.num_programs(0)):
        base = int64(tile) * ROWS * N
        live = tile * ROWS + row < R
        if LOOP:
            sum2 = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
            sum4 = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
            sum6 = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
            for start in range(0, N, BLOCK):
                mask = live & (start + cols < N)
                x = tl.load(X + base + row * N + start + cols, mask=mask, other=0.0).to(tl.float32)
                square = x * x
                sum2 += square
                sum4 += square * square
                sum6 += square * square * square
        else:
            x = load_tile(X, tile, R, N, ROWS, BLOCK).to(tl.float32)
            sum2 = x * x
            sum4 = sum2 * sum2
            sum6 = sum4 * sum2
        r1 = tl.rsqrt(tl.sum(sum2, axis=1)[:, None] / N + EPS)
        r2 = tl.rsqrt(tl.sum(sum4, axis=1)[:, None] / N + EPS)
        r3 = tl.rsqrt(tl.sum(sum6, axis=1)[:, None] / N + EPS)
        stats = Rstd + int64(tile) * ROWS * 3 + row * 3
        tl.store(stats, r3, mask=live)
        tl.store(stats + 1, r2, mask=live)
        tl.store(stats + 2, r1, mask=live)
        if LOOP:
            for start in range(0, N, BLOCK):
                mask = live & (start + cols < N)
                x = tl.load(X + base + row * N + start + cols, mask=mask, other=0.0).to(tl.float32)
                y = ((w3 * r3 * x + w2 * r2) * x + w1 * r1) * x + b
                tl.store(Y + base + row * N + start + cols, y.to(Y.dtype.element_ty), mask=mask)
        else:
            y = ((w3 * r3 * x + w2 * r2) * x + w1 * r1) * x + b
            tl.store(Y + base + row * N + cols, y.to(Y.dtype.element_ty), mask=live & (cols < N))


@triton.jit(do_not_specialize=["R"])
def _backward_kernel(dY, X, W, Rstd, dX, dParams, R, N, ROWS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr):
    """dParams (programs, 4): each program's sums for the three weights and the bias; None where none is needed."""
    row = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    w3 = tl.load(W).to(tl.float32)
    w2 = tl.load(W + 1).to(tl.float32)
    w1 = tl.load(W + 2).to(tl.float32)
    dw3 = tl.zeros((ROWS, 1), dtype=tl.float32)
    dw2 = tl.zeros((ROWS, 1), dtype=tl.float32)
    dw1 = tl.zeros((ROWS, 1), dtype=tl.float32)
    db = tl.zeros((ROWS, 1), dtype=tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(R, ROWS), tl.num_programs(0)):
        base = int64(tile) * ROWS * N
        live = tile * ROWS + row < R
        stats = Rstd + int64(tile) * ROWS * 3 + row * 3
        r3 = tl.load(stats, mask=live, other=0.0)
        r2 = tl.load(stats + 1, mask=live, other=0.0)
        r1 = tl.load(stats + 2, mask=live, other=0.0)
        if LOOP:
            sum0 = tl.zeros((ROWS, 1), dtype=tl.float32)
            sum1 = tl.zeros((ROWS, 1), dtype=tl.float32)
            sum2 = tl.zeros((ROWS, 1), dtype=tl.float32)
            sum3 = tl.zeros((ROWS, 1), dtype=tl.float32)
            for start in range(0, N, BLOCK):
                mask = live & (start + cols < N)
                x = tl.load(X + base + row * N + start + cols, mask=mask, other=0.0).to(tl.float32)
                dy = tl.load(dY + base + row * N + start + cols, mask=mask, other=0.0).to(tl.float32)
                sum0 += tl.sum(dy, axis=1)[:, None]
                sum1 += tl.sum(dy * x, axis=1)[:, None]
                sum2 += tl.sum(dy * x * x, axis=1)[:, None]
                sum3 += tl.sum(dy * x * x * x, axis=1)[:, None]
        else:
            x = load_tile(X, tile, R, N, ROWS, BLOCK).to(tl.float32)
            dy = load_tile(dY, tile, R, N, ROWS, BLOCK).to(tl.float32)
            sum0 = tl.sum(dy, axis=1)[:, None]
            sum1 = tl.sum(dy * x, axis=1)[:, None]
            sum2 = tl.sum(dy * x * x, axis=1)[:, None]
            sum3 = tl.sum(dy * x * x * x, axis=1)[:, None]
        dw3 += r3 * sum3
        dw2 += r2 * sum2
        dw1 += r1 * sum1
        db += tl.where(live, sum0, 0.0)  # 0 already; without it LLVM crashes on RDNA 3 (Triton 3.9)
        c3 = 3.0 * w3 * r3
        c2 = 2.0 * w2 * r2
        c1 = w1 * r1
        k3 = c3 * r3 * r3 * (sum3 / N)
        k2 = c2 * r2 * r2 * (sum2 / N)
        k1 = c1 * r1 * r1 * (sum1 / N)
        if LOOP:
            for start in range(0, N, BLOCK):
                mask = live & (start + cols < N)
                x = tl.load(X + base + row * N + start + cols, mask=mask, other=0.0).to(tl.float32)
                dy = tl.load(dY + base + row * N + start + cols, mask=mask, other=0.0).to(tl.float32)
                dx = dy * ((c3 * x + c2) * x + c1) - ((k3 * x * x + k2) * x * x + k1) * x
                tl.store(dX + base + row * N + start + cols, dx.to(dX.dtype.element_ty), mask=mask)
        else:
            dx = dy * ((c3 * x + c2) * x + c1) - ((k3 * x * x + k2) * x * x + k1) * x
            tl.store(dX + base + row * N + cols, dx.to(dX.dtype.element_ty), mask=live & (cols < N))
    if dParams is not None:
        own = dParams + tl.program_id(0).to(tl.int64) * 4
        tl.store(own, tl.sum(tl.sum(dw3, axis=1), axis=0))
        tl.store(own + 1, tl.sum(tl.sum(dw2, axis=1), axis=0))
        tl.store(own + 2, tl.sum(tl.sum(dw1, axis=1), axis=0))
        tl.store(own + 3, tl.sum(tl.sum(db, axis=1), axis=0))


# Launchers


def _launch(kernel, tiles, device, *args, **meta):
    launch(
        kernel, tiles.programs, device, *args, **meta,
        ROWS=tiles.rows, BLOCK=tiles.block, LOOP=tiles.loop, num_warps=tiles.num_warps,
    )  # fmt: skip


def poly_norm_forward(x, w, b, eps, tiles=None):
    """x: (..., N) contiguous; w: (3,); b: one element -> y like x, rstd (R, 3) in fp32."""
    rows, cols = as_rows(x)
    y = torch.empty_like(x)
    rstd = torch.empty(rows, 3, dtype=torch.float32, device=x.device)
    if x.numel():
        # The sums of three powers too lie in a core's buffer, where registers hold one power after the other.
        tiles = tiles or RowTiles.choose(rows, cols, x.device, live=2 if device_of(x.device).threads else 4)
        _launch(_forward_kernel, tiles, x.device, x, w, b, y, rstd, rows, cols, EPS=eps)
    return y, rstd


def poly_norm_backward(dy, x, w, rstd, in_place, needs_params, tiles=None):
    """dy, x: (..., N) contiguous -> dx like x, dw (3,) and db (1,) in fp32 or None. in_place may write dx over dy."""
    rows, cols = as_rows(x)
    dx = dy if in_place and dy.dtype == x.dtype else torch.empty_like(x)
    if not x.numel():
        zeros = torch.zeros(4, dtype=torch.float32, device=x.device)
        return dx, zeros[:3], zeros[3:]
    tiles = tiles or RowTiles.choose(rows, cols, x.device, live=4, walks=True)
    partial = torch.empty(tiles.programs, 4, dtype=torch.float32, device=x.device) if needs_params else None
    _launch(_backward_kernel, tiles, x.device, dy, x, w, rstd, dx, partial, rows, cols)
    if partial is None:
        return dx, None, None
    d_params = sum_rows(partial, torch.float32)
    return dx, d_params[:3], d_params[3:]


KERNELS = Kernels(poly_norm_forward, poly_norm_backward)
