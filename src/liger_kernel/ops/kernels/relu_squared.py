"""ReLU squared in Triton; the mathematics is in liger_kernel.ops.relu_squared."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from liger_kernel.ops.core import Kernels
from liger_kernel.ops.kernels.blocks import Flat, cdiv, in_units, index, is_wide, launch, programs_for


@triton.jit(do_not_specialize=["n_tiles", "n_units"])
def _forward_kernel(X, Y, n_tiles, n_units, UNIT: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        start = index(tile, WIDE) * BLOCK
        mask = start + cols < index(n_units, WIDE) * UNIT
        x = tl.load(X + start + cols, mask=mask, other=0.0).to(tl.float32)
        x = tl.where(x < 0.0, 0.0, x)  # not maximum: a NaN stays one
        tl.store(Y + start + cols, (x * x).to(Y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["n_tiles", "n_units"])
def _backward_kernel(dY, X, dX, n_tiles, n_units, UNIT: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        start = index(tile, WIDE) * BLOCK
        mask = start + cols < index(n_units, WIDE) * UNIT
        x = tl.load(X + start + cols, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dY + start + cols, mask=mask, other=0.0).to(tl.float32)
        dx = 2.0 * tl.where(x < 0.0, 0.0, x) * dy
        tl.store(dX + start + cols, dx.to(dX.dtype.element_ty), mask=mask)


# Launchers


def _run(kernel, tensors, out, config):
    if out.numel():
        config = config or Flat.choose(out.device)
        tiles = cdiv(out.numel(), config.block)
        units, unit = in_units(out.numel())
        launch(
            kernel, programs_for(tiles, out.device), out.device,
            *tensors, out, tiles, units, UNIT=unit, BLOCK=config.block, WIDE=is_wide(out.numel()),
            num_warps=config.num_warps,
        )  # fmt: skip
    return out


def relu_squared_forward(x, config=None):
    """x: contiguous -> y like x."""
    return _run(_forward_kernel, (x,), torch.empty_like(x), config)


def relu_squared_backward(dy, x, config=None):
    """-> dx like x, in fresh memory."""
    return _run(_backward_kernel, (dy, x), torch.empty_like(x), config)


KERNELS = Kernels(relu_squared_forward, relu_squared_backward)
