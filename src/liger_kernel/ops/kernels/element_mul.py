"""A row times a scalar: a kernel that other projects launch themselves, from liger_kernel.ops.utils."""

from __future__ import annotations

import triton
import triton.language as tl

from liger_kernel.ops.kernels.blocks import int64


@triton.jit
def element_mul_kernel(X_ptr, X_stride, grad_output_ptr, n_cols, BLOCK_SIZE: tl.constexpr, X_col_stride=1):
    """X[row] *= grad_output, in place; one program per row, grad_output a tensor of one element."""
    Row = X_ptr + int64(tl.program_id(0)) * X_stride
    factor = tl.load(grad_output_ptr).to(tl.float32)
    for start in range(0, n_cols, BLOCK_SIZE):
        cols = start + tl.arange(0, BLOCK_SIZE)
        x = tl.load(Row + cols.to(tl.int64) * X_col_stride, mask=cols < n_cols).to(tl.float32)
        tl.store(Row + cols.to(tl.int64) * X_col_stride, (x * factor).to(X_ptr.dtype.element_ty), mask=cols < n_cols)
