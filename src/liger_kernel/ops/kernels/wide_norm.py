"""The backward of RMSNorm and LayerNorm in Triton where no tile holds a row: means along the rows, then columns.

    m = dy (offset + w);  x_hat = (x - mean) rstd                           RMSNorm: mean = 0, a = 0
    means:    a = mean of m;  b = mean of m x_hat                           reads x and dy
    columns:  dx = rstd (m - a - x_hat b) + ds;  dw += dy x_hat;  db += dy  reads x and dy again, writes dx

One program a row would have to keep its partial dw in memory, where each row reads and writes 8 bytes a column, more
than the 6 of x, dy and dx: of what both passes must move 1.68 TB/s, so 2.73 (H200 bf16, 2048x65536, 2026-11-29).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from liger_kernel.backends import device_of
from liger_kernel.ops.kernels.blocks import RowTiles, as_rows, cdiv, int64, launch, normed

# Kernels: Capital = memory, lower case = registers, ALL_CAPS = compile time.


@triton.jit(do_not_specialize=["R"])
def _means_kernel(dY, X, W, Mean, Rstd, A, B, R, N, OFFSET: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), R, tl.num_programs(0)):
        base = int64(row) * N
        mean = 0.0
        if Mean is not None:
            mean = tl.load(Mean + row)
        sum_m = tl.zeros((BLOCK,), dtype=tl.float32)
        sum_mx = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, N, BLOCK):
            mask = start + cols < N
            x = tl.load(X + base + start + cols, mask=mask, other=0.0).to(tl.float32)
            m = tl.load(dY + base + start + cols, mask=mask, other=0.0).to(tl.float32)
            if W is not None:
                m *= OFFSET + tl.load(W + start + cols, mask=mask, other=0.0).to(tl.float32)
            if Mean is not None:
                sum_m += m
            sum_mx += m * (x - mean)
        tl.store(B + row, tl.sum(sum_mx, axis=0) * tl.load(Rstd + row) / N)
        if Mean is not None:
            tl.store(A + row, tl.sum(sum_m, axis=0) / N)


@triton.jit(do_not_specialize=["R", "SHARES"])
def _columns_kernel(
    dY, dS, X, W, Mean, Rstd, A, B, dX, dW, dB, R, N, SHARES,
    OFFSET: tl.constexpr, CAST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program has BLOCK columns of one of SHARES shares of the rows, every SHARES-th tile of them."""
    DTYPE: tl.constexpr = X.dtype.element_ty
    row = tl.arange(0, ROWS)[:, None]
    n_blocks = tl.cdiv(N, BLOCK)
    for part in range(tl.program_id(0), n_blocks * SHARES, tl.num_programs(0)):
        share = part // n_blocks
        cols = (part % n_blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
        if W is not None:
            w = tl.load(W + cols, mask=cols < N, other=0.0).to(tl.float32) + OFFSET
        if dW is not None:
            dw = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        if dB is not None:
            db = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for tile in range(share, tl.cdiv(R, ROWS), SHARES):
            base = int64(tile) * ROWS * N
            live = tile * ROWS + row < R
            mask = live & (cols < N)
            x = tl.load(X + base + row * N + cols, mask=mask, other=0.0).to(tl.float32)
            dy = tl.load(dY + base + row * N + cols, mask=mask, other=0.0).to(tl.float32)
            rstd = tl.load(Rstd + tile * ROWS + row, mask=live, other=0.0)
            mean_mx = tl.load(B + tile * ROWS + row, mask=live, other=0.0)
            m = dy
            if W is not None:
                m *= w
            if Mean is not None:
                x -= tl.load(Mean + tile * ROWS + row, mask=live, other=0.0)
                m -= tl.load(A + tile * ROWS + row, mask=live, other=0.0)
            dx = rstd * (m - x * (rstd * mean_mx))
            if dS is not None:
                dx += tl.load(dS + base + row * N + cols, mask=mask, other=0.0).to(tl.float32)
            tl.store(dX + base + row * N + cols, dx.to(dX.dtype.element_ty), mask=mask)
            if dW is not None:
                dw += dy * normed(x, rstd, CAST, DTYPE)
            if dB is not None:
                db += dy
        first = int64(share) * N
        if dW is not None:
            tl.store(dW + first + cols, tl.sum(dw, axis=0)[None, :], mask=cols < N)
        if dB is not None:
            tl.store(dB + first + cols, tl.sum(db, axis=0)[None, :], mask=cols < N)


# Launchers


@dataclass(frozen=True)
class Columns:
    """How R rows of N columns are cut: tiles of `rows` x `block`, a program for each strip of a share."""

    rows: int
    block: int
    num_warps: int
    shares: int
    programs: int

    @classmethod
    def choose(cls, n_rows: int, n_cols: int, device: torch.device) -> Columns:
        backend = device_of(device)
        rows, block, warps = (4, 1024, 4) if backend.threads else (1, backend.max_block(8), 1)
        n_blocks, cores = cdiv(n_cols, block), backend.cores(device)
        programs = cores if backend.persistent else 4 * cores
        shares = max(1, min(cdiv(n_rows, rows), programs // n_blocks))
        return cls(
            rows, block, warps, shares, min(programs, n_blocks * shares) if backend.persistent else n_blocks * shares
        )


def forward_tiles(n_rows: int, n_cols: int, device: torch.device) -> RowTiles:
    """How the forward cuts its rows; those that fit no tile are walked twice, few at a time: the cache holds them.

    Of the copy ceiling at 2048x65536: 76 % so, 66 % with tiles of 32768 and a program a row. At 512x262144 61 and 60 %:
    the rows in flight are more than the cache (H200 bf16, sweep 2026-11-29).
    """
    tiles, backend = RowTiles.choose(n_rows, n_cols, device, live=2), device_of(device)
    if not (tiles.loop and backend.threads):
        return tiles
    return RowTiles(1, 8192, True, 256 // backend.warp_width, min(n_rows, 2 * backend.cores(device)))


def backward(dy, x, w, mean, rstd, dx, needs_dw, needs_db, offset=0.0, cast=1, ds=None, tiles=None):
    """dy, x, ds: (..., N) contiguous -> dx (+ ds) into dx, which may be dy; partial dw and db, (shares, N) in fp32."""
    rows, cols = as_rows(x)
    tiles = tiles or RowTiles.choose(rows, cols, x.device, live=8)
    columns = Columns.choose(rows, cols, x.device)
    b = torch.empty(rows, dtype=torch.float32, device=x.device)
    a = torch.empty_like(b) if mean is not None else None
    launch(
        _means_kernel, tiles.programs, x.device,
        dy, x, w, mean, rstd, a, b, rows, cols, OFFSET=offset, BLOCK=tiles.block, num_warps=tiles.num_warps,
    )  # fmt: skip
    dw, db = (
        torch.empty(columns.shares, cols, dtype=torch.float32, device=x.device) if needed else None
        for needed in (needs_dw, needs_db)
    )
    launch(
        _columns_kernel, columns.programs, x.device,
        dy, ds, x, w, mean, rstd, a, b, dx, dw, db, rows, cols, columns.shares, OFFSET=offset, CAST=cast,
        ROWS=columns.rows, BLOCK=columns.block, num_warps=columns.num_warps,
    )  # fmt: skip
    return dw, db
