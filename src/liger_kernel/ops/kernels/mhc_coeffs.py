"""The weights of hyper-connections in Triton; the mathematics is in liger_kernel.ops.mhc_coeffs.

Three steps each way: a product that reads x once, the norm in it; and on its few columns sigmoids and Sinkhorn-Knopp,
many rows to a program, each row's matrix in registers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from liger_kernel.backends import device_of
from liger_kernel.ops.core import Kernels
from liger_kernel.ops.kernels.blocks import cdiv, exp, int64, launch, power_of_2_from, programs_for, sum_rows

# Kernels: Capital = memory, lower case = registers, ALL_CAPS = compile time. x: (R, N), M results of a row.


@triton.jit(do_not_specialize=["R"])
def _project_kernel(
    X, Phi, Mix, Rstd, R, N,
    EPS: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, ROWS)[:, None]
    result = tl.arange(0, WIDTH)[None, :]
    for tile in range(tl.program_id(0), tl.cdiv(R, ROWS), tl.num_programs(0)):
        base = int64(tile) * ROWS * N
        live = tile * ROWS + row < R
        total = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
        squares = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for start in range(0, N, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            x = tl.load(X + base + row * N + cols[None, :], mask=live & (cols[None, :] < N), other=0.0)
            mask = (cols[:, None] < N) & (result < M)
            phi = tl.load(Phi + cols[:, None] * M + result, mask=mask, other=0.0)
            wide = x.to(tl.float32)
            squares += wide * wide
            if X.dtype.element_ty == Phi.dtype.element_ty:
                total += tl.dot(x, phi, input_precision="ieee")
            else:
                total += tl.dot(wide, phi.to(tl.float32), input_precision="ieee")
        rstd = tl.rsqrt(tl.sum(squares, axis=1)[:, None] / N + EPS)
        tl.store(Mix + int64(tile) * ROWS * M + row * M + result, total * rstd, mask=live & (result < M))
        tl.store(Rstd + tile * ROWS + row, rstd, mask=live)


@triton.jit
def _logits(Mix, Scale, B, base, at, mask, part, known, OTHER: tl.constexpr):
    """z = mix * scale + b, OTHER outside; at, mask: places in a tile of mix; part, known: the same in scale and b."""
    mix = tl.load(Mix + base + at, mask=mask, other=0.0)
    scale = tl.load(Scale + part, mask=known, other=0.0)
    return tl.where(mask, mix * scale + tl.load(B + part, mask=known, other=0.0), OTHER)


@triton.jit
def _softmax(z, mask):
    """Over axis 1 of (ROWS, S, S), 0 outside the mask, where there may be whole columns."""
    p = tl.where(mask, exp(z - tl.max(z, axis=1)[:, None, :]), 0.0)
    total = tl.sum(p, axis=1)
    return p / tl.where(total > 0.0, total, 1.0)[:, None, :]


@triton.jit
def _divisor(y, AXIS: tl.constexpr, EPS: tl.constexpr, STREAMS: tl.constexpr, S: tl.constexpr):
    """The sums of y (ROWS, S, S) over an axis, + EPS, as (ROWS, S); 1 where there is no stream."""
    return tl.where(tl.arange(0, S)[None, :] < STREAMS, tl.sum(y, axis=AXIS) + EPS, 1.0)


@triton.jit(do_not_specialize=["R"])
def _weights_kernel(
    Mix, Scale, B, Pre, Post, Res, Divisors, R,
    PRE_EPS: tl.constexpr, EPS: tl.constexpr, POST_MULT: tl.constexpr, TMAX: tl.constexpr, STREAMS: tl.constexpr,
    S: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Pre, Post, Res, or Divisors (R, 2 * TMAX - 1, STREAMS), of the steps after the softmax."""
    M: tl.constexpr = STREAMS * (STREAMS + 2)
    STEPS: tl.constexpr = 2 * TMAX - 1
    row = tl.arange(0, ROWS)
    j = tl.arange(0, S)[None, :]
    i = tl.arange(0, S)[None, None, :]
    o = tl.arange(0, S)[None, :, None]
    known = (i < STREAMS) & (o < STREAMS)
    for tile in range(tl.program_id(0), tl.cdiv(R, ROWS), tl.num_programs(0)):
        first = int64(tile) * ROWS
        live = (tile * ROWS + row < R)[:, None]
        mask = live & (j < STREAMS)
        if Pre is not None:
            at = row[:, None] * M + j
            out = row[:, None] * STREAMS + j
            pre = tl.sigmoid(_logits(Mix, Scale, B, first * M, at, mask, j, j < STREAMS, 0.0))
            tl.store(Pre + first * STREAMS + out, pre + PRE_EPS, mask=mask)
            at += STREAMS
            post = tl.sigmoid(_logits(Mix, Scale, B, first * M, at, mask, j + STREAMS, j < STREAMS, 0.0))
            tl.store(Post + first * STREAMS + out, post * POST_MULT, mask=mask)
        square = (tile * ROWS + row < R)[:, None, None] & known
        part = 2 * STREAMS + o * STREAMS + i
        at = row[:, None, None] * M + part
        p = _softmax(_logits(Mix, Scale, B, first * M, at, square, part, known, -1e30), square)
        y = tl.where(square, p + EPS, 0.0)
        at = row[:, None] * (STEPS * STREAMS) + j
        if Divisors is not None:
            Divisors += first * STEPS * STREAMS
        for step in range(TMAX):
            if step > 0:
                divisor = _divisor(y, 1, EPS, STREAMS, S)
                y = y / divisor[:, None, :]
                if Divisors is not None:
                    tl.store(Divisors + at + (2 * step - 1) * STREAMS, divisor, mask=mask)
            divisor = _divisor(y, 2, EPS, STREAMS, S)
            y = y / divisor[:, :, None]
            if Divisors is not None:
                tl.store(Divisors + at + 2 * step * STREAMS, divisor, mask=mask)
        if Divisors is not None:
            Divisors -= first * STEPS * STREAMS
        if Res is not None:
            at = row[:, None, None] * (STREAMS * STREAMS) + o * STREAMS + i
            tl.store(Res + first * (STREAMS * STREAMS) + at, y, mask=square)


