"""Cross entropy and total variation distance in Triton; the mathematics is in liger_kernel.ops.fused_ce_tvd."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from liger_kernel.ops.core import Kernels
from liger_kernel.ops.kernels.blocks import Strips, exp, int64, launch, programs_for
from liger_kernel.ops.kernels.fused_linear_jsd import _log_sum_exp

# Kernels: Capital = memory, lower case = registers, ALL_CAPS = compile time.


@triton.jit
def _sign(x):
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0))


@triton.jit(do_not_specialize=["R"])
def _forward_kernel(
    X, Y, Target, Live, CE, TVD, LseQ, LseP, Sigma, R, N, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """A row per turn, walked twice: the sums of exponentials, then what needs them."""
    lane = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    for row in range(tl.program_id(0), R, tl.num_programs(0)):
        base = int64(row) * N
        live = tl.load(Live + row) != 0
        n_read = tl.where(live, N, 0)
        lse = _log_sum_exp(X, base, N, n_read, lane, 1.0, 1.0, None, False, LANES, VEC)
        lse_p = _log_sum_exp(Y, base, N, n_read, lane, 1.0, 1.0, None, False, LANES, VEC)
        total = tl.zeros((LANES,), dtype=tl.float32)
        sigma = tl.zeros((LANES,), dtype=tl.float32)
        for start in range(0, n_read, LANES * VEC):
            cols = start + lane
            mask = cols < N
            q = exp(tl.load(X + base + cols, mask=mask, other=float("-inf")).to(tl.float32) - lse)
            gap = q - exp(tl.load(Y + base + cols, mask=mask, other=float("-inf")).to(tl.float32) - lse_p)
            total += tl.sum(tl.abs(gap), axis=1)
            sigma += tl.sum(_sign(gap) * q, axis=1)
        label = tl.load(Target + row)
        inside = (label >= 0) & (label < N)
        x_y = tl.load(X + base + tl.where(inside, label, 0)).to(tl.float32)
        ce = tl.where(inside, lse - x_y, float("nan"))
        tl.store(CE + row, tl.where(live, ce, 0.0))
        tl.store(TVD + row, 0.5 * tl.sum(total, axis=0))
        tl.store(LseQ + row, lse)
        tl.store(LseP + row, lse_p)
        tl.store(Sigma + row, tl.sum(sigma, axis=0))


@triton.jit(do_not_specialize=["R"])
def _backward_kernel(
    dCE, dTVD, X, Y, Target, Live, LseQ, LseP, Sigma, dX, R, N, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    d_ce, half = tl.load(dCE).to(tl.float32), 0.5 * tl.load(dTVD).to(tl.float32)
    for row in range(tl.program_id(0), R, tl.num_programs(0)):
        base = int64(row) * N
        n_read = tl.where(tl.load(Live + row) != 0, N, 0)
        lse, lse_p, sigma = tl.load(LseQ + row), tl.load(LseP + row), tl.load(Sigma + row)
        label = tl.load(Target + row)
        label = tl.where((label >= 0) & (label < N), label, -1).to(tl.int32)
        for start in range(0, N, LANES * VEC):
            cols = start + lane
            mask = cols < n_read
            q = exp(tl.load(X + base + cols, mask=mask, other=float("-inf")).to(tl.float32) - lse)
            p = exp(tl.load(Y + base + cols, mask=mask, other=float("-inf")).to(tl.float32) - lse_p)
            dx = q * (d_ce + half * (_sign(q - p) - sigma)) - tl.where(cols == label, d_ce, 0.0)
            tl.store(dX + base + cols, tl.where(mask, dx, 0.0).to(dX.dtype.element_ty), mask=cols < N)


# Launchers


def fused_ce_tvd_rows(x, y, target, live, strips=None):
    """x, y: (T, V) contiguous logits; target: (T,); live: (T,) bool -> (ce, tvd, lse of x, lse of y, sigma), (T,)."""
    n_rows, n_cols = x.shape
    found = [torch.zeros(n_rows, dtype=torch.float32, device=x.device) for _ in range(5)]
    if x.numel():
        strips = strips or Strips.choose(n_cols, x.dtype, x.device)
        launch(
            _forward_kernel, programs_for(n_rows, x.device), x.device, x, y, target, live, *found, n_rows, n_cols,
            LANES=strips.lanes, VEC=strips.vec, num_warps=strips.num_warps,
        )  # fmt: skip
    return found


def fused_ce_tvd_rows_backward(d_ce, d_tvd, x, y, target, live, student_lse, teacher_lse, sigma, strips=None):
    """d_ce, d_tvd: 0-d -> dx."""
    (n_rows, n_cols), dx = x.shape, torch.empty_like(x)
    if x.numel():
        strips = strips or Strips.choose(n_cols, x.dtype, x.device)
        launch(
            _backward_kernel, programs_for(n_rows, x.device), x.device, d_ce, d_tvd, x, y, target, live, student_lse,
            teacher_lse, sigma, dx, n_rows, n_cols, LANES=strips.lanes, VEC=strips.vec, num_warps=strips.num_warps,
        )  # fmt: skip
    return dx


KERNELS = Kernels(fused_ce_tvd_rows, fused_ce_tvd_rows_backward)
