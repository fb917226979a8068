"""LayerNorm in Triton; the mathematics is in liger_kernel.ops.layer_norm."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from liger_kernel.ops.core import Kernels
from liger_kernel.ops.kernels import wide_norm
from liger_kernel.ops.kernels.blocks import RowTiles, as_rows, int64, launch, load_tile, sum_rows

# Kernels: Capital = memory, lower case = registers, ALL_CAPS = compile time.


@triton.jit
def _affine(y, W, B, cols, mask):
    if W is not None:
        y *= tl.load(W + cols, mask=mask, other=0.0).to(tl.float32)
    if B is not None:
        y += tl.load(B + cols, mask=mask, other=0.0).to(tl.float32)
    return y


@triton.jit(do_not_specialize=["R"])
def _forward_kernel(
    X, W, B, Y, Mean, Rstd, R, N,
    EPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    for tile in range(tl.program_id(0), tl.cdiv(R, ROWS), tl.num_programs(0)):
        base = int64(tile) * ROWS * N
        live = tile * ROWS + row < R
        if LOOP:
            mean = tl.zeros((ROWS, 1), dtype=tl.float32)
            sum_sq = tl.zeros((ROWS, 1), dtype=tl.float32)
            for start in range(0, N, BLOCK):  # joins the blocks' own means and sums of squares: one read, no cancelling
                mask = live & (start + cols < N)
                x = tl.load(X + base + row * N + start + cols, mask=mask, other=0.0, eviction_policy="evict_last")
                x = x.to(tl.float32)
                count = tl.minimum(N - start, BLOCK).to(tl.float32)
                block_mean = tl.sum(x, axis=1)[:, None] / count
                centred = tl.where(mask, x - block_mean, 0.0)
                delta = block_mean - mean
                mean += delta * (count / (start + count))
                sum_sq += tl.sum(centred * centred, axis=1)[:, None] + delta * delta * (count * start / (start + count))
            rstd = tl.rsqrt(sum_sq / N + EPS)
            end = tl.cdiv(N, BLOCK) * BLOCK
            for back in range(BLOCK, end + BLOCK, BLOCK):  # from the end, which the cache still holds
                at = end - back + cols
                mask = live & (at < N)
                x = tl.load(X + base + row * N + at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
                y = _affine((x - mean) * rstd, W, B, at, at < N)
                tl.store(Y + base + row * N + at, y.to(Y.dtype.element_ty), mask=mask, eviction_policy="evict_first")
        else:
            mask = live & (cols < N)
            x = tl.load(X + base + row * N + cols, mask=mask, other=0.0).to(tl.float32)
            mean = tl.sum(x, axis=1)[:, None] / N
            centred = tl.where(mask, x - mean, 0.0)
            rstd = tl.rsqrt(tl.sum(centred * centred, axis=1)[:, None] / N + EPS)
            y = _affine(centred * rstd, W, B, cols, cols < N)
            tl.store(Y + base + row * N + cols, y.to(Y.dtype.element_ty), mask=mask)
        tl.store(Mean + tile * ROWS + row, mean, mask=live)
        tl.store(Rstd + tile * ROWS + row, rstd, mask=live)


@triton.jit(do_not_specialize=["R"])
def _backward_kernel(
    dY, X, W, Mean, Rstd, dX, dW, dB, R, N,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    step = tl.num_programs(0)
    row = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    if W is not None:
        w = tl.load(W + cols, mask=cols < N, other=0.0)
    if dW is not None:
        dw = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    if dB is not None:
        db = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    if PREFETCH:
        next_x = load_tile(X, pid, R, N, ROWS, BLOCK)
        next_dy = load_tile(dY, pid, R, N, ROWS, BLOCK)
        next_mean = tl.load(Mean + pid * ROWS + row, mask=pid * ROWS + row < R, other=0.0)
        next_rstd = tl.load(Rstd + pid * ROWS + row, mask=pid * ROWS + row < R, other=0.0)

    for tile in range(pid, tl.cdiv(R, ROWS), step):
        base = int64(tile) * ROWS * N
        live = tile * ROWS + row < R
        if PREFETCH:
            x, dy, mean, rstd = next_x.to(tl.float32), next_dy.to(tl.float32), next_mean, next_rstd
            next_x = load_tile(X, tile + step, R, N, ROWS, BLOCK)
            next_dy = load_tile(dY, tile + step, R, N, ROWS, BLOCK)
            ahead = (tile + step) * ROWS + row
            next_mean = tl.load(Mean + ahead, mask=ahead < R, other=0.0)
            next_rstd = tl.load(Rstd + ahead, mask=ahead < R, other=0.0)
        else:
            x = load_tile(X, tile, R, N, ROWS, BLOCK).to(tl.float32)
            dy = load_tile(dY, tile, R, N, ROWS, BLOCK).to(tl.float32)
            mean = tl.load(Mean + tile * ROWS + row, mask=live, other=0.0)
            rstd = tl.load(Rstd + tile * ROWS + row, mask=live, other=0.0)
        x_hat = (x - mean) * rstd  # outside the row dy is 0, so it adds nothing there
        m = dy
        if W is not None:
            m *= w.to(tl.float32)
        mean_m = tl.sum(m, axis=1)[:, None] / N
        mean_mx = tl.sum(m * x_hat, axis=1)[:, None] / N
        dx = rstd * (m - mean_m - x_hat * mean_mx)
        tl.store(dX + base + row * N + cols, dx.to(dX.dtype.element_ty), mask=live & (cols < N))
        if dW is not None:
            dw += dy * x_hat
        if dB is not None:
            db += dy

    if dW is not None:
        tl.store(dW + pid.to(tl.int64) * N + cols, tl.sum(dw, axis=0)[None, :], mask=cols < N)
    if dB is not None:
        tl.store(dB + pid.to(tl.int64) * N + cols, tl.sum(db, axis=0)[None, :], mask=cols < N)


# Launchers


def layer_norm_forward(x, w, b, eps, tiles=None):
    """x: (..., N) contiguous -> y like x; mean and rstd (R,) in fp32."""
    rows, cols = as_rows(x)
    y = torch.empty_like(x)
    mean, rstd = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    if x.numel():
        tiles = tiles or wide_norm.forward_tiles(rows, cols, x.device)
        launch(
            _forward_kernel, tiles.programs, x.device,
            x, w, b, y, mean, rstd, rows, cols, EPS=eps,
            ROWS=tiles.rows, BLOCK=tiles.block, LOOP=tiles.loop, num_warps=tiles.num_warps,
        )  # fmt: skip
    return y, mean, rstd


def layer_norm_backward(dy, x, w, b, mean, rstd, needs_dw, needs_db, tiles=None):
    """dy, x: (..., N) contiguous -> dx like x, dw like w, db like b (each None where it is not needed)."""
    rows, cols = as_rows(x)
    dx = torch.empty_like(x)
    wanted = [p if needed else None for p, needed in ((w, needs_dw), (b, needs_db))]
    if not x.numel():
        return dx, *[None if p is None else torch.zeros_like(p) for p in wanted]
    given, tiles = tiles, tiles or RowTiles.choose(rows, cols, x.device, live=4, walks=True)
    if tiles.loop:
        partial = wide_norm.backward(dy, x, w, mean, rstd, dx, *(p is not None for p in wanted), tiles=given)
        return dx, *[None if p is None else sum_rows(part, p.dtype) for p, part in zip(wanted, partial)]
    partial = [
        None if p is None else torch.empty(tiles.programs, cols, dtype=torch.float32, device=x.device) for p in wanted
    ]
    launch(
        _backward_kernel, tiles.programs, x.device,
        dy, x, w, mean, rstd, dx, *partial, rows, cols,
        ROWS=tiles.rows, BLOCK=tiles.block, PREFETCH=tiles.prefetch, num_warps=tiles.num_warps,
    )  # fmt: skip
    return dx, *[None if p is None else sum_rows(part, p.dtype) for p, part in zip(wanted, partial)]


KERNELS = Kernels(layer_norm_forward, layer_norm_backward)
