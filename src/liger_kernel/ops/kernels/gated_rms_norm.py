"""Gated RMSNorm in Triton; the mathematics is in liger_kernel.ops.gated_rms_norm."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from liger_kernel.ops.core import Kernels
from liger_kernel.ops.kernels.blocks import RowTiles, as_rows, int64, launch, rounded, sum_rows

# Kernels: Capital = memory, lower case = registers, ALL_CAPS = compile time. A row is G groups of N columns.


@triton.jit
def _act(gate, SILU: tl.constexpr):
    if SILU:
        return gate * tl.sigmoid(gate)
    else:
        return tl.sigmoid(gate)


@triton.jit
def _d_act(gate, SILU: tl.constexpr):
    p = tl.sigmoid(gate)
    if SILU:
        return p + gate * p * (1.0 - p)
    else:
        return p * (1.0 - p)


@triton.jit
def _load(X, tile, group, start, R, N, G, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Columns start ... of a group of rows tile * ROWS ..., in X's dtype, zeros outside; tile may lie past the end."""
    row = tl.arange(0, ROWS)[:, None]
    cols = start + tl.arange(0, BLOCK)[None, :]
    mask = (tile * ROWS + row < R) & (cols < N)
    return tl.load(X + int64(tile) * ROWS * N * G + group * N + row * (N * G) + cols, mask=mask, other=0.0)


