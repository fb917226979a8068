"""Kullback-Leibler divergence in Triton; the mathematics is in liger_kernel.ops.kl_div."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from liger_kernel.ops.core import Kernels
from liger_kernel.ops.kernels.blocks import Strips, as_rows, exp, int64, launch, programs_for

# Kernels: Capital = memory, lower case = registers, ALL_CAPS = compile time.


@triton.jit
def _not_below(x, EPS: tl.constexpr):
    return tl.where(x < EPS, EPS, x)  # tl.maximum would drop a NaN


@triton.jit(do_not_specialize=["R", "n_mean"])
def _forward_kernel(
    X, Target, Each, Loss, R, N, n_mean,
    LOG_TARGET: tl.constexpr, EPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """A row per turn; LANES x VEC columns at once, the VEC neighbours of a lane in one thread."""
    lane = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    for row in range(tl.program_id(0), R, tl.num_programs(0)):
        base = int64(row) * N
        total = tl.zeros((LANES,), dtype=tl.float32)
        for start in range(0, N, LANES * VEC):
            cols = start + lane
            mask = cols < N
            x = tl.load(X + base + cols, mask=mask, other=0.0).to(tl.float32)
            if LOG_TARGET:
                log_p = tl.load(Target + base + cols, mask=mask, other=float("-inf")).to(tl.float32)
                p = exp(log_p)
            else:
                p = tl.load(Target + base + cols, mask=mask, other=0.0).to(tl.float32)
                log_p = tl.log(_not_below(p, EPS))
            each = tl.where(p == 0.0, 0.0, p * (log_p - x))
            if Each is not None:
                tl.store(Each + base + cols, each.to(Each.dtype.element_ty), mask=mask)
            total += tl.sum(each, axis=1)
        if Loss is not None:
            tl.store(Loss + row, tl.sum(total, axis=0) / n_mean)


@triton.jit(do_not_specialize=["R", "n_mean"])
def _backward_kernel(
    dY, X, Target, dX, dTarget, R, N, n_mean,
    EACH: tl.constexpr, LOG_TARGET: tl.constexpr, EPS: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    if not EACH:
        dy = tl.load(dY).to(tl.float32) / n_mean
    for row in range(tl.program_id(0), R, tl.num_programs(0)):
        base = int64(row) * N
        for start in range(0, N, LANES * VEC):
            cols = start + lane
            mask = cols < N
            if EACH:
                dy = tl.load(dY + base + cols, mask=mask, other=0.0).to(tl.float32)
            t = tl.load(Target + base + cols, mask=mask, other=0.0).to(tl.float32)
            if LOG_TARGET:
                p = exp(t)
            else:
                p = t
            if dX is not None:
                tl.store(dX + base + cols, (-p * dy).to(dX.dtype.element_ty), mask=mask)
            if dTarget is not None:
                x = tl.load(X + base + cols, mask=mask, other=0.0).to(tl.float32)
                if LOG_TARGET:
                    dt = tl.where(p == 0.0, 0.0, p * (t - x + 1.0)) * dy
                else:
                    dt = (tl.log(_not_below(p, EPS)) - x + tl.where(p < EPS, 0.0, 1.0)) * dy
                tl.store(dTarget + base + cols, dt.to(dTarget.dtype.element_ty), mask=mask)


# Launchers


def kl_div_forward(x, t, log_target, eps, n, dtype, strips=None):
    """x, t: (..., N) contiguous -> one over n of the sum of each row, or where n is None each element in dtype."""
    n_rows, n_cols = as_rows(x)
    each = torch.empty_like(x, dtype=dtype) if n is None else None
    loss = torch.empty(n_rows, dtype=torch.float32, device=x.device) if n is not None else None
    if x.numel():
        strips = strips or Strips.choose(n_cols, x.dtype, x.device)
        launch(
            _forward_kernel, programs_for(n_rows, x.device), x.device,
            x, t, each, loss, n_rows, n_cols, n or 1,
            LOG_TARGET=bool(log_target), EPS=float(eps), LANES=strips.lanes, VEC=strips.vec,
            num_warps=strips.num_warps,
        )  # fmt: skip
    return each if n is None else loss


def kl_div_backward(dy, x, t, log_target, eps, n, dx_dtype, strips=None):
    """dy: 0-d or like t; x: None where t takes no gradient; dx_dtype: None where x takes none -> (dx, dt)."""
    n_rows, n_cols = as_rows(t)
    dx = None if dx_dtype is None else torch.empty_like(t, dtype=dx_dtype)
    dt = None if x is None else torch.empty_like(t)
    if t.numel():
        strips = strips or Strips.choose(n_cols, t.dtype, t.device)
        launch(
            _backward_kernel, programs_for(n_rows, t.device), t.device,
            dy, x, t, dx, dt, n_rows, n_cols, n,
            EACH=dy.dim() > 0, LOG_TARGET=bool(log_target), EPS=float(eps), LANES=strips.lanes, VEC=strips.vec,
            num_warps=strips.num_warps,
        )  # fmt: skip
    return dx, dt


KERNELS = Kernels(kl_div_forward, kl_div_backward)
