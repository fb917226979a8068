"""Modulated RMSNorm in Triton; the mathematics is in liger_kernel.ops.modulated_rms_norm.

RUN rows that follow each other share a row of scale and shift. The backward takes each run in shares, with sums of
their own; where every row has a scale of its own, all rows are one run and the only sum is that of dw.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from liger_kernel.backends import device_of
from liger_kernel.ops.core import Kernels
from liger_kernel.ops.kernels.blocks import (
    RowTiles,
    as_rows,
    cdiv,
    int64,
    launch,
    normed,
    power_of_2_from,
    rounded,
    square,
    sum_rows,
)
from liger_kernel.ops.rms_norm import CASTING

# Kernels: Capital = memory, lower case = registers, ALL_CAPS = compile time.


@triton.jit
def _stepwise(y, CAST: tl.constexpr, DTYPE: tl.constexpr):
    """Every step of "none" is rounded to the input dtype, as torch does it."""
    if CAST == -1:
        return rounded(y, DTYPE)
    else:
        return y


@triton.jit
def _factor(W, cols, N, OFFSET: tl.constexpr, CAST: tl.constexpr):
    """OFFSET + w as (1, BLOCK)."""
    w = tl.load(W + cols, mask=cols < N, other=0.0)
    return _stepwise(OFFSET + w.to(tl.float32), CAST, W.dtype.element_ty)


@triton.jit
def _modulate(
    x, mean_sq, W, Scale, Shift, base, cols, mask, N,
    EPS: tl.constexpr, OFFSET: tl.constexpr, CAST: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """y of a tile; base: where the scales of its rows begin."""
    rstd = tl.rsqrt(_stepwise(_stepwise(mean_sq, CAST, DTYPE) + EPS, CAST, DTYPE))
    y = normed(x, _stepwise(rstd, CAST, DTYPE), CAST, DTYPE)
    if W is not None:
        y = _stepwise(y * _factor(W, cols, N, OFFSET, CAST), CAST, DTYPE)
    scale = tl.load(Scale + base + cols, mask=mask, other=0.0).to(tl.float32)
    y *= _stepwise(1.0 + scale, CAST, Scale.dtype.element_ty)
    if Shift is not None:
        y = _stepwise(y, CAST, DTYPE) + tl.load(Shift + base + cols, mask=mask, other=0.0).to(tl.float32)
    return y


@triton.jit(do_not_specialize=["R", "n_run"])
def _forward_kernel(
    X, W, Scale, Shift, Y, Rstd, R, N, n_run,
    EPS: tl.constexpr, OFFSET: tl.constexpr, CAST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    LOOP: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = X.dtype.element_ty
    row = tl.arange(0, ROWS)[:, None]
    for tile in range(tl.program_id(0), tl.cdiv(R, ROWS), tl.num_programs(0)):
        base = int64(tile) * ROWS * N
        live = tile * ROWS + row < R
        scales = ((tile * ROWS + row) // n_run).to(tl.int64) * N
        if LOOP:
            sum_sq = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
            for start in range(0, N, BLOCK):
                cols = start + tl.arange(0, BLOCK)[None, :]
                x = tl.load(X + base + row * N + cols, mask=live & (cols < N), other=0.0).to(tl.float32)
                sum_sq += square(x, CAST, DTYPE)
            mean_sq = tl.sum(sum_sq, axis=1)[:, None] / N
            for start in range(0, N, BLOCK):
                cols = start + tl.arange(0, BLOCK)[None, :]
                mask = live & (cols < N)
                x = tl.load(X + base + row * N + cols, mask=mask, other=0.0).to(tl.float32)
                y = _modulate(x, mean_sq, W, Scale, Shift, scales, cols, mask, N, EPS, OFFSET, CAST, DTYPE)
                tl.store(Y + base + row * N + cols, y.to(DTYPE), mask=mask)
        else:
            cols = tl.arange(0, BLOCK)[None, :]
            mask = live & (cols < N)
            x = tl.load(X + base + row * N + cols, mask=mask, other=0.0).to(tl.float32)
            mean_sq = tl.sum(square(x, CAST, DTYPE), axis=1)[:, None] / N
            y = _modulate(x, mean_sq, W, Scale, Shift, scales, cols, mask, N, EPS, OFFSET, CAST, DTYPE)
            tl.store(Y + base + row * N + cols, y.to(DTYPE), mask=mask)
        tl.store(Rstd + tile * ROWS + row, tl.rsqrt(mean_sq + EPS), mask=live)


@triton.jit
def _load(X, run, tile, start, n_run, N, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows tile * ROWS ... of a run of X from column `start`, as (ROWS, BLOCK) in fp32, zeros outside."""
    row = tl.arange(0, ROWS)[:, None]
    cols = start + tl.arange(0, BLOCK)[None, :]
    base = (int64(run) * n_run + int64(tile) * ROWS) * N
    return tl.load(X + base + row * N + cols, mask=(tile * ROWS + row < n_run) & (cols < N), other=0.0).to(tl.float32)