@triton.jit
def _store(Y, y, tile, group, start, R, N, G, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.arange(0, ROWS)[:, None]
    cols = start + tl.arange(0, BLOCK)[None, :]
    mask = (tile * ROWS + row < R) & (cols < N)
    at = Y + int64(tile) * ROWS * N * G + group * N + row * (N * G) + cols
    tl.store(at, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _weight(W, group, start, N, BLOCK: tl.constexpr):
    if W is None:
        return tl.full((1, BLOCK), 1.0, tl.float32)
    else:
        cols = start + tl.arange(0, BLOCK)[None, :]
        return tl.load(W + group * N + cols, mask=cols < N, other=0.0)


@triton.jit
def _scale(x, gate, W, mean_sq, group, start, N,
           EPS: tl.constexpr, GATE_FIRST: tl.constexpr, SILU: tl.constexpr, LLAMA: tl.constexpr, DTYPE: tl.constexpr,
           BLOCK: tl.constexpr):  # fmt: skip
    act = _act(gate, SILU)
    y = x * tl.rsqrt(mean_sq + EPS)
    if GATE_FIRST:
        y = x * act * tl.rsqrt(mean_sq + EPS)
    if LLAMA:
        y = rounded(y, DTYPE)
    if W is not None:
        w = _weight(W, group, start, N, BLOCK)
        y *= w.to(tl.float32)
        if LLAMA and w.dtype == DTYPE:  # of two dtypes the product is fp32
            y = rounded(y, DTYPE)
    if not GATE_FIRST:
        y *= act
    return y


@triton.jit(do_not_specialize=["R"])
def _forward_kernel(
    X, Gate, W, Y, Rstd, R, N, G,
    EPS: tl.constexpr, GATE_FIRST: tl.constexpr, SILU: tl.constexpr, LLAMA: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = X.dtype.element_ty
    row = tl.arange(0, ROWS)[:, None]
    for unit in range(tl.program_id(0), tl.cdiv(R, ROWS) * G, tl.num_programs(0)):
        tile = unit // G
        group = unit % G
        if LOOP:
            sum_sq = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
            for start in range(0, N, BLOCK):
                h = _load(X, tile, group, start, R, N, G, ROWS, BLOCK).to(tl.float32)
                if GATE_FIRST:
                    h *= _act(_load(Gate, tile, group, start, R, N, G, ROWS, BLOCK).to(tl.float32), SILU)
                sum_sq += h * h
            mean_sq = tl.sum(sum_sq, axis=1)[:, None] / N
            for start in range(0, N, BLOCK):
                x = _load(X, tile, group, start, R, N, G, ROWS, BLOCK).to(tl.float32)
                gate = _load(Gate, tile, group, start, R, N, G, ROWS, BLOCK).to(tl.float32)
                y = _scale(x, gate, W, mean_sq, group, start, N, EPS, GATE_FIRST, SILU, LLAMA, DTYPE, BLOCK)
                _store(Y, y, tile, group, start, R, N, G, ROWS, BLOCK)
        else:
            x = _load(X, tile, group, 0, R, N, G, ROWS, BLOCK).to(tl.float32)
            gate = _load(Gate, tile, group, 0, R, N, G, ROWS, BLOCK).to(tl.float32)
            h = x
            if GATE_FIRST:
                h = x * _act(gate, SILU)
            mean_sq = tl.sum(h * h, axis=1)[:, None] / N
            y = _scale(x, gate, W, mean_sq, group, 0, N, EPS, GATE_FIRST, SILU, LLAMA, DTYPE, BLOCK)
            _store(Y, y, tile, group, 0, R, N, G, ROWS, BLOCK)
        tl.store(Rstd + (int64(tile) * ROWS + row) * G + group, tl.rsqrt(mean_sq + EPS), mask=tile * ROWS + row < R)


@triton.jit
def _load_rstd(Rstd, tile, group, R, G, ROWS: tl.constexpr):
    row = tl.arange(0, ROWS)[:, None]
    return tl.load(Rstd + (int64(tile) * ROWS + row) * G + group, mask=tile * ROWS + row < R, other=0.0)


@triton.jit
def _inner(x, gate, dy, GATE_FIRST: tl.constexpr, SILU: tl.constexpr):
    """h and the gradient of its norm times the weight."""
    if GATE_FIRST:
        return x * _act(gate, SILU), dy
    else:
        return x, dy * _act(gate, SILU)


@triton.jit
def _gradients(x, gate, dy, w, dh, rstd, GATE_FIRST: tl.constexpr, SILU: tl.constexpr):
    """dx and dgate."""
    if GATE_FIRST:
        return dh * _act(gate, SILU), dh * x * _d_act(gate, SILU)
    else:
        return dh, dy * x * rstd * w * _d_act(gate, SILU)


@triton.jit
def _x_hat(h, rstd, LLAMA: tl.constexpr, DTYPE: tl.constexpr):
    if LLAMA:  # what the weight was multiplied with in the forward
        return rounded(h * rstd, DTYPE)
    else:
        return h * rstd


@triton.jit(do_not_specialize=["R", "S"])
def _backward_kernel(
    dY, X, Gate, W, Rstd, dX, dGate, dW, R, N, G, S,
    GATE_FIRST: tl.constexpr, SILU: tl.constexpr, LLAMA: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    LOOP: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    """S programs take the groups side by side, each walking the tiles with the others of its group: first, step."""
    DTYPE: tl.constexpr = X.dtype.element_ty
    first = tl.program_id(0) // S
    step = tl.num_programs(0) // S
    cols = tl.arange(0, BLOCK)[None, :]
    for group in range(tl.program_id(0) - first * S, G, S):
        partial = first.to(tl.int64) * N * G + int64(group) * N
        if not LOOP:
            w = _weight(W, group, 0, N, BLOCK)
            if dW is not None:
                dw = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
            if PREFETCH:
                next_x = _load(X, first, group, 0, R, N, G, ROWS, BLOCK)
                next_gate = _load(Gate, first, group, 0, R, N, G, ROWS, BLOCK)
                next_dy = _load(dY, first, group, 0, R, N, G, ROWS, BLOCK)
                next_rstd = _load_rstd(Rstd, first, group, R, G, ROWS)

        for tile in range(first, tl.cdiv(R, ROWS), step):
            if LOOP:
                rstd = _load_rstd(Rstd, tile, group, R, G, ROWS)
                dot = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
                for start in range(0, N, BLOCK):
                    x = _load(X, tile, group, start, R, N, G, ROWS, BLOCK).to(tl.float32)
                    gate = _load(Gate, tile, group, start, R, N, G, ROWS, BLOCK).to(tl.float32)
                    dy = _load(dY, tile, group, start, R, N, G, ROWS, BLOCK).to(tl.float32)
                    h, dn = _inner(x, gate, dy, GATE_FIRST, SILU)
                    dot += dn * h * _weight(W, group, start, N, BLOCK).to(tl.float32)
                mean = tl.sum(dot, axis=1)[:, None] / N
                for start in range(0, N, BLOCK):
                    x = _load(X, tile, group, start, R, N, G, ROWS, BLOCK).to(tl.float32)
                    gate = _load(Gate, tile, group, start, R, N, G, ROWS, BLOCK).to(tl.float32)
                    dy = _load(dY, tile, group, start, R, N, G, ROWS, BLOCK).to(tl.float32)
                    scale = _weight(W, group, start, N, BLOCK).to(tl.float32)
                    h, dn = _inner(x, gate, dy, GATE_FIRST, SILU)
                    dh = rstd * (dn * scale - h * (rstd * rstd * mean))
                    dx, dgate = _gradients(x, gate, dy, scale, dh, rstd, GATE_FIRST, SILU)
                    _store(dX, dx, tile, group, start, R, N, G, ROWS, BLOCK)
                    _store(dGate, dgate, tile, group, start, R, N, G, ROWS, BLOCK)
                    if dW is not None:  # this program's own partial sums, in memory: no row of them fits a block
                        dw = tl.load(dW + partial + start + cols, mask=start + cols < N, other=0.0)
                        dw += tl.sum(dn * _x_hat(h, rstd, LLAMA, DTYPE), axis=0)[None, :]
                        tl.store(dW + partial + start + cols, dw, mask=start + cols < N)
                tl.debug_barrier()  # the next row reads these partial sums
            else:
                if PREFETCH:
                    x, gate, dy = next_x.to(tl.float32), next_gate.to(tl.float32), next_dy.to(tl.float32)
                    rstd = next_rstd
                    next_x = _load(X, tile + step, group, 0, R, N, G, ROWS, BLOCK)
                    next_gate = _load(Gate, tile + step, group, 0, R, N, G, ROWS, BLOCK)
                    next_dy = _load(dY, tile + step, group, 0, R, N, G, ROWS, BLOCK)
                    next_rstd = _load_rstd(Rstd, tile + step, group, R, G, ROWS)
                else:
                    x = _load(X, tile, group, 0, R, N, G, ROWS, BLOCK).to(tl.float32)
                    gate = _load(Gate, tile, group, 0, R, N, G, ROWS, BLOCK).to(tl.float32)
                    dy = _load(dY, tile, group, 0, R, N, G, ROWS, BLOCK).to(tl.float32)
                    rstd = _load_rstd(Rstd, tile, group, R, G, ROWS)
                h, dn = _inner(x, gate, dy, GATE_FIRST, SILU)
                scale = w.to(tl.float32)
                mean = tl.sum(dn * scale * h, axis=1)[:, None] / N
                dh = rstd * (dn * scale - h * (rstd * rstd * mean))
                dx, dgate = _gradients(x, gate, dy, scale, dh, rstd, GATE_FIRST, SILU)
                _store(dX, dx, tile, group, 0, R, N, G, ROWS, BLOCK)
                _store(dGate, dgate, tile, group, 0, R, N, G, ROWS, BLOCK)
                if dW is not None:
                    dw += dn * _x_hat(h, rstd, LLAMA, DTYPE)

        if not LOOP and dW is not None:
            tl.store(dW + partial + cols, tl.sum(dw, axis=0)[None, :], mask=cols < N)


# Launchers


def gated_rms_norm_forward(
    x, gate, w, eps, gate_first, activation, casting_mode, groups, out_dtype, tiles=None
):  # fmt: skip
    """x, gate: (..., G * N) contiguous -> y like x in out_dtype, rstd (R * G,) in fp32."""
    rows, cols = as_rows(x)
    y = torch.empty_like(x, dtype=out_dtype)
    rstd = torch.empty(rows * groups, dtype=torch.float32, device=x.device)
    if x.numel():
        tiles = tiles or RowTiles.choose(rows * groups, cols // groups, x.device, live=4)
        launch(
            _forward_kernel, tiles.programs, x.device,
            x, gate, w, y, rstd, rows, cols // groups, groups, EPS=eps, GATE_FIRST=gate_first,
            SILU=activation == "silu", LLAMA=casting_mode == "llama", ROWS=tiles.rows, BLOCK=tiles.block,
            LOOP=tiles.loop, num_warps=tiles.num_warps,
        )  # fmt: skip
    return y, rstd


def gated_rms_norm_backward(
    dy, x, gate, w, rstd, gate_first, activation, casting_mode, groups, needs_dw, tiles=None
):  # fmt: skip
    """dy, x, gate: (..., G * N) contiguous -> dx like x, dgate like gate, dw like w (or None)."""
    rows, cols = as_rows(x)
    dx, dgate = torch.empty_like(x), torch.empty_like(gate)
    needs_dw = needs_dw and w is not None
    if not x.numel():
        return dx, dgate, torch.zeros_like(w) if needs_dw else None
    # Live are x, gate, dy, dw, the scale, act, h and the halves that are loaded ahead: tiles of 8192 would spill.
    tiles = tiles or RowTiles.choose(rows * groups, cols // groups, x.device, live=9, walks=True)
    beside = min(groups, tiles.programs)
    walkers = tiles.programs // beside
    partial = None
    if needs_dw:
        make = torch.zeros if tiles.loop else torch.empty
        partial = make(walkers, cols, dtype=torch.float32, device=x.device)
    launch(
        _backward_kernel, walkers * beside, x.device,
        dy, x, gate, w, rstd, dx, dgate, partial, rows, cols // groups, groups, beside, GATE_FIRST=gate_first,
        SILU=activation == "silu", LLAMA=casting_mode == "llama", ROWS=tiles.rows, BLOCK=tiles.block,
        LOOP=tiles.loop, PREFETCH=tiles.prefetch, num_warps=tiles.num_warps,
    )  # fmt: skip
    return dx, dgate, sum_rows(partial, w.dtype) if needs_dw else None


KERNELS = Kernels(gated_rms_norm_forward, gated_rms_norm_backward)
