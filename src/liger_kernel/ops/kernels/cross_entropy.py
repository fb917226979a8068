"""Cross entropy of rows of logits in Triton; the mathematics is in liger_kernel.ops.cross_entropy.

A program reads its row from memory once, and a second time from the cache where the gradient is wanted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from liger_kernel.backends import device_of
from liger_kernel.ops.core import Kernels
from liger_kernel.ops.kernels.blocks import (
    cdiv,
    exp,
    in_units,
    index,
    int64,
    is_wide,
    launch,
    power_of_2_from,
    programs_for,
    tanh,
)

# Kernels: Capital = memory, lower case = registers, ALL_CAPS = compile time.


@triton.jit
def logit(x, inner, outer, Scales, CAPPED: tl.constexpr):
    """outer * tanh(inner * x), or inner * x; see scales_of."""
    z = x.to(tl.float32)
    if CAPPED:
        z = outer * tanh(z * inner)
    elif Scales is not None:
        z = z * inner
    return z


@triton.jit
def chain(dz, z, inner, outer, Scales, CAPPED: tl.constexpr):
    """The gradient of x from that of z = logit(x)."""
    if CAPPED:
        t = z / outer
        dz *= (1.0 - t * t) * (inner * outer)
    elif Scales is not None:
        dz *= inner
    return dz


@triton.jit
def _log1p(x):
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _read(X, cols, n_read):
    """Logits to come back to: -inf beyond the n_read there are."""
    return tl.load(X + cols, mask=cols < n_read, other=float("-inf"), eviction_policy="evict_last")


@triton.jit(do_not_specialize=["R"])
def liger_cross_entropy_kernel(
    X, dX, Target, W, Wsum, Norm, Factor, dLse, dEntropy, Scales, Loss, Zloss, Lse, Nll, Top,
    LogSum, Entropy, Predicted, Mean, R, V, x_stride, d_stride,
    IGNORE: tl.constexpr, SMOOTHING: tl.constexpr, Z_SCALE: tl.constexpr, CAPPED: tl.constexpr,
    TOKEN_SCALING: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """A row per turn; LANES x VEC columns at once, the VEC neighbours of a lane in one thread."""
    LOW: tl.constexpr = -3.4028234663852886e38  # finite, so that nothing becomes inf - inf before the first column
    ENTROPIC: tl.constexpr = (Entropy is not None) or (dEntropy is not None)
    lane = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    inner, outer = 1.0, 1.0
    if Scales is not None:
        inner = tl.load(Scales)
        outer = tl.load(Scales + 1)
    for row in range(tl.program_id(0), R, tl.num_programs(0)):
        base = int64(row) * x_stride
        label = tl.load(Target + row)
        live = label != IGNORE
        inside = (label >= 0) & (label < V)
        y = tl.where(inside, label, -1).to(tl.int32)
        at_y = tl.where(inside, label, 0).to(tl.int32)
        z_y = tl.where(inside, logit(tl.load(X + base + at_y), inner, outer, Scales, CAPPED), float("-inf"))

        top = tl.full((LANES,), LOW, tl.float32)  # per lane: maximum, sum and moment over the classes but the label's
        total = tl.zeros((LANES,), dtype=tl.float32)
        moment = tl.zeros((LANES,), dtype=tl.float32)
        lower = tl.zeros((LANES,), dtype=tl.float32)
        sum_z = tl.zeros((LANES,), dtype=tl.float32)
        best = tl.full((LANES,), 0, tl.int32)
        n_read = tl.where(live, V, 0)
        if dX is not None:  # few large programs, which wait for memory unless the next block is under way
            ahead = _read(X + base, lane, n_read)
        for start in range(0, n_read, LANES * VEC):
            cols = start + lane
            mask = cols < V
            if dX is not None:
                x = ahead
                ahead = _read(X + base, cols + LANES * VEC, n_read)
            else:
                x = _read(X + base, cols, n_read)
            z = logit(x, inner, outer, Scales, CAPPED)
            if Mean is not None:
                sum_z += tl.sum(tl.where(mask, z, 0.0), axis=1)
            if SMOOTHING != 0.0:
                below = tl.where(mask, z - z_y, 0.0)
                if W is not None:
                    below *= tl.load(W + cols, mask=mask, other=0.0)
                lower += tl.sum(below, axis=1)
            if Scales is not None:
                z = tl.where(mask, z, float("-inf"))
            if (y >= start) & (y < start + LANES * VEC):  # two of ten instructions per element, in one block alone
                z = tl.where(cols == y, float("-inf"), z)
            here = tl.max(z, axis=1)
            if Predicted is not None:
                first = tl.min(tl.where(z == here[:, None], cols, V), axis=1)
                best = tl.where(here > top, first, best)
            new = tl.maximum(top, here)
            e = exp(z - new[:, None])
            shrink = exp(top - new)
            if ENTROPIC:
                e_z = tl.where(e > 0.0, e * (z - new[:, None]), 0.0)  # 0 * -inf of a masked class
                moved = tl.where(shrink > 0.0, total * (top - new), 0.0)  # 0 * -inf
                moment = shrink * (moment + moved) + tl.sum(e_z, axis=1)
            total = total * shrink + tl.sum(e, axis=1)
            top = new

        most = tl.maximum(tl.max(top, axis=0), z_y)
        shrink = exp(top - most)
        others = tl.sum(total * shrink, axis=0)
        e_y = exp(z_y - most)
        whole = others + e_y
        log_whole = tl.log(whole)
        nll = tl.where(z_y == most, _log1p(others), log_whole + (most - z_y))
        lse = most + log_whole

        keep = 1.0 - SMOOTHING
        spread = V * 1.0
        if W is not None:
            keep *= tl.load(W + at_y)
            spread = tl.load(Wsum)
        ce = keep * nll
        if SMOOTHING != 0.0:
            ce += SMOOTHING / V * (spread * nll - tl.sum(lower, axis=0))
        f_ce = tl.where(live, 1.0, 0.0)
        if Factor is not None:
            f_ce *= tl.load(Factor + row)
        if TOKEN_SCALING:
            f_ce *= exp(-nll)
        f_z = f_ce
        if Norm is not None:
            f_ce *= tl.load(Norm)
            f_z *= tl.load(Norm + 1)
        z_loss = f_z * Z_SCALE * lse * lse
        loss = f_ce * ce
        if Z_SCALE != 0.0:
            loss += z_loss
        loss = tl.where(inside, loss, float("nan"))
        tl.store(Loss + row, tl.where(live, loss, 0.0))
        if Zloss is not None:
            tl.store(Zloss + row, tl.where(live, z_loss, 0.0))
        if Lse is not None:
            tl.store(Lse + row, tl.where(live, lse, 0.0))
        if Nll is not None:
            tl.store(Nll + row, tl.where(live, nll, 0.0))
        if Top is not None:
            tl.store(Top + row, tl.where(live, most, 0.0))
        if LogSum is not None:
            tl.store(LogSum + row, tl.where(live, log_whole, 0.0))
        if ENTROPIC:
            away = tl.sum(shrink * (moment + tl.where(shrink > 0.0, total * (top - most), 0.0)), axis=0)
            away += tl.where(e_y > 0.0, e_y * (z_y - most), 0.0)
            entropy = log_whole - away / whole
            if Entropy is not None:
                tl.store(Entropy + row, tl.where(live, entropy, 0.0))
        if Mean is not None:
            tl.store(Mean + row, tl.where(live, tl.sum(sum_z, axis=0) / V, 0.0))
        if Predicted is not None:
            largest = tl.max(top, axis=0)
            winner = tl.min(tl.where(top == largest, best, V), axis=0)
            winner = tl.where(z_y > largest, y, tl.where(z_y == largest, tl.minimum(winner, y), winner))
            tl.store(Predicted + row, tl.where(live, winner, -1).to(tl.int64))

        if dX is not None:
            d_lse = 0.0
            if Z_SCALE != 0.0:
                d_lse += f_z * (2.0 * Z_SCALE) * lse
            if SMOOTHING != 0.0:
                d_lse += f_ce * (SMOOTHING / V) * spread
            if dLse is not None:
                d_lse += tl.load(dLse + row)
            d_p = d_lse + f_ce * keep
            d_y = (d_lse * e_y - f_ce * keep * others) / whole
            if dEntropy is not None:
                d_entropy = tl.load(dEntropy + row)
                d_p -= d_entropy * (entropy - log_whole)
                d_y -= d_entropy * (entropy - nll) * (e_y / whole)
            if SMOOTHING != 0.0:
                share = f_ce * (SMOOTHING / V)
                if W is not None:
                    d_y -= share * tl.load(W + at_y)
                else:
                    d_y -= share
            d_p = tl.where(live, tl.where(inside, d_p, float("nan")) / whole, 0.0)
            d_y = tl.where(live, d_y, 0.0)
            most = tl.where(live, most, 0.0)
            if SMOOTHING != 0.0:
                share = tl.where(live, share, 0.0)
            if dEntropy is not None:
                slope = tl.where(live, d_entropy / whole, 0.0)
            near, far = inner, outer
            if Scales is not None:  # a scale that is not finite makes no NaN of a row without a gradient
                near, far = tl.where(live, inner, 0.0), tl.where(live, outer, 1.0)
            d_base = int64(row) * d_stride
            for start in range(0, V, LANES * VEC):
                cols = start + lane
                mask = cols < V
                x = tl.load(X + base + cols, mask=cols < n_read, other=0.0, eviction_policy="evict_first")
                z = logit(x, near, far, Scales, CAPPED)
                e = exp(z - most)
                if dEntropy is not None:
                    dz = e * d_p - tl.where(e > 0.0, e * (z - most), 0.0) * slope
                else:
                    dz = e * d_p
                if SMOOTHING != 0.0:
                    if W is not None:
                        dz -= share * tl.load(W + cols, mask=cols < n_read, other=0.0)
                    else:
                        dz -= share
                if (y >= start) & (y < start + LANES * VEC):
                    dz = tl.where(cols == y, d_y, dz)
                dz = chain(dz, z, near, far, Scales, CAPPED)
                tl.store(dX + d_base + cols, dz.to(dX.dtype.element_ty), mask=mask, cache_modifier=".cs")


@triton.jit(do_not_specialize=["n_tiles", "n_units"])
def _scale_kernel(X, Factor, n_tiles, n_units, UNIT: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    N = index(n_units, WIDE) * UNIT
    factor = tl.load(Factor).to(tl.float32)
    if factor != 1.0:
        for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
            at = index(tile, WIDE) * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(X + at, mask=at < N).to(tl.float32)
            tl.store(X + at, (x * factor).to(X.dtype.element_ty), mask=at < N)


# Launchers


@dataclass(frozen=True)
class Config:
    """How a row is walked: lanes x vec columns at once."""

    lanes: int
    vec: int
    num_warps: int
    programs: int | None = None  # per core; None: a program per row

    @classmethod
    def choose(cls, n_classes: int, dtype: torch.dtype, device: torch.device, gradient: bool) -> Config:
        backend = device_of(device)
        if not backend.threads:
            return cls(1, min(power_of_2_from(n_classes), backend.max_block(8)), 1)
        vec = 16 // dtype.itemsize  # one 16-byte load per lane
        if n_classes < vec * backend.warp_width:
            return cls(cdiv(power_of_2_from(n_classes), vec), vec, 1)
        # With a gradient the row is read again, from the L2 if few rows are in flight: one program per core, or two of
        # rows half as long. H200 bf16, sweep 2026-11-29, 32 warps / 16: 2048x151936 0.408 ms / 0.443, 2048x128256
        # 0.340 / 0.367, 3584x32000 0.183 / 0.143; 8192x128256 without a gradient, 8 warps 0.472, 16 warps 0.489.
        most = 256 if not gradient else 1024 if n_classes * dtype.itemsize > 128 << 10 else 512
        threads = min(power_of_2_from(cdiv(n_classes, vec * 4)), most)
        num_warps = max(1, min(threads // backend.warp_width, backend.max_warps))
        lanes = min(2 * num_warps * backend.warp_width, power_of_2_from(cdiv(n_classes, vec)))
        return cls(lanes, vec, num_warps)


def scales_of(loss, device) -> torch.Tensor | None:
    """(inner, outer) of z = outer tanh(inner x) or z = inner x, in memory: a schedule of them compiles nothing."""
    if loss.softcap is None and not loss.rescales:
        return None
    inner = loss.scale / (loss.temperature if loss.softcap is None else loss.softcap)
    outer = 1.0 if loss.softcap is None else loss.softcap / loss.temperature
    scales = torch.empty(2, dtype=torch.float32, device=device)
    for place, value in zip(scales, (inner, outer)):
        # filled, as a copy from the host would make it wait
        place.copy_(value.view(())) if isinstance(value, torch.Tensor) else place.fill_(value)
    return scales


def cross_entropy_forward(x, given, loss, out, dx, config: Config | None = None):
    """x: (R, V) with contiguous rows, the Given and RowLoss of its rows -> fills out (Stats) and dx, if not None."""
    n_rows, n_classes = x.shape
    config = config or Config.choose(n_classes, x.dtype, x.device, dx is not None)
    programs = programs_for(n_rows, x.device)
    if config.programs is not None:
        programs = min(programs, config.programs * device_of(x.device).cores(x.device))
    launch(
        liger_cross_entropy_kernel, programs, x.device,
        x, dx, given.target, given.weight, given.weight_sum if given.weight is not None else None, given.norm,
        given.factor, given.d_lse, given.d_entropy, scales_of(loss, x.device), out.loss, out.z_loss, out.lse, out.nll,
        out.top, out.log_sum, out.entropy, out.predicted, out.mean, n_rows, n_classes, x.stride(0),
        dx.stride(0) if dx is not None else 0,
        IGNORE=loss.ignore_index, SMOOTHING=float(loss.label_smoothing), Z_SCALE=float(loss.lse_square_scale),
        CAPPED=loss.softcap is not None, TOKEN_SCALING=bool(loss.token_scaling), LANES=config.lanes, VEC=config.vec,
        num_warps=config.num_warps,
    )  # fmt: skip


def cross_entropy_backward(dx, factor):
    """dx times the 0-d factor, in place: the kernel returns at once where that is 1."""
    if dx.numel():
        block = 4096
        n_tiles = cdiv(dx.numel(), block)
        programs = min(programs_for(n_tiles, dx.device), 8 * device_of(dx.device).cores(dx.device))
        n_units, unit = in_units(dx.numel())
        launch(
            _scale_kernel, programs, dx.device, dx, factor, n_tiles, n_units, UNIT=unit, BLOCK=block,
            WIDE=is_wide(dx.numel()), num_warps=8,
        )  # fmt: skip
    return dx


KERNELS = Kernels(cross_entropy_forward, cross_entropy_backward)
