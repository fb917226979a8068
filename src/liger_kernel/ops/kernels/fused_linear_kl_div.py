"""Kullback-Leibler divergence of rows of logits in Triton; mathematics: liger_kernel.ops.fused_linear_kl_div."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from liger_kernel.ops.core import Kernels
from liger_kernel.ops.fused_linear_kl_div import TORCH
from liger_kernel.ops.kernels.blocks import Strips, exp, int64, launch, programs_for
from liger_kernel.ops.kernels.cross_entropy import chain, logit, scales_of
from liger_kernel.ops.kernels.fused_linear_jsd import _log_sum_exp, _scales
from liger_kernel.ops.row_loss import RowLoss

# Kernels: Capital = memory, lower case = registers, ALL_CAPS = compile time.


@triton.jit(do_not_specialize=["R"])
def _rows_kernel(
    X, Target, Live, Scale, Scales, Loss, dX, R, N, x_stride, EPS: tl.constexpr,
    LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """A row per turn, walked three times: the sum of exponentials, the divergence, the gradient over X."""
    lane = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    scale = tl.load(Scale).to(tl.float32)
    inner, outer = _scales(Scales)
    for row in range(tl.program_id(0), R, tl.num_programs(0)):
        base, t_base = int64(row) * x_stride, int64(row) * N
        n_read = N
        if Live is not None:
            n_read = tl.where(tl.load(Live + row) != 0, N, 0)
        lse = _log_sum_exp(X, base, N, n_read, lane, inner, outer, Scales, False, LANES, VEC)
        total = tl.zeros((LANES,), dtype=tl.float32)
        mass = tl.zeros((LANES,), dtype=tl.float32)
        for start in range(0, n_read, LANES * VEC):
            cols = start + lane
            mask = cols < N
            log_q = logit(tl.load(X + base + cols, mask=mask, other=0.0), inner, outer, Scales, False) - lse
            t = tl.load(Target + t_base + cols, mask=mask, other=0.0).to(tl.float32)
            log_t = tl.log(tl.where(t < EPS, EPS, t))  # tl.maximum would drop a NaN
            total += tl.sum(tl.where(t == 0.0, 0.0, t * (log_t - log_q)), axis=1)
            mass += tl.sum(t, axis=1)
        tl.store(Loss + row, tl.sum(total, axis=0))
        if dX is not None:
            whole = tl.sum(mass, axis=0)
            for start in range(0, N, LANES * VEC):
                cols = start + lane
                mask = cols < n_read
                z = logit(tl.load(X + base + cols, mask=mask, other=0.0), inner, outer, Scales, False)
                q = tl.where(mask, exp(z - lse), 0.0)
                t = tl.load(Target + t_base + cols, mask=mask, other=0.0).to(tl.float32)
                dz = chain((q * whole - t) * scale, z, inner, outer, Scales, False)
                tl.store(dX + base + cols, tl.where(mask, dz, 0.0).to(dX.dtype.element_ty), mask=cols < N)


# Launchers


def fused_linear_kl_div_rows(x, t, live, scale, temperature, eps, wants_dx, strips=None):
    """x: (R, V) logits with contiguous rows, t: (R, V) contiguous -> (R,) divergences; over x, where it is wanted,
    scale times their gradient."""
    n_rows, n_cols = x.shape
    loss = torch.zeros(n_rows, dtype=torch.float32, device=x.device)
    if x.numel():
        strips = strips or Strips.choose(n_cols, x.dtype, x.device)
        launch(
            _rows_kernel, programs_for(n_rows, x.device), x.device,
            x, t, live, scale, scales_of(RowLoss(temperature=temperature), x.device), loss, x if wants_dx else None,
            n_rows, n_cols, x.stride(0),
            EPS=float(eps), LANES=strips.lanes, VEC=strips.vec,
            num_warps=strips.num_warps,
        )  # fmt: skip
    return loss


KERNELS = Kernels(fused_linear_kl_div_rows, TORCH.backward)
