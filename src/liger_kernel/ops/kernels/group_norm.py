"""GroupNorm in Triton; the mathematics is in liger_kernel.ops.group_norm.

A program takes a group of a sample, which is a matrix of PER channels by L places, in tiles of CHANNELS x BLOCK. L
changes with the size of an image, so it comes as n_units units of UNIT places, and compiles nothing anew.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from liger_kernel.backends import device_of
from liger_kernel.ops.core import Kernels
from liger_kernel.ops.kernels.blocks import in_units, int64, launch, power_of_2_from, programs_for, sum_rows

# Kernels: Capital = memory, lower case = registers, ALL_CAPS = compile time.


@triton.jit(do_not_specialize=["R", "n_units"])
def _forward_kernel(
    X, W, B, Y, Mean, Rstd, R, n_units,
    EPS: tl.constexpr, UNIT: tl.constexpr, GROUPS: tl.constexpr, PER: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    places = n_units * UNIT
    size = PER * places
    channel = tl.arange(0, CHANNELS)[:, None]
    place = tl.arange(0, BLOCK)[None, :]
    for row in range(tl.program_id(0), R, tl.num_programs(0)):
        base = int64(row) * size
        first = (row % GROUPS) * PER
        total = tl.zeros((CHANNELS, BLOCK), dtype=tl.float32)
        for c in range(0, PER, CHANNELS):
            for start in range(0, places, BLOCK):
                mask = (c + channel < PER) & (start + place < places)
                at = (c + channel) * places + start + place
                total += tl.load(X + base + at, mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(tl.sum(total, axis=1), axis=0) / size
        total = tl.zeros((CHANNELS, BLOCK), dtype=tl.float32)
        for c in range(0, PER, CHANNELS):
            for start in range(0, places, BLOCK):
                mask = (c + channel < PER) & (start + place < places)
                at = (c + channel) * places + start + place
                x = tl.load(X + base + at, mask=mask, other=0.0).to(tl.float32)
                centred = tl.where(mask, x - mean, 0.0)
                total += centred * centred
        rstd = tl.rsqrt(tl.sum(tl.sum(total, axis=1), axis=0) / size + EPS)
        for c in range(0, PER, CHANNELS):
            w = tl.load(W + first + c + channel, mask=c + channel < PER, other=0.0).to(tl.float32)
            b = tl.load(B + first + c + channel, mask=c + channel < PER, other=0.0).to(tl.float32)
            for start in range(0, places, BLOCK):
                mask = (c + channel < PER) & (start + place < places)
                at = (c + channel) * places + start + place
                x = tl.load(X + base + at, mask=mask, other=0.0).to(tl.float32)
                tl.store(Y + base + at, ((x - mean) * rstd * w + b).to(Y.dtype.element_ty), mask=mask)
        tl.store(Mean + row, mean)
        tl.store(Rstd + row, rstd)


@triton.jit(do_not_specialize=["R", "n_units"])
def _backward_kernel(
    dY, X, W, Mean, Rstd, dX, dW, dB, R, n_units,
    UNIT: tl.constexpr, GROUPS: tl.constexpr, PER: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dW, dB (B, C): each sample's share; their sums, weighted, are also those of m and m * x_hat."""
    places = n_units * UNIT
    size = PER * places
    channel = tl.arange(0, CHANNELS)[:, None]
    place = tl.arange(0, BLOCK)[None, :]
    for row in range(tl.program_id(0), R, tl.num_programs(0)):
        base = int64(row) * size
        first = (row % GROUPS) * PER
        shares = int64(row) * PER
        mean = tl.load(Mean + row)
        rstd = tl.load(Rstd + row)
        sum_m = 0.0
        sum_mx = 0.0
        for c in range(0, PER, CHANNELS):
            known = c + channel < PER
            w = tl.load(W + first + c + channel, mask=known, other=0.0).to(tl.float32)
            dw = tl.zeros((CHANNELS, BLOCK), dtype=tl.float32)
            db = tl.zeros((CHANNELS, BLOCK), dtype=tl.float32)
            for start in range(0, places, BLOCK):
                mask = known & (start + place < places)
                at = (c + channel) * places + start + place
                dy = tl.load(dY + base + at, mask=mask, other=0.0).to(tl.float32)
                x = tl.load(X + base + at, mask=mask, other=0.0).to(tl.float32)
                dw += dy * ((x - mean) * rstd)
                db += dy
            dw_c = tl.sum(dw, axis=1)[:, None]
            db_c = tl.sum(db, axis=1)[:, None]
            tl.store(dW + shares + c + channel, dw_c, mask=known)
            tl.store(dB + shares + c + channel, db_c, mask=known)
            sum_mx += tl.sum(tl.sum(w * dw_c, axis=1), axis=0)
            sum_m += tl.sum(tl.sum(w * db_c, axis=1), axis=0)
        mean_m = sum_m / size
        mean_mx = sum_mx / size
        for c in range(0, PER, CHANNELS):
            w = tl.load(W + first + c + channel, mask=c + channel < PER, other=0.0).to(tl.float32)
            for start in range(0, places, BLOCK):
                mask = (c + channel < PER) & (start + place < places)
                at = (c + channel) * places + start + place
                dy = tl.load(dY + base + at, mask=mask, other=0.0).to(tl.float32)
                x_hat = (tl.load(X + base + at, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
                dx = rstd * (dy * w - mean_m - x_hat * mean_mx)
                tl.store(dX + base + at, dx.to(dX.dtype.element_ty), mask=mask)


# Config


@dataclass(frozen=True)
class Tile:
    """channels x block elements at once, by `num_warps` warps."""

    channels: int
    block: int
    num_warps: int

    @classmethod
    def choose(cls, per: int, places: int, device: torch.device, elements: int = 4096) -> Tile:
        """per: channels of a group. A tile holds whole channels where they are short."""
        backend = device_of(device)
        block = min(power_of_2_from(max(places, 1)), elements)
        channels = min(power_of_2_from(per), elements // block)
        # 16 elements a lane: as many loads in flight as the registers of forward and backward leave room for
        return cls(channels, block, max(1, min(channels * block // (backend.warp_width * 16), backend.max_warps)))


# Launchers


def _launch(kernel, x, num_groups, tile, *tensors, **options):
    batch, channels = x.shape[:2]
    per, places = channels // num_groups, x.numel() // (batch * channels)
    tile = tile or Tile.choose(per, places, x.device)
    n_units, unit = in_units(places)
    launch(
        kernel, programs_for(batch * num_groups, x.device), x.device, *tensors, batch * num_groups, n_units,
        UNIT=unit, GROUPS=num_groups, PER=per, CHANNELS=tile.channels, BLOCK=tile.block, num_warps=tile.num_warps,
        **options,
    )  # fmt: skip


def group_norm_forward(x, w, b, num_groups, eps, tile=None):
    """x: (B, C, *) contiguous; w, b: (C,) -> y like x, mean and rstd (B, G) in fp32."""
    y = torch.empty_like(x)
    mean, rstd = (torch.empty(x.shape[0], num_groups, dtype=torch.float32, device=x.device) for _ in range(2))
    if x.numel():
        _launch(_forward_kernel, x, num_groups, tile, x, w, b, y, mean, rstd, EPS=eps)
    return y, mean, rstd


def group_norm_backward(dy, x, w, mean, rstd, num_groups, needs_dw, needs_db, tile=None):
    """dy, x: (B, C, *) contiguous -> dx like x, dw and db like w (or None)."""
    dx = torch.empty_like(x)
    if not x.numel():
        return dx, *(torch.zeros_like(w) if needed else None for needed in (needs_dw, needs_db))
    dw, db = (torch.empty(x.shape[:2], dtype=torch.float32, device=x.device) for _ in range(2))
    _launch(_backward_kernel, x, num_groups, tile, dy, x, w, mean, rstd, dx, dw, db)
    return dx, sum_rows(dw, w.dtype) if needs_dw else None, sum_rows(db, w.dtype) if needs_db else None


KERNELS = Kernels(group_norm_forward, group_norm_backward)
