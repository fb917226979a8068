"""Streams mixed by weights of each row, in Triton: what mhc_pre (one result) and mhc_post_res (n, and f) launch.

A program holds all streams of a row, BLOCK columns at once, so that each is read once whatever number it is mixed to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from liger_kernel.backends import device_of
from liger_kernel.ops.kernels.blocks import cdiv, int64, launch, power_of_2_from, programs_for

# Kernels: Capital = memory, lower case = registers, ALL_CAPS = compile time. y_o = sum of h[o, i] x_i + p[o] f.


@triton.jit
def _load(X, row, start, N, STREAMS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """All streams of a row from column `start`, as (WIDTH, BLOCK) in fp32, zeros outside."""
    i = tl.arange(0, WIDTH)[:, None]
    cols = start + tl.arange(0, BLOCK)[None, :]
    base = int64(row) * STREAMS * N
    return tl.load(X + base + i * N + cols, mask=(i < STREAMS) & (cols < N), other=0.0).to(tl.float32)


@triton.jit
def _load_one(X, row, start, N, BLOCK: tl.constexpr):
    """Row `row` of X from column `start`, as (1, BLOCK) in fp32."""
    cols = start + tl.arange(0, BLOCK)[None, :]
    return tl.load(X + int64(row) * N + cols, mask=cols < N, other=0.0).to(tl.float32)


@triton.jit
def _weights(H, line, STREAMS: tl.constexpr, WIDTH: tl.constexpr):
    """A line of h as (WIDTH, 1)."""
    i = tl.arange(0, WIDTH)[:, None]
    return tl.load(H + line * STREAMS + i, mask=i < STREAMS, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["R"])
def _forward_kernel(
    X, H, F, Post, Y, R, N,
    OUT: tl.constexpr, STREAMS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    strips = tl.cdiv(N, BLOCK)
    for unit in range(tl.program_id(0), R * strips, tl.num_programs(0)):
        row = unit // strips
        start = (unit % strips) * BLOCK
        cols = start + tl.arange(0, BLOCK)[None, :]
        x = _load(X, row, start, N, STREAMS, WIDTH, BLOCK)
        if F is not None:
            f = _load_one(F, row, start, N, BLOCK)
        for o in tl.static_range(OUT):
            y = tl.sum(_weights(H, int64(row) * OUT + o, STREAMS, WIDTH) * x, axis=0)[None, :]
            if F is not None:
                y += tl.load(Post + int64(row) * OUT + o).to(tl.float32) * f
            tl.store(Y + (int64(row) * OUT + o) * N + cols, y.to(Y.dtype.element_ty), mask=cols < N)


@triton.jit(do_not_specialize=["R"])
def _backward_kernel(
    dY, X, H, F, Post, dX, dH, dF, dPost, R, N,
    OUT: tl.constexpr, LINES: tl.constexpr, STREAMS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    line = tl.arange(0, LINES)[:, None]
    i = tl.arange(0, WIDTH)
    for row in range(tl.program_id(0), R, tl.num_programs(0)):
        dh = tl.zeros((LINES, WIDTH), dtype=tl.float32)
        dpost = tl.zeros((LINES, 1), dtype=tl.float32)
        for start in range(0, N, BLOCK):
            cols = start + tl.arange(0, BLOCK)[None, :]
            x = _load(X, row, start, N, STREAMS, WIDTH, BLOCK)
            dx = tl.zeros((WIDTH, BLOCK), dtype=tl.float32)
            if F is not None:
                f = _load_one(F, row, start, N, BLOCK)
                df = tl.zeros((1, BLOCK), dtype=tl.float32)
            for o in tl.static_range(OUT):
                dy = _load_one(dY, int64(row) * OUT + o, start, N, BLOCK)
                dx += _weights(H, int64(row) * OUT + o, STREAMS, WIDTH) * dy
                dh += tl.where(line == o, tl.sum(x * dy, axis=1)[None, :], 0.0)
                if F is not None:
                    df += tl.load(Post + int64(row) * OUT + o).to(tl.float32) * dy
                    dpost += tl.where(line == o, tl.sum(f * dy, axis=1)[:, None], 0.0)
            mask = (i[:, None] < STREAMS) & (cols < N)
            at = dX + int64(row) * STREAMS * N + i[:, None] * N + cols
            tl.store(at, dx.to(dX.dtype.element_ty), mask=mask)
            if F is not None:
                tl.store(dF + int64(row) * N + cols, df.to(dF.dtype.element_ty), mask=cols < N)
        at = dH + int64(row) * OUT * STREAMS + line * STREAMS + i[None, :]
        tl.store(at, dh.to(dH.dtype.element_ty), mask=(line < OUT) & (i[None, :] < STREAMS))
        if F is not None:
            tl.store(dPost + int64(row) * OUT + line, dpost.to(dPost.dtype.element_ty), mask=line < OUT)


# Config


@dataclass(frozen=True)
class Streams:
    """`width` streams, `block` columns of each at once, by `num_warps` warps."""

    width: int
    block: int
    num_warps: int

    @classmethod
    def choose(cls, streams: int, n_cols: int, device: torch.device, elements: int) -> Streams:
        """elements: of a tile of all streams, 32 a lane."""
        backend = device_of(device)
        width = power_of_2_from(streams)
        block = max(1, min(power_of_2_from(n_cols), min(elements, backend.max_block(4)) // width))
        return cls(width, block, max(1, min(width * block // (backend.warp_width * 32), backend.max_warps)))


# Launchers


def mix_forward(x, h, f=None, h_post=None, streams=None):
    """x: (R, n, C), h: (R, O, n), f: (R, C), h_post: (R, O), contiguous -> y (R, O, C) like x."""
    (rows, n, cols), out = x.shape, h.shape[1]
    y = torch.empty(rows, out, cols, dtype=x.dtype, device=x.device)
    if x.numel():
        streams = streams or Streams.choose(n, cols, x.device, elements=4096)
        launch(
            _forward_kernel, programs_for(rows * cdiv(cols, streams.block), x.device), x.device,
            x, h, f, h_post, y, rows, cols, OUT=out, STREAMS=n, WIDTH=streams.width, BLOCK=streams.block,
            num_warps=streams.num_warps,
        )  # fmt: skip
    return y


def mix_backward(dy, x, h, f=None, h_post=None, streams=None):
    """dy: (R, O, C), the others as forward -> dx, dh, df, dh_post, each like its own or None."""
    (rows, n, cols), out = x.shape, h.shape[1]
    dx, dh, df, dpost = (None if t is None else torch.empty_like(t) for t in (x, h, f, h_post))
    if x.numel():
        streams = streams or Streams.choose(n, cols, x.device, elements=8192)
        launch(
            _backward_kernel, programs_for(rows, x.device), x.device,
            dy, x, h, f, h_post, dx, dh, df, dpost, rows, cols,
            OUT=out, LINES=power_of_2_from(out), STREAMS=n, WIDTH=streams.width, BLOCK=streams.block,
            num_warps=streams.num_warps,
        )  # fmt: skip
    return dx, dh, df, dpost