@triton.jit(do_not_specialize=["R"])
def _weights_backward_kernel(
    dPre, dPost, dRes, Mix, Scale, B, Res, Divisors, dZ, R,
    EPS: tl.constexpr, POST_MULT: tl.constexpr, TMAX: tl.constexpr, STREAMS: tl.constexpr, S: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """dZ (R, M). Each step is undone with its divisor, so that no step's result is kept."""
    M: tl.constexpr = STREAMS * (STREAMS + 2)
    STEPS: tl.constexpr = 2 * TMAX - 1
    row = tl.arange(0, ROWS)
    j = tl.arange(0, S)[None, :]
    i = tl.arange(0, S)[None, None, :]
    o = tl.arange(0, S)[None, :, None]
    known = (i < STREAMS) & (o < STREAMS)
    for tile in range(tl.program_id(0), tl.cdiv(R, ROWS), tl.num_programs(0)):
        first = int64(tile) * ROWS
        mask = (tile * ROWS + row < R)[:, None] & (j < STREAMS)
        at = row[:, None] * M + j
        grads = row[:, None] * STREAMS + j
        p = tl.sigmoid(_logits(Mix, Scale, B, first * M, at, mask, j, j < STREAMS, 0.0))
        dz = tl.load(dPre + first * STREAMS + grads, mask=mask, other=0.0) * p * (1.0 - p)
        tl.store(dZ + first * M + at, dz, mask=mask)
        at += STREAMS
        p = tl.sigmoid(_logits(Mix, Scale, B, first * M, at, mask, j + STREAMS, j < STREAMS, 0.0))
        dz = tl.load(dPost + first * STREAMS + grads, mask=mask, other=0.0) * POST_MULT * p * (1.0 - p)
        tl.store(dZ + first * M + at, dz, mask=mask)

        square = (tile * ROWS + row < R)[:, None, None] & known
        at = row[:, None, None] * (STREAMS * STREAMS) + o * STREAMS + i
        y = tl.load(Res + first * (STREAMS * STREAMS) + at, mask=square, other=0.0)
        d = tl.load(dRes + first * (STREAMS * STREAMS) + at, mask=square, other=0.0)
        divisors = Divisors + first * STEPS * STREAMS
        at = row[:, None] * (STEPS * STREAMS) + j
        for back in range(TMAX):
            step = TMAX - 1 - back
            divisor = tl.load(divisors + at + 2 * step * STREAMS, mask=mask, other=1.0)
            d = (d - tl.sum(d * y, axis=2)[:, :, None]) / divisor[:, :, None]
            y = y * divisor[:, :, None]
            if step > 0:
                divisor = tl.load(divisors + at + (2 * step - 1) * STREAMS, mask=mask, other=1.0)
                d = (d - tl.sum(d * y, axis=1)[:, None, :]) / divisor[:, None, :]
                y = y * divisor[:, None, :]
        part = 2 * STREAMS + o * STREAMS + i
        at = row[:, None, None] * M + part
        p = _softmax(_logits(Mix, Scale, B, first * M, at, square, part, known, -1e30), square)
        dz = p * (d - tl.sum(d * p, axis=1)[:, None, :])
        tl.store(dZ + first * M + at, dz, mask=square)


@triton.jit(do_not_specialize=["R", "n_shares"])
def _project_backward_kernel(
    dZ, X, Phi, Scale, Mix, Rstd, dX, dPhi, R, N, n_shares,
    M: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dPhi (n_shares, N, M): each share's sums over its rows, of a strip of BLOCK columns of x."""
    row = tl.arange(0, ROWS)[:, None]
    result = tl.arange(0, WIDTH)[None, :]
    # Loaded flat: a (1, WIDTH) tile that meets a product's operand is what Huawei's compiler for a 950 fails at.
    flat = tl.arange(0, WIDTH)
    scale = tl.load(Scale + flat, mask=flat < M, other=0.0)[None, :]
    for unit in range(tl.program_id(0), tl.cdiv(N, BLOCK) * n_shares, tl.num_programs(0)):
        share = unit % n_shares
        start = (unit // n_shares) * BLOCK
        col = tl.arange(0, BLOCK)
        cols = start + col[None, :]
        known = (start + col[:, None] < N) & (result < M)
        phi = tl.load(Phi + int64(start) * M + col[:, None] * M + result, mask=known, other=0.0).to(tl.float32)
        total = tl.zeros((BLOCK, WIDTH), dtype=tl.float32)
        for tile in range(share, tl.cdiv(R, ROWS), n_shares):
            live = tile * ROWS + row < R
            at = int64(tile) * ROWS * M
            slope = tl.load(dZ + at + row * M + result, mask=live & (result < M), other=0.0) * scale
            mix = tl.load(Mix + at + row * M + result, mask=live & (result < M), other=0.0)
            rstd = tl.load(Rstd + tile * ROWS + row, mask=live, other=0.0)
            inner = tl.sum(slope * mix, axis=1)[:, None] * (rstd * rstd / N)
            slope *= rstd
            mask = live & (cols < N)
            base = int64(tile) * ROWS * N
            x = tl.load(X + base + row * N + cols, mask=mask, other=0.0).to(tl.float32)
            dx = tl.dot(slope, tl.trans(phi), input_precision="ieee") - inner * x
            tl.store(dX + base + row * N + cols, dx.to(dX.dtype.element_ty), mask=mask)
            total += tl.dot(tl.trans(x), slope, input_precision="ieee")
        tl.store(dPhi + (int64(share) * N + int64(start)) * M + col[:, None] * M + result, total, mask=known)


# Config


@dataclass(frozen=True)
class Tiles:
    """rows x block of x at once by `num_warps` warps, and in how many shares the backward walks the rows of a strip."""

    rows: int
    block: int
    shares: int
    num_warps: int

    @classmethod
    def choose(cls, n_rows: int, n_cols: int, device: torch.device, rows: int, block: int) -> Tiles:
        """A program per tile of rows forward; backward strips times shares, a few programs for each core."""
        backend = device_of(device)
        limit = backend.cores(device) * (4 if backend.threads else 1)
        shares = max(1, min(cdiv(n_rows, rows), limit // cdiv(n_cols, block)))
        return cls(rows, block, shares, min(4, backend.max_warps))


def _small(n_rows, n, device):
    """(S, rows, programs, num_warps) of the kernels on a row's matrix: 8 elements of it to a lane."""
    backend = device_of(device)
    size = power_of_2_from(n)
    # Without threads all tiles share a core's buffer: of 1024 elements, the backward's took 328 KB of a 910B's 192.
    rows = max(1, (1024 if backend.threads else 512) // size**2)
    warps = max(1, min(rows * size**2 // (backend.warp_width * 8), backend.max_warps))
    return size, rows, programs_for(cdiv(n_rows, rows), device), warps


# Launchers


def _width(results):
    return max(16, power_of_2_from(results))  # what a matrix product takes at least


def _launch_weights(mix, scale, b, n, tmax, eps, results, divisors, pre_eps=0.0, post_mult=1.0):
    size, rows, programs, warps = _small(mix.shape[0], n, mix.device)
    launch(
        _weights_kernel, programs, mix.device, mix, scale, b, *results, divisors, mix.shape[0],
        PRE_EPS=pre_eps, EPS=eps, POST_MULT=post_mult, TMAX=tmax, STREAMS=n, S=size, ROWS=rows, num_warps=warps,
    )  # fmt: skip


def mhc_coeffs_forward(x, phi, scale, b, tmax, rms_eps, pre_eps, sinkhorn_eps, post_mult, tiles=None):
    """x: (R, n, C), phi: (n C, M), scale, b: (M,) in fp32, contiguous

    -> h_pre and h_post (R, n), h_res (R, n, n), mix (R, M), rstd (R,), all in fp32.
    """
    rows, n, width = x.shape
    results = phi.shape[1]
    shapes = (rows, n), (rows, n), (rows, n, n), (rows, results), (rows,)
    *found, mix, rstd = (torch.empty(s, dtype=torch.float32, device=x.device) for s in shapes)
    if x.numel():
        tiles = tiles or Tiles.choose(rows, n * width, x.device, rows=32, block=128)
        launch(
            _project_kernel, programs_for(cdiv(rows, tiles.rows), x.device), x.device,
            x, phi, mix, rstd, rows, n * width, EPS=rms_eps, M=results, WIDTH=_width(results), ROWS=tiles.rows,
            BLOCK=tiles.block, num_warps=tiles.num_warps,
        )  # fmt: skip
        _launch_weights(mix, scale, b, n, tmax, sinkhorn_eps, found, None, pre_eps, post_mult)
    return *found, mix, rstd


def mhc_coeffs_backward(
    d_pre, d_post, d_res, x, phi, scale, b, h_res, mix, rstd, tmax, sinkhorn_eps, post_mult, tiles=None
):  # fmt: skip
    """What forward took and gave, and gradients of its first three results -> dx, dphi, dscale (M,), db (M,)."""
    rows, n, width = x.shape
    results, dx = phi.shape[1], torch.empty_like(x)
    if not x.numel():
        return dx, torch.zeros_like(phi), torch.zeros_like(scale), torch.zeros_like(b)
    divisors = torch.empty(rows, 2 * tmax - 1, n, dtype=torch.float32, device=x.device)
    _launch_weights(mix, scale, b, n, tmax, sinkhorn_eps, (None, None, None), divisors)
    dz = torch.empty_like(mix)
    size, at_once, programs, warps = _small(rows, n, x.device)
    launch(
        _weights_backward_kernel, programs, x.device, d_pre, d_post, d_res, mix, scale, b, h_res, divisors, dz, rows,
        EPS=sinkhorn_eps, POST_MULT=post_mult, TMAX=tmax, STREAMS=n, S=size, ROWS=at_once, num_warps=warps,
    )  # fmt: skip
    del divisors
    tiles = tiles or Tiles.choose(rows, n * width, x.device, rows=32, block=64)
    partial = torch.empty(tiles.shares, n * width * results, dtype=torch.float32, device=x.device)
    strips = cdiv(n * width, tiles.block)
    launch(
        _project_backward_kernel, programs_for(strips * tiles.shares, x.device), x.device,
        dz, x, phi, scale, mix, rstd, dx, partial, rows, n * width, tiles.shares,
        M=results, WIDTH=_width(results), ROWS=tiles.rows, BLOCK=tiles.block, num_warps=tiles.num_warps,
    )  # fmt: skip
    dphi = sum_rows(partial, phi.dtype).view(phi.shape)
    return dx, dphi, (dz * mix).sum(0), dz.sum(0)


KERNELS = Kernels(mhc_coeffs_forward, mhc_coeffs_backward)