@triton.jit
def _scale_of(Scale, run, tile, start, n_run, N, PER_ROW: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """1 + scale of a tile: (ROWS, BLOCK) with a scale per row, else (1, BLOCK)."""
    if PER_ROW:
        return 1.0 + _load(Scale, run, tile, start, n_run, N, ROWS, BLOCK)
    else:
        cols = start + tl.arange(0, BLOCK)[None, :]
        return 1.0 + tl.load(Scale + int64(run) * N + cols, mask=cols < N, other=0.0).to(tl.float32)


@triton.jit
def _weighted(value, W, cols, N, OFFSET: tl.constexpr):
    if W is not None:
        return value * _factor(W, cols, N, OFFSET, 1)
    else:
        return value


@triton.jit
def _store(Y, y, run, tile, start, n_run, N, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.arange(0, ROWS)[:, None]
    cols = start + tl.arange(0, BLOCK)[None, :]
    base = (int64(run) * n_run + int64(tile) * ROWS) * N
    tl.store(Y + base + row * N + cols, y.to(Y.dtype.element_ty), mask=(tile * ROWS + row < n_run) & (cols < N))


@triton.jit
def _add_to(Partial, terms, cols, N):
    mask = cols < N
    tl.store(Partial + cols, tl.load(Partial + cols, mask=mask, other=0.0) + tl.sum(terms, axis=0)[None, :], mask=mask)


@triton.jit(do_not_specialize=["n_runs", "n_run", "n_shares"])
def _backward_kernel(
    dY, X, W, Scale, Rstd, dX, dScale, Product, Total, N, n_runs, n_run, n_shares,
    OFFSET: tl.constexpr, CAST: tl.constexpr, PER_ROW: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    LOOP: tl.constexpr,
):  # fmt: skip
    """Product, Total (n_shares, n_runs, N): each share's sums of dy * x_hat (PER_ROW: that times 1 + scale) and of dy.

    dScale is written with PER_ROW. What is None is not needed.
    """
    DTYPE: tl.constexpr = X.dtype.element_ty
    row = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    for unit in range(tl.program_id(0), n_runs * n_shares, tl.num_programs(0)):
        run = unit // n_shares
        share = unit % n_shares
        partial = (int64(share) * n_runs + int64(run)) * N
        if not LOOP:
            product = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
            total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for tile in range(share, tl.cdiv(n_run, ROWS), n_shares):
            rstd = tl.load(Rstd + int64(run) * n_run + tile * ROWS + row, mask=tile * ROWS + row < n_run, other=0.0)
            if LOOP:
                dot = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
                for start in range(0, N, BLOCK):
                    m = _load(dY, run, tile, start, n_run, N, ROWS, BLOCK)
                    m *= _scale_of(Scale, run, tile, start, n_run, N, PER_ROW, ROWS, BLOCK)
                    m = _weighted(m, W, start + cols, N, OFFSET)
                    dot += m * _load(X, run, tile, start, n_run, N, ROWS, BLOCK)
                mean = tl.sum(dot, axis=1)[:, None] / N
                for start in range(0, N, BLOCK):
                    x = _load(X, run, tile, start, n_run, N, ROWS, BLOCK)
                    dy = _load(dY, run, tile, start, n_run, N, ROWS, BLOCK)
                    scale = _scale_of(Scale, run, tile, start, n_run, N, PER_ROW, ROWS, BLOCK)
                    m = _weighted(dy * scale, W, start + cols, N, OFFSET)
                    _store(dX, rstd * (m - x * (rstd * rstd * mean)), run, tile, start, n_run, N, ROWS, BLOCK)
                    terms = dy * normed(x, rstd, CAST, DTYPE)
                    if dScale is not None:
                        ds = _weighted(terms, W, start + cols, N, OFFSET)
                        _store(dScale, ds, run, tile, start, n_run, N, ROWS, BLOCK)
                    if PER_ROW:
                        terms *= scale
                    if Product is not None:  # in memory: no row of the sums fits a block
                        _add_to(Product + partial, terms, start + cols, N)
                    if Total is not None:
                        _add_to(Total + partial, dy, start + cols, N)
                tl.debug_barrier()  # the next row reads these sums
            else:
                x = _load(X, run, tile, 0, n_run, N, ROWS, BLOCK)
                dy = _load(dY, run, tile, 0, n_run, N, ROWS, BLOCK)
                scale = _scale_of(Scale, run, tile, 0, n_run, N, PER_ROW, ROWS, BLOCK)
                m = _weighted(dy * scale, W, cols, N, OFFSET)
                mean = tl.sum(m * x, axis=1)[:, None] / N
                _store(dX, rstd * (m - x * (rstd * rstd * mean)), run, tile, 0, n_run, N, ROWS, BLOCK)
                terms = dy * normed(x, rstd, CAST, DTYPE)
                if dScale is not None:
                    _store(dScale, _weighted(terms, W, cols, N, OFFSET), run, tile, 0, n_run, N, ROWS, BLOCK)
                if PER_ROW:
                    terms *= scale
                if Product is not None:
                    product += terms
                if Total is not None:
                    total += dy
        if not LOOP and Product is not None:
            tl.store(Product + partial + cols, tl.sum(product, axis=0)[None, :], mask=cols < N)
        if not LOOP and Total is not None:
            tl.store(Total + partial + cols, tl.sum(total, axis=0)[None, :], mask=cols < N)


# Config


@dataclass(frozen=True)
class Shares:
    """Tiles of a run's rows, and in how many shares the rows of a run are walked."""

    tiles: RowTiles
    shares: int

    @classmethod
    def choose(cls, n_runs: int, run: int, n_cols: int, device: torch.device) -> Shares:
        """A share per program, as many as the device keeps busy. Live are x, dy, scale, m, two sums and two more."""
        tiles = RowTiles.choose(n_runs * run, n_cols, device, live=8, walks=True)
        tiles = replace(tiles, rows=min(tiles.rows, power_of_2_from(run)))
        return cls(tiles, max(1, min(cdiv(run, tiles.rows), tiles.programs // n_runs)))


# Launchers


def modulated_rms_norm_forward(x, w, scale, shift, run, eps, offset, casting_mode, tiles=None):
    """x: (..., N), scale, shift: (M, N), contiguous; `run` rows share a scale -> y like x, rstd (R,) in fp32."""
    rows, cols = as_rows(x)
    y = torch.empty_like(x)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    if x.numel():
        tiles = tiles or RowTiles.choose(rows, cols, x.device, live=4)
        launch(
            _forward_kernel, tiles.programs, x.device,
            x, w, scale, shift, y, rstd, rows, cols, run, EPS=eps, OFFSET=offset, CAST=CASTING[casting_mode],
            ROWS=tiles.rows, BLOCK=tiles.block, LOOP=tiles.loop, num_warps=tiles.num_warps,
        )  # fmt: skip
    return y, rstd


def modulated_rms_norm_backward(
    dy, x, w, scale, shift, rstd, run, offset, casting_mode, in_place, needs, shares=None
):  # fmt: skip
    """dy, x: (..., N), scale, shift: (M, N), contiguous -> dx like x, dw, dscale, dshift, each like its own or None.

    needs: which of the three are wanted. in_place may write dx over dy.
    """
    wanted = [p if needed else None for p, needed in zip((w, scale, shift), needs)]
    if not x.numel():
        return torch.empty_like(x), *[None if p is None else torch.zeros_like(p) for p in wanted]
    (rows, cols), (w_wanted, scale_wanted, shift_wanted) = as_rows(x), wanted
    per_row, dshift, dscale = run == 1, None, None
    if per_row and shift_wanted is not None:
        dshift = dy.view(scale.shape).to(shift.dtype)
        in_place = in_place and dshift.dtype != dy.dtype  # else dy itself is dshift
    if per_row and scale_wanted is not None:
        dscale = torch.empty_like(scale)
    dx = dy if in_place and dy.dtype == x.dtype else torch.empty_like(x)
    n_runs, run = (1, rows) if per_row else (scale.shape[0], run)
    shares = shares or Shares.choose(n_runs, run, cols, x.device)
    tiles, make = shares.tiles, torch.zeros if shares.tiles.loop else torch.empty
    size = dict(dtype=torch.float32, device=x.device)
    needs_product = w_wanted is not None or not per_row and scale_wanted is not None
    product = make(shares.shares, n_runs * cols, **size) if needs_product else None
    total = make(shares.shares, n_runs * cols, **size) if not per_row and shift_wanted is not None else None
    launch(
        _backward_kernel, min(n_runs * shares.shares, device_of(x.device).max_programs), x.device,
        dy, x, w, scale, rstd, dx, dscale, product, total, cols, n_runs, run, shares.shares,
        OFFSET=offset, CAST=CASTING[casting_mode], PER_ROW=per_row, ROWS=tiles.rows, BLOCK=tiles.block,
        LOOP=tiles.loop, num_warps=tiles.num_warps,
    )  # fmt: skip
    dw = None
    if per_row:
        dw = sum_rows(product, w.dtype) if w_wanted is not None else None
        return dx, dw, dscale, dshift
    if total is not None:
        dshift = sum_rows(total, shift.dtype).view(shift.shape)
    if product is not None:
        product = sum_rows(product, torch.float32).view(scale.shape)
        if scale_wanted is not None:
            dscale = (product if w is None else product * (w.float() + offset)).to(scale.dtype)
        if w_wanted is not None:
            dw = sum_rows(product.addcmul_(product, scale), w.dtype)
    return dx, dw, dscale, dshift


KERNELS = Kernels(modulated_rms_norm_forward, modulated_rms_norm_backward)
