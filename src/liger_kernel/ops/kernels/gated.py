"""Gated units in Triton, act(a) * b: the kernels of swiglu and geglu, whose mathematics is in their rooms."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from liger_kernel.ops.kernels.blocks import (
    Flat,
    cdiv,
    exp,
    in_units,
    index,
    int64,
    is_wide,
    launch,
    programs_for,
    rounded,
)

# Kernels: every activation here is x * p(x), so its derivative is p + x * p'.


@triton.jit
def _gate(x, ACT: tl.constexpr):
    """p and p' of act(x) = x * p(x)."""
    if ACT == "silu":
        p = tl.sigmoid(x)
        dp = p * (1.0 - p)
    elif ACT == "gelu_tanh":  # 0.5 * (1 + tanh(u)) = sigmoid(2u)
        square = x * x
        p = tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * square))
        dp = p * (1.0 - p) * (1.5957691216057308 * (1.0 + 0.134145 * square))
    else:
        p = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        dp = 0.3989422804014327 * exp(-0.5 * x * x)
    return p, dp


@triton.jit
def _rounded_gate(p, ACT: tl.constexpr):
    """p with the bits that torch's 0.5 * (1 + tanh) keeps of it."""
    if ACT == "gelu_tanh":
        p = ((2.0 * p - 1.0) + 1.0) * 0.5
    return p


@triton.jit
def _scaled(x, FACTOR: tl.constexpr, DTYPE: tl.constexpr):
    if FACTOR != 1.0:
        x = rounded(x * FACTOR, DTYPE)
    return x


@triton.jit(do_not_specialize=["n_tiles", "n_per_row", "n_units"])
def _forward_kernel(
    A, B, C, n_tiles, n_per_row, n_units,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, ACT: tl.constexpr, GATE: tl.constexpr, DOWN: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = C.dtype.element_ty
    cols = tl.arange(0, BLOCK)
    n = index(n_units, WIDE) * UNIT
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        row = tile // n_per_row
        start = index(tile - row * n_per_row, WIDE) * BLOCK
        mask = start + cols < n
        at = int64(row) * n * WIDTH + start
        a = tl.load(A + at + cols, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(B + at + cols, mask=mask, other=0.0).to(tl.float32)
        a = _scaled(a, GATE, DTYPE)
        p, dp = _gate(a, ACT)
        act = rounded(a * _rounded_gate(p, ACT), DTYPE)
        c = _scaled(rounded(act * b, DTYPE), DOWN, DTYPE)
        tl.store(C + int64(row) * n + start + cols, c.to(DTYPE), mask=mask)


@triton.jit(do_not_specialize=["n_tiles", "n_per_row", "n_units"])
def _backward_kernel(
    dC, A, B, dA, dB, n_tiles, n_per_row, n_units,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, ACT: tl.constexpr, GATE: tl.constexpr, DOWN: tl.constexpr,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = A.dtype.element_ty
    cols = tl.arange(0, BLOCK)
    n = index(n_units, WIDE) * UNIT
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        row = tile // n_per_row
        start = index(tile - row * n_per_row, WIDE) * BLOCK
        mask = start + cols < n
        at = int64(row) * n * WIDTH + start
        a = tl.load(A + at + cols, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(B + at + cols, mask=mask, other=0.0).to(tl.float32)
        dc = tl.load(dC + int64(row) * n + start + cols, mask=mask, other=0.0).to(tl.float32) * DOWN
        a = _scaled(a, GATE, DTYPE)
        p, dp = _gate(a, ACT)
        tl.store(dA + at + cols, (dc * b * (p + a * dp) * GATE).to(DTYPE), mask=mask)
        tl.store(dB + at + cols, (dc * a * p).to(DTYPE), mask=mask)


# Launchers


def _run(kernel, tensors, rows, n_cols, width, act, gate, down, device, config):
    if not rows * n_cols:
        return
    config = config or Flat.choose(device, None if rows == 1 else n_cols)
    per_row = cdiv(n_cols, config.block)
    units, unit = in_units(n_cols)
    launch(
        kernel, programs_for(rows * per_row, device), device,
        *tensors, rows * per_row, per_row, units, UNIT=unit, WIDTH=width, ACT=act, GATE=float(gate), DOWN=float(down),
        BLOCK=config.block, WIDE=is_wide(n_cols), num_warps=config.num_warps,
    )  # fmt: skip


def forward(a, b, act, gate=1.0, down=1.0, config=None):
    """a, b: contiguous, one shape -> c = act(gate * a) * b * down in fresh memory."""
    c = torch.empty_like(a)
    _run(_forward_kernel, (a, b, c), 1, a.numel(), 1, act, gate, down, a.device, config)
    return c


def backward(dc, a, b, act, gate=1.0, down=1.0, in_place=False, config=None):
    """-> da, db; in_place writes them over a and b."""
    da, db = (a, b) if in_place else (torch.empty_like(a), torch.empty_like(b))
    _run(_backward_kernel, (dc, a, b, da, db), 1, a.numel(), 1, act, gate, down, a.device, config)
    return da, db


def packed_forward(y, act, config=None):
    """y: (..., 2I) contiguous, the gate first -> c (..., I)."""
    n_cols = y.shape[-1] // 2
    c = y.new_empty(*y.shape[:-1], n_cols)
    rows = c.numel() // n_cols if n_cols else 0
    _run(_forward_kernel, (*y.split(n_cols, -1), c), rows, n_cols, 2, act, 1.0, 1.0, y.device, config)
    return c


def packed_backward(dc, y, act, in_place=False, config=None):
    """-> dy like y; in_place writes it over y."""
    n_cols = y.shape[-1] // 2
    dy = y if in_place else torch.empty_like(y)
    tensors = dc, *y.split(n_cols, -1), *dy.split(n_cols, -1)
    rows = dc.numel() // n_cols if n_cols else 0
    _run(_backward_kernel, tensors, rows, n_cols, 2, act, 1.0, 1.0, y.device, config)
    return dy
