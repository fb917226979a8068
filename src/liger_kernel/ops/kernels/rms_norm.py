"""RMSNorm in Triton, with or without a residual added first; the mathematics is in liger_kernel.ops.rms_norm."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from liger_kernel.ops.core import Kernels
from liger_kernel.ops.kernels import wide_norm
from liger_kernel.ops.kernels.blocks import (
    RowTiles,
    as_rows,
    int64,
    launch,
    load_tile,
    normed,
    rounded,
    square,
    sum_rows,
)
from liger_kernel.ops.rms_norm import CASTING

# Kernels: Capital = memory, lower case = registers, ALL_CAPS = compile time.


@triton.jit
def _scale(x, mean_sq, W, cols, mask, EPS: tl.constexpr, OFFSET: tl.constexpr, CAST: tl.constexpr, DTYPE: tl.constexpr):
    if CAST == -1:  # every step of "none" is rounded to the input dtype, as torch does it
        y = x * rounded(tl.rsqrt(rounded(rounded(mean_sq, DTYPE) + EPS, DTYPE)), DTYPE)
    else:
        y = x * tl.rsqrt(mean_sq + EPS)
    if CAST <= 0:
        y = rounded(y, DTYPE)
    if W is not None:
        w = tl.load(W + cols, mask=mask, other=0.0)
        if CAST == 1:
            y = y * (OFFSET + w.to(tl.float32))
        else:
            y = y * rounded(OFFSET + w.to(tl.float32), w.dtype)
    return y


@triton.jit
def _load_sum(X, Residual, S, base, at, mask, DTYPE: tl.constexpr, EVICT: tl.constexpr):
    """x, or x + residual as it is after its store to S."""
    x = tl.load(X + base + at, mask=mask, other=0.0, eviction_policy=EVICT).to(tl.float32)
    if Residual is not None:
        x = rounded(x + tl.load(Residual + base + at, mask=mask, other=0.0).to(tl.float32), DTYPE)
        tl.store(S + base + at, x.to(DTYPE), mask=mask)
    return x


@triton.jit(do_not_specialize=["R"])
def _forward_kernel(
    X, Residual, W, Y, S, Rstd, R, N,
    EPS: tl.constexpr, OFFSET: tl.constexpr, CAST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    LOOP: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = X.dtype.element_ty
    row = tl.arange(0, ROWS)[:, None]
    for tile in range(tl.program_id(0), tl.cdiv(R, ROWS), tl.num_programs(0)):
        base = int64(tile) * ROWS * N
        live = tile * ROWS + row < R
        if LOOP:
            sum_sq = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
            for start in range(0, N, BLOCK):
                cols = start + tl.arange(0, BLOCK)[None, :]
                x = _load_sum(X, Residual, S, base, row * N + cols, live & (cols < N), DTYPE, "evict_last")
                sum_sq += square(x, CAST, DTYPE)
            mean_sq = tl.sum(sum_sq, axis=1)[:, None] / N
            if Residual is not None:
                tl.debug_barrier()  # the second walk reads the sums this program has just stored
            end = tl.cdiv(N, BLOCK) * BLOCK
            for back in range(BLOCK, end + BLOCK, BLOCK):  # from the end, which the cache still holds
                cols = end - back + tl.arange(0, BLOCK)[None, :]
                mask = live & (cols < N)
                at = row * N + cols
                if Residual is not None:
                    x = tl.load(S + base + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
                else:
                    x = tl.load(X + base + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
                y = _scale(x, mean_sq, W, cols, cols < N, EPS, OFFSET, CAST, DTYPE)
                tl.store(Y + base + at, y.to(Y.dtype.element_ty), mask=mask, eviction_policy="evict_first")
        else:
            cols = tl.arange(0, BLOCK)[None, :]
            mask = live & (cols < N)
            x = _load_sum(X, Residual, S, base, row * N + cols, mask, DTYPE, "")
            mean_sq = tl.sum(square(x, CAST, DTYPE), axis=1)[:, None] / N
            y = _scale(x, mean_sq, W, cols, cols < N, EPS, OFFSET, CAST, DTYPE)
            tl.store(Y + base + row * N + cols, y.to(Y.dtype.element_ty), mask=mask)
        tl.store(Rstd + tile * ROWS + row, tl.rsqrt(mean_sq + EPS), mask=live)


@triton.jit(do_not_specialize=["R"])
def _backward_kernel(
    dY, dS, X, W, Rstd, dX, dW, R, N,
    OFFSET: tl.constexpr, CAST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = X.dtype.element_ty
    pid = tl.program_id(0)
    step = tl.num_programs(0)
    row = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    if W is not None:
        w = tl.load(W + cols, mask=cols < N, other=0.0)
    if dW is not None:
        dw = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    if PREFETCH:
        next_x = load_tile(X, pid, R, N, ROWS, BLOCK)
        next_dy = load_tile(dY, pid, R, N, ROWS, BLOCK)
        next_rstd = tl.load(Rstd + pid * ROWS + row, mask=pid * ROWS + row < R, other=0.0)
        if dS is not None:
            next_ds = load_tile(dS, pid, R, N, ROWS, BLOCK)

    for tile in range(pid, tl.cdiv(R, ROWS), step):
        base = int64(tile) * ROWS * N
        live = tile * ROWS + row < R
        if PREFETCH:
            x, dy, rstd = next_x.to(tl.float32), next_dy.to(tl.float32), next_rstd
            next_x = load_tile(X, tile + step, R, N, ROWS, BLOCK)
            next_dy = load_tile(dY, tile + step, R, N, ROWS, BLOCK)
            ahead = (tile + step) * ROWS + row
            next_rstd = tl.load(Rstd + ahead, mask=ahead < R, other=0.0)
            if dS is not None:
                ds = next_ds
                next_ds = load_tile(dS, tile + step, R, N, ROWS, BLOCK)
        else:
            x = load_tile(X, tile, R, N, ROWS, BLOCK).to(tl.float32)
            dy = load_tile(dY, tile, R, N, ROWS, BLOCK).to(tl.float32)
            rstd = tl.load(Rstd + tile * ROWS + row, mask=live, other=0.0)
            if dS is not None:
                ds = load_tile(dS, tile, R, N, ROWS, BLOCK)
        m = dy
        if W is not None:
            m *= OFFSET + w.to(tl.float32)
        mean = tl.sum(m * x, axis=1)[:, None] / N
        dx = rstd * (m - x * (rstd * rstd * mean))
        if dS is not None:
            dx += ds.to(tl.float32)
        tl.store(dX + base + row * N + cols, dx.to(dX.dtype.element_ty), mask=live & (cols < N))
        if dW is not None:
            dw += dy * normed(x, rstd, CAST, DTYPE)

    if dW is not None:
        tl.store(dW + pid.to(tl.int64) * N + cols, tl.sum(dw, axis=0)[None, :], mask=cols < N)


# Launchers


def rms_norm_forward(x, w, eps, offset, casting_mode, out_dtype, residual=None, tiles=None):
    """x: (..., N) contiguous -> y like x in out_dtype, rstd (R,) in fp32; with a residual also s = x + residual."""
    rows, cols = as_rows(x)
    y = torch.empty_like(x, dtype=out_dtype)
    s = None if residual is None else torch.empty_like(x)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    if x.numel():
        tiles = tiles or wide_norm.forward_tiles(rows, cols, x.device)
        launch(
            _forward_kernel, tiles.programs, x.device,
            x, residual, w, y, s, rstd, rows, cols, EPS=eps, OFFSET=offset, CAST=CASTING[casting_mode],
            ROWS=tiles.rows, BLOCK=tiles.block, LOOP=tiles.loop, num_warps=tiles.num_warps,
        )  # fmt: skip
    return (y, rstd) if residual is None else (y, s, rstd)


def rms_norm_backward(dy, x, w, rstd, offset, casting_mode, in_place, needs_dw, ds=None, tiles=None):
    """dy, x, ds: (..., N) contiguous -> dx (+ ds) like x, dw like w (or None). in_place may write dx over dy."""
    rows, cols = as_rows(x)
    dx = dy if in_place and dy.dtype == x.dtype else torch.empty_like(x)
    needs_dw = needs_dw and w is not None
    if not x.numel():
        return dx, torch.zeros_like(w) if needs_dw else None
    given, tiles = tiles, tiles or RowTiles.choose(rows, cols, x.device, live=4, walks=True)
    cast = CASTING[casting_mode]
    if tiles.loop:
        partial, _ = wide_norm.backward(dy, x, w, None, rstd, dx, needs_dw, False, offset, cast, ds, given)
        return dx, sum_rows(partial, w.dtype) if needs_dw else None
    partial = torch.empty(tiles.programs, cols, dtype=torch.float32, device=x.device) if needs_dw else None
    launch(
        _backward_kernel, tiles.programs, x.device,
        dy, ds, x, w, rstd, dx, partial, rows, cols, OFFSET=offset, CAST=cast,
        ROWS=tiles.rows, BLOCK=tiles.block, PREFETCH=tiles.prefetch, num_warps=tiles.num_warps,
    )  # fmt: skip
    return dx, sum_rows(partial, w.dtype) if needs_dw else None


KERNELS = Kernels(rms_norm_forward, rms_norm_backward)
