"""Jensen-Shannon divergence of rows of logits in Triton; the mathematics is in liger_kernel.ops.fused_linear_jsd."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from liger_kernel.ops.core import Kernels
from liger_kernel.ops.fused_linear_jsd import TORCH
from liger_kernel.ops.kernels.blocks import Strips, exp, int64, launch, programs_for
from liger_kernel.ops.kernels.cross_entropy import chain, logit, scales_of
from liger_kernel.ops.kernels.jsd import _divergence

# Kernels: Capital = memory, lower case = registers, ALL_CAPS = compile time.


@triton.jit
def _scales(Scales):
    inner, outer = 1.0, 1.0
    if Scales is not None:
        inner = tl.load(Scales)
        outer = tl.load(Scales + 1)
    return inner, outer


@triton.jit
def _log_sum_exp(X, base, N, n_read, lane, inner, outer, Scales, CAPPED: tl.constexpr,
                 LANES: tl.constexpr, VEC: tl.constexpr):  # fmt: skip
    LOW: tl.constexpr = -1e38  # finite, so that nothing becomes inf - inf before the first column
    top = tl.full((LANES,), LOW, tl.float32)
    total = tl.zeros((LANES,), dtype=tl.float32)
    for start in range(0, n_read, LANES * VEC):
        cols = start + lane
        z = logit(tl.load(X + base + cols, mask=cols < N, other=0.0), inner, outer, Scales, CAPPED)
        z = tl.where(cols < N, z, float("-inf"))
        new = tl.maximum(top, tl.max(z, axis=1))
        total = total * exp(top - new) + tl.sum(exp(z - new[:, None]), axis=1)
        top = new
    most = tl.max(top, axis=0)
    return most + tl.log(tl.sum(total * exp(top - most), axis=0))


@triton.jit(do_not_specialize=["R"])
def _rows_kernel(
    X, Y, Live, Scale, Also, ScalesQ, ScalesP, Loss, dX, R, N, x_stride, y_stride, also_stride,
    BETA: tl.constexpr, CAPPED_Q: tl.constexpr, CAPPED_P: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """A row per turn, walked three times: the sums of exponentials, the divergence, the gradient over X."""
    lane = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    scale = tl.load(Scale).to(tl.float32)
    inner, outer = _scales(ScalesQ)
    inner_p, outer_p = _scales(ScalesP)
    for row in range(tl.program_id(0), R, tl.num_programs(0)):
        base, base_p = int64(row) * x_stride, int64(row) * y_stride
        n_read = N
        if Live is not None:
            n_read = tl.where(tl.load(Live + row) != 0, N, 0)
        lse = _log_sum_exp(X, base, N, n_read, lane, inner, outer, ScalesQ, CAPPED_Q, LANES, VEC)
        lse_p = _log_sum_exp(Y, base_p, N, n_read, lane, inner_p, outer_p, ScalesP, CAPPED_P, LANES, VEC)
        total = tl.zeros((LANES,), dtype=tl.float32)
        slopes = tl.zeros((LANES,), dtype=tl.float32)
        for start in range(0, n_read, LANES * VEC):
            cols = start + lane
            mask = cols < N
            z = logit(tl.load(X + base + cols, mask=mask, other=0.0), inner, outer, ScalesQ, CAPPED_Q)
            z_p = logit(tl.load(Y + base_p + cols, mask=mask, other=0.0), inner_p, outer_p, ScalesP, CAPPED_P)
            log_q = tl.where(mask, z - lse, float("-inf"))
            log_p = tl.where(mask, z_p - lse_p, float("-inf"))
            each, slope = _divergence(log_q, log_p, BETA)
            total += tl.sum(each, axis=1)
            slopes += tl.sum(slope, axis=1)
        tl.store(Loss + row, tl.sum(total, axis=0))
        if dX is not None:
            whole = tl.sum(slopes, axis=0)
            for start in range(0, N, LANES * VEC):
                cols = start + lane
                mask = cols < n_read
                z = logit(tl.load(X + base + cols, mask=mask, other=0.0), inner, outer, ScalesQ, CAPPED_Q)
                z_p = logit(tl.load(Y + base_p + cols, mask=mask, other=0.0), inner_p, outer_p, ScalesP, CAPPED_P)
                log_q = tl.where(mask, z - lse, float("-inf"))
                log_p = tl.where(mask, z_p - lse_p, float("-inf"))
                each, slope = _divergence(log_q, log_p, BETA)
                dz = chain((slope - exp(log_q) * whole) * scale, z, inner, outer, ScalesQ, CAPPED_Q)
                if Also is not None:
                    dz += tl.load(Also + int64(row) * also_stride + cols, mask=mask, other=0.0).to(tl.float32)
                tl.store(dX + base + cols, dz.to(dX.dtype.element_ty), mask=cols < N)


# Launchers


def fused_linear_jsd_rows(x, y, live, scale, beta, of_x, of_y, wants_dx, also=None, strips=None):
    """x, y: (R, V) with contiguous rows, logits -> (R,) divergences; over x, where it is wanted, scale times their
    gradient, plus also."""
    n_rows, n_cols = x.shape
    loss = torch.zeros(n_rows, dtype=torch.float32, device=x.device)
    if x.numel():
        strips = strips or Strips.choose(n_cols, x.dtype, x.device)
        launch(
            _rows_kernel, programs_for(n_rows, x.device), x.device,
            x, y, live, scale, also, scales_of(of_x, x.device), scales_of(of_y, x.device), loss,
            x if wants_dx else None, n_rows, n_cols, x.stride(0), y.stride(0),
            0 if also is None else also.stride(0), BETA=float(beta), CAPPED_Q=of_x.softcap is not None,
            CAPPED_P=of_y.softcap is not None, LANES=strips.lanes, VEC=strips.vec, num_warps=strips.num_warps,
        )  # fmt: skip
    return loss


KERNELS = Kernels(fused_linear_jsd_rows, TORCH.backward)
