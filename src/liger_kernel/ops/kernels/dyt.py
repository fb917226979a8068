"""Dynamic tanh in Triton; the mathematics is in liger_kernel.ops.dyt.

A program takes a strip of BLOCK columns and every n_shares-th tile of ROWS rows in it: no column is walked twice, and
each program has sums of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from liger_kernel.backends import device_of
from liger_kernel.ops.core import Kernels
from liger_kernel.ops.kernels.blocks import as_rows, cdiv, int64, launch, power_of_2_from, programs_for, sum_rows, tanh

# Kernels: Capital = memory, lower case = registers, ALL_CAPS = compile time.


@triton.jit(do_not_specialize=["R", "n_shares"])
def _forward_kernel(X, Alpha, Gamma, Beta, Y, R, N, n_shares, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    alpha = tl.load(Alpha).to(tl.float32)
    row = tl.arange(0, ROWS)[:, None]
    for strip in range(tl.program_id(0), tl.cdiv(N, BLOCK) * n_shares, tl.num_programs(0)):
        cols = (strip // n_shares) * BLOCK + tl.arange(0, BLOCK)[None, :]
        gamma = tl.load(Gamma + cols, mask=cols < N, other=0.0).to(tl.float32)
        if Beta is not None:
            beta = tl.load(Beta + cols, mask=cols < N, other=0.0).to(tl.float32)
        for tile in range(strip % n_shares, tl.cdiv(R, ROWS), n_shares):
            base = int64(tile) * ROWS * N
            mask = (tile * ROWS + row < R) & (cols < N)
            x = tl.load(X + base + row * N + cols, mask=mask, other=0.0).to(tl.float32)
            y = gamma * tanh(alpha * x)
            if Beta is not None:
                y += beta
            tl.store(Y + base + row * N + cols, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["R", "n_shares"])
def _backward_kernel(
    dY, X, Alpha, Gamma, dX, dAlpha, dGamma, dBeta, R, N, n_shares, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """dAlpha, dGamma, dBeta (n_shares, N): each share's sums per column."""
    alpha = tl.load(Alpha).to(tl.float32)
    row = tl.arange(0, ROWS)[:, None]
    for strip in range(tl.program_id(0), tl.cdiv(N, BLOCK) * n_shares, tl.num_programs(0)):
        share = strip % n_shares
        cols = (strip // n_shares) * BLOCK + tl.arange(0, BLOCK)[None, :]
        gamma = tl.load(Gamma + cols, mask=cols < N, other=0.0).to(tl.float32)
        d_alpha = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        d_gamma = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        d_beta = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for tile in range(share, tl.cdiv(R, ROWS), n_shares):
            base = int64(tile) * ROWS * N
            mask = (tile * ROWS + row < R) & (cols < N)
            x = tl.load(X + base + row * N + cols, mask=mask, other=0.0).to(tl.float32)
            dy = tl.load(dY + base + row * N + cols, mask=mask, other=0.0).to(tl.float32)
            t = tanh(alpha * x)
            inner = dy * gamma * (1.0 - t * t)
            tl.store(dX + base + row * N + cols, (inner * alpha).to(dX.dtype.element_ty), mask=mask)
            d_alpha += inner * x
            d_gamma += dy * t
            d_beta += dy
        at = int64(share) * N
        tl.store(dAlpha + at + cols, tl.sum(d_alpha, axis=0)[None, :], mask=cols < N)
        tl.store(dGamma + at + cols, tl.sum(d_gamma, axis=0)[None, :], mask=cols < N)
        if dBeta is not None:
            tl.store(dBeta + at + cols, tl.sum(d_beta, axis=0)[None, :], mask=cols < N)


# Config


@dataclass(frozen=True)
class Strips:
    """Tiles of rows x block elements by `num_warps` warps; each strip of columns in `shares` shares of its rows."""

    rows: int
    block: int
    shares: int
    num_warps: int

    @classmethod
    def choose(cls, n_rows: int, n_cols: int, device: torch.device, elements: int = 2048) -> Strips:
        """elements: of a tile, 16 a lane with 4 warps; three sums of that size stay in registers."""
        backend = device_of(device)
        block = min(power_of_2_from(n_cols), 512)
        rows = max(1, min(elements // block, power_of_2_from(max(n_rows, 1))))
        limit = backend.cores(device) * (4 if backend.threads else 1)
        shares = max(1, min(cdiv(n_rows, rows), limit // cdiv(n_cols, block)))
        return cls(rows, block, shares, max(1, min(rows * block // (backend.warp_width * 16), backend.max_warps)))


# Launchers


def _launch(kernel, x, strips, *tensors):
    rows, cols = as_rows(x)
    programs = programs_for(cdiv(cols, strips.block) * strips.shares, x.device)
    launch(
        kernel, programs, x.device, *tensors, rows, cols, strips.shares,
        ROWS=strips.rows, BLOCK=strips.block, num_warps=strips.num_warps,
    )  # fmt: skip


def dyt_forward(x, alpha, gamma, beta, strips=None):
    """x: (..., N) contiguous; gamma, beta: (N,), beta may be None -> y like x."""
    y = torch.empty_like(x)
    if x.numel():
        _launch(_forward_kernel, x, strips or Strips.choose(*as_rows(x), x.device), x, alpha, gamma, beta, y)
    return y


def dyt_backward(dy, x, alpha, gamma, needs_beta, strips=None):
    """dy, x: (..., N) contiguous -> dx like x, dalpha like alpha, dgamma and dbeta like gamma (dbeta may be None)."""
    dx = torch.empty_like(x)
    if not x.numel():
        return dx, torch.zeros_like(alpha), torch.zeros_like(gamma), torch.zeros_like(gamma) if needs_beta else None
    rows, cols = as_rows(x)
    strips = strips or Strips.choose(rows, cols, x.device)
    size = dict(dtype=torch.float32, device=x.device)
    d_alpha, d_gamma = (torch.empty(strips.shares, cols, **size) for _ in range(2))
    d_beta = torch.empty(strips.shares, cols, **size) if needs_beta else None
    _launch(_backward_kernel, x, strips, dy, x, alpha, gamma, dx, d_alpha, d_gamma, d_beta)
    total = sum_rows(d_alpha, torch.float32).sum().to(alpha.dtype).view(alpha.shape)
    return dx, total, sum_rows(d_gamma, gamma.dtype), sum_rows(d_beta, gamma.dtype) if needs_beta else None


KERNELS = Kernels(dyt_forward, dyt_backward)
