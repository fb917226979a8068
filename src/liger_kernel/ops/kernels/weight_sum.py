"""Rounding a sum in its own memory, in Triton; the products are torch's. See liger_kernel.ops.weight_sum."""

from __future__ import annotations

import triton
import triton.language as tl

from liger_kernel.backends import device_of
from liger_kernel.ops.core import Kernels
from liger_kernel.ops.kernels.blocks import int64, launch, power_of_2_from, programs_for
from liger_kernel.ops.weight_sum import add_product

# Kernels: Capital = memory, lower case = registers, ALL_CAPS = compile time.


@triton.jit
def _narrow_row(Left, Right, Out, base, N, BLOCK: tl.constexpr):
    for start in range(0, N, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(Left + base + cols, mask=cols < N)
        tl.debug_barrier()
        tl.store(Out + 2 * base + cols, x.to(Out.dtype.element_ty), mask=cols < N)
    tl.debug_barrier()
    for start in range(0, N, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(Right + base + cols, mask=cols < N)
        tl.store(Out + 2 * base + N + cols, x.to(Out.dtype.element_ty), mask=cols < N)


@triton.jit(do_not_specialize=["R"])
def _narrow_kernel(Left, Right, Out, R, N, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr):
    """Out (R, 2 N) is the memory of Left (R, N): what is written lies where all threads have already read."""
    for row in range(tl.program_id(0), R, tl.num_programs(0)):
        base = int64(row) * N
        if ONE_BLOCK:
            cols = tl.arange(0, BLOCK)
            x = tl.load(Left + base + cols, mask=cols < N)
            y = tl.load(Right + base + cols, mask=cols < N)
            tl.debug_barrier()
            tl.store(Out + 2 * base + cols, x.to(Out.dtype.element_ty), mask=cols < N)
            tl.store(Out + 2 * base + N + cols, y.to(Out.dtype.element_ty), mask=cols < N)
        else:
            _narrow_row(Left, Right, Out, base, N, BLOCK)


def narrow(left, right, dtype) -> None:
    """left, right: (R, N) contiguous -> left's memory is (R, 2 N) in dtype, half as wide."""
    n_rows, width = left.shape
    backend = device_of(left.device)
    block = min(power_of_2_from(width), backend.max_block(2), 4096)
    # 8 fp32 per lane: two 16-byte loads in flight
    num_warps = min(max(block // (backend.warp_width * 8), 1), 16, backend.max_warps)
    launch(
        _narrow_kernel, programs_for(n_rows, left.device), left.device,
        left, right, left.view(dtype), n_rows, width, BLOCK=block, ONE_BLOCK=block >= width, num_warps=num_warps,
    )  # fmt: skip


KERNELS = Kernels(add_product, narrow)
