"""Generalised Jensen-Shannon divergence in Triton; the mathematics is in liger_kernel.ops.jsd."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from liger_kernel.ops.core import Kernels
from liger_kernel.ops.kernels.blocks import Strips, exp, int64, launch, programs_for
from liger_kernel.ops.kernels.cross_entropy import cross_entropy_backward as jsd_backward

# Kernels: Capital = memory, lower case = registers, ALL_CAPS = compile time.


@triton.jit
def _log(x):
    """log(x) of a normal number: two thirds of tl.log's instructions, which decide the speed of a JSD."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) & -0x800000  # x = 2^k * (1 + f), f in [-1/3, 1/3]
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    # (log(1 + f) - f) / f^2, fitted at Chebyshev nodes; the result is right to 1.2e-7 of its size
    y = 0.13756539 * f - 0.15049429
    y = y * f + 0.14054218
    y = y * f - 0.16481580
    y = y * f + 0.20007323
    y = y * f - 0.25004205
    y = y * f + 0.33333272
    y = y * f - 0.49999985
    return exponent.to(tl.float32) * 8.2629582e-08 + (y * (f * f) + f)  # log(2) * 2^-23


@triton.jit
def _divergence(log_q, log_p, BETA: tl.constexpr):
    """(divergence, its gradient by log_q) of each element; 0 where both are -inf, NaN where one is NaN."""
    gap = tl.where(log_p == log_q, 0.0, log_p - log_q)
    if BETA == 0.0:
        p = exp(log_p)
        each = tl.where(p == 0.0, 0.0, p * gap)
        slope = -p
    elif BETA == 1.0:
        q = exp(log_q)
        each = tl.where(q == 0.0, 0.0, -q * gap)
        slope = q + each
    else:
        # In units of the larger of p and q, whose log is `high`: m = mix * exp(high). Nothing underflows in the log.
        p_leads = gap > 0.0
        far = tl.abs(gap)
        e = exp(-far)
        e_far = tl.where(e == 0.0, 0.0, e * far)
        low_weight = tl.where(p_leads, 1.0 - BETA, BETA)
        mix = 1.0 - low_weight * (1.0 - e)
        log_mix = _log(mix)
        high = exp(tl.where(p_leads, log_p, log_q))
        each = -high * (mix * log_mix + low_weight * e_far)
        slope = (BETA - 1.0) * high * tl.where(p_leads, e * log_mix + e_far, log_mix)
    return each, slope


@triton.jit(do_not_specialize=["R"])
def _jsd_kernel(
    X, Target, Live, Scale, Loss, dX, R, N, BETA: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """A row per turn; LANES x VEC columns at once, the VEC neighbours of a lane in one thread."""
    lane = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    if Scale is not None:
        scale = tl.load(Scale).to(tl.float32)
    else:
        scale = 1.0 / R
    for row in range(tl.program_id(0), R, tl.num_programs(0)):
        base = int64(row) * N
        n_read = N
        if Live is not None:
            n_read = tl.where(tl.load(Live + row) != 0, N, 0)
        total = tl.zeros((LANES,), dtype=tl.float32)
        for start in range(0, N, LANES * VEC):
            cols = start + lane
            mask = cols < n_read
            # -inf on both sides adds nothing and has no gradient, which serves the ignored rows too
            log_q = tl.load(X + base + cols, mask=mask, other=float("-inf"), eviction_policy="evict_first")
            log_p = tl.load(Target + base + cols, mask=mask, other=float("-inf"), eviction_policy="evict_first")
            each, slope = _divergence(log_q.to(tl.float32), log_p.to(tl.float32), BETA)
            total += tl.sum(each, axis=1)
            if dX is not None:
                dx = (slope * scale).to(dX.dtype.element_ty)
                tl.store(dX + base + cols, dx, mask=cols < N, cache_modifier=".cs")
        tl.store(Loss + row, tl.sum(total, axis=0) * scale)


# Launchers


def jsd_forward(x, target, live, scale, beta, wants_dx, strips=None):
    """x, target: (T, V) contiguous; live: (T,) bool or None; scale: 0-d, or None for 1 / T -> ((T,) losses, dx)."""
    n_rows, n_cols = x.shape
    dx = torch.empty_like(x) if wants_dx else None
    if not x.numel():
        return torch.zeros(n_rows, dtype=torch.float32, device=x.device), dx
    loss = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    strips = strips or Strips.choose(n_cols, x.dtype, x.device)
    launch(
        _jsd_kernel, programs_for(n_rows, x.device), x.device,
        x, target, live, scale, loss, dx, n_rows, n_cols,
        BETA=float(beta), LANES=strips.lanes, VEC=strips.vec, num_warps=strips.num_warps,
    )  # fmt: skip
    return loss, dx


KERNELS = Kernels(jsd_forward, jsd_backward)
