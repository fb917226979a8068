"""The gradient of a slab of logits from the statistics of its rows, in Triton. See liger_kernel.ops.head_slabs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from liger_kernel.backends import device_of
from liger_kernel.ops.core import Kernels
from liger_kernel.ops.head_slabs import gradients
from liger_kernel.ops.kernels.blocks import cdiv, exp, in_units, int64, launch, power_of_2_from, programs_for
from liger_kernel.ops.kernels.cross_entropy import chain, logit, scales_of

# Kernels: Capital = memory, lower case = registers, ALL_CAPS = compile time.


@triton.jit
def _minus_expm1(x):
    """1 - exp(-x) for x >= 0; the series where the difference would cancel."""
    near = x * (1.0 - x * (0.5 - x * (0.16666667 - x * (0.041666668 - x * (0.008333334 - x * 0.0013888889)))))
    return tl.where(x < 0.3, near, 1.0 - exp(-x))


@triton.jit(do_not_specialize=["R", "n_cols", "n_first", "x_stride"])
def _slab_kernel(
    X, Target, W, Wsum, Norm, Factor, dLse, dEntropy, Scales, Nll, Top, LogSum, Entropy, R, n_cols, V, n_first,
    x_stride,
    IGNORE: tl.constexpr, SMOOTHING: tl.constexpr, Z_SCALE: tl.constexpr, CAPPED: tl.constexpr,
    TOKEN_SCALING: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """X (R, N), the classes from n_first on of V, becomes its gradient; a row per turn. Sizes come in UNITs."""
    N = n_cols * UNIT
    lane = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    inner, outer = 1.0, 1.0
    if Scales is not None:
        inner = tl.load(Scales)
        outer = tl.load(Scales + 1)
    for row in range(tl.program_id(0), R, tl.num_programs(0)):
        base = int64(row) * x_stride * UNIT
        label = tl.load(Target + row)
        live = label != IGNORE
        inside = (label >= 0) & (label < V)
        at_y = tl.where(inside, label, 0).to(tl.int32)
        nll = tl.load(Nll + row)
        top = tl.load(Top + row)
        log_sum = tl.load(LogSum + row)
        keep = 1.0 - SMOOTHING
        spread = V * 1.0
        if W is not None:
            keep *= tl.load(W + at_y)
            spread = tl.load(Wsum)
        f_ce = tl.where(live, 1.0, 0.0)
        if Factor is not None:
            f_ce *= tl.load(Factor + row)
        if TOKEN_SCALING:
            f_ce *= exp(-nll)
        f_z = f_ce
        if Norm is not None:
            f_ce *= tl.load(Norm)
            f_z *= tl.load(Norm + 1)
        d_lse = 0.0
        if Z_SCALE != 0.0:
            d_lse += f_z * (2.0 * Z_SCALE) * (top + log_sum)
        share = 0.0
        if SMOOTHING != 0.0:
            share = f_ce * (SMOOTHING / V)
            d_lse += share * spread
        if dLse is not None:
            d_lse += tl.load(dLse + row)
        p_y = exp(-nll)
        d_y = d_lse * p_y - f_ce * keep * _minus_expm1(nll)
        d_all = d_lse + f_ce * keep
        if dEntropy is not None:
            d_entropy = tl.load(dEntropy + row)
            entropy = tl.load(Entropy + row)
            d_y -= d_entropy * p_y * (entropy - nll)
            d_all -= d_entropy * entropy
        if SMOOTHING != 0.0:
            if W is not None:
                d_y -= share * tl.load(W + at_y)
            else:
                d_y -= share
        d_all = tl.where(inside, d_all, float("nan"))
        n_read = tl.where(live, N, 0)
        for start in range(0, N, LANES * VEC):
            cols = start + lane
            mask = cols < N
            x = tl.load(X + base + cols, mask=cols < n_read, other=0.0)
            z = logit(x, inner, outer, Scales, CAPPED)
            log_p = (z - top) - log_sum
            p = exp(log_p)
            if dEntropy is not None:
                dz = p * d_all - tl.where(p > 0.0, p * log_p, 0.0) * d_entropy  # 0 * -inf of a masked class
            else:
                dz = p * d_all
            if SMOOTHING != 0.0:
                if W is not None:
                    dz -= share * tl.load(W + n_first + cols, mask=mask & (n_first + cols < V), other=0.0)
                else:
                    dz -= share
            dz = tl.where(inside & (cols + n_first == at_y), d_y, dz)
            dz = tl.where(live, chain(dz, z, inner, outer, Scales, CAPPED), 0.0)
            tl.store(X + base + cols, dz.to(X.dtype.element_ty), mask=mask)


# Launchers


@dataclass(frozen=True)
class Config:
    """How a row of a slab is walked: lanes x vec columns at once."""

    lanes: int
    vec: int
    num_warps: int

    @classmethod
    def choose(cls, n_classes: int, dtype: torch.dtype, device: torch.device) -> Config:
        backend = device_of(device)
        if not backend.threads:
            return cls(1, min(power_of_2_from(n_classes), backend.max_block(8)), 1)
        vec = 16 // dtype.itemsize  # one 16-byte load per lane
        lanes = power_of_2_from(max(cdiv(n_classes, vec), 1))
        num_warps = max(1, min(lanes // (2 * backend.warp_width), 8, backend.max_warps))
        return cls(min(lanes, 2 * num_warps * backend.warp_width), vec, num_warps)


def slab_gradient(x, given, loss, stats, first: int, n_classes: int, config: Config | None = None) -> None:
    """x: (R, N) logits with contiguous rows, the classes from `first` on of n_classes -> their gradient, in place."""
    n_rows, width = x.shape
    if not n_rows:
        return
    config = config or Config.choose(n_classes, x.dtype, x.device)  # not by the slab, which varies with the rows
    # Of a slab of head_slabs the room between its rows is walked too, so that its width is a number of units.
    (stride, unit), n_cols = in_units(x.stride(0)), width
    if unit > 1:
        n_cols = cdiv(width, unit)
    launch(
        _slab_kernel, programs_for(n_rows, x.device), x.device,
        x, given.target, given.weight, given.weight_sum if given.weight is not None else None, given.norm,
        given.factor, given.d_lse, given.d_entropy, scales_of(loss, x.device), stats.nll, stats.top,
        stats.log_sum, stats.entropy if given.d_entropy is not None else None, n_rows, n_cols, n_classes, first, stride,
        IGNORE=loss.ignore_index, SMOOTHING=float(loss.label_smoothing), Z_SCALE=float(loss.lse_square_scale),
        CAPPED=loss.softcap is not None, TOKEN_SCALING=bool(loss.token_scaling), LANES=config.lanes, VEC=config.vec,
        UNIT=unit, num_warps=config.num_warps,
    )  # fmt: skip


KERNELS = Kernels(gradients, slab_gradient)
