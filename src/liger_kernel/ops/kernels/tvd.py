"""Total variation distance in Triton; the mathematics is in liger_kernel.ops.tvd."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from liger_kernel.ops.core import Kernels
from liger_kernel.ops.kernels.blocks import Strips, int64, launch, programs_for

# Kernels: Capital = memory, lower case = registers, ALL_CAPS = compile time.


@triton.jit(do_not_specialize=["R"])
def _tvd_kernel(
    P, Q, Live, dY, Each, Loss, dP, R, N, EACH: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """A row per turn; LANES x VEC columns at once. Without dY the distances, with it the gradient."""
    lane = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    if dY is not None and not EACH:
        dy = tl.load(dY).to(tl.float32)
    for row in range(tl.program_id(0), R, tl.num_programs(0)):
        base = int64(row) * N
        n_read = N
        if Live is not None:
            n_read = tl.where(tl.load(Live + row) != 0, N, 0)
        total = tl.zeros((LANES,), dtype=tl.float32)
        for start in range(0, N, LANES * VEC):
            cols = start + lane
            mask = cols < n_read
            gap = tl.load(P + base + cols, mask=mask, other=0.0).to(tl.float32)
            gap -= tl.load(Q + base + cols, mask=mask, other=0.0).to(tl.float32)
            if dY is not None:
                if EACH:
                    dy = tl.load(dY + base + cols, mask=mask, other=0.0).to(tl.float32)
                sign = tl.where(gap > 0.0, 0.5, tl.where(gap < 0.0, -0.5, gap))  # a NaN stays one
                tl.store(dP + base + cols, (sign * dy).to(dP.dtype.element_ty), mask=cols < N)
            else:
                each = 0.5 * tl.abs(gap)
                if Each is not None:
                    tl.store(Each + base + cols, each.to(Each.dtype.element_ty), mask=cols < N)
                total += tl.sum(each, axis=1)
        if Loss is not None:
            tl.store(Loss + row, tl.sum(total, axis=0))


# Launchers


def _run(p, q, live, dy, each, loss, dp, strips):
    n_rows, n_cols = p.shape
    if p.numel():
        strips = strips or Strips.choose(n_cols, p.dtype, p.device)
        launch(
            _tvd_kernel, programs_for(n_rows, p.device), p.device,
            p, q, live, dy, each, loss, dp, n_rows, n_cols,
            EACH=dy is not None and dy.dim() > 0, LANES=strips.lanes, VEC=strips.vec, num_warps=strips.num_warps,
        )  # fmt: skip


def tvd_forward(p, q, live, dtype, strips=None):
    """p, q: (T, V) contiguous; live: (T,) bool or None -> half distances in dtype or, for None, their row sums."""
    each = torch.empty_like(p, dtype=dtype) if dtype else None
    loss = None if dtype else torch.zeros(p.shape[0], dtype=torch.float32, device=p.device)
    _run(p, q, live, None, each, loss, None, strips)
    return loss if each is None else each


def tvd_backward(dy, p, q, live, strips=None):
    """dy: 0-d or like p -> dp."""
    dp = torch.empty_like(p)
    _run(p, q, live, dy, None, None, dp, strips)
    return dp


KERNELS = Kernels(tvd_forward, tvd_backward)
