"""A sum of matrix products, kept wider than its result, that needs no second allocation for the result.

    total = a_1 b_1 + a_2 b_2 + ...        result = total rounded once

Shapes    a: (M, K); b: (K, N); total: (M, N); result: (M, N) or more rows, those around it zero.
Numerics  the sum in sum_dtype, by the product's own accumulator where torch offers that.
Memory    total in two halves, left and right columns. A row of the left half in fp32 has the bytes of a whole row in
          16 bits, so the result is written where the left half was, and the right half is freed.
"""

from __future__ import annotations

import functools

import torch

from liger_kernel.ops.core import Kernels, kernels

SLAB = 32 << 20  # bytes of the temporaries where something is widened or narrowed by hand


class WeightSum:
    """A sum of products (M, N) in sum_dtype that ends in dtype, as the rows `within` of a result with zeros around."""

    def __init__(self, n_rows, width, sum_dtype, dtype, device, within: tuple[int, int] | None = None):
        self.shape, self.dtype, self.within = (n_rows, width), dtype, within or (0, n_rows)
        self.halves = sum_dtype.itemsize == 2 * dtype.itemsize and width % 2 == 0
        n_parts = 2 if self.halves else 1
        self.parts = [torch.empty(n_rows, width // n_parts, dtype=sum_dtype, device=device) for _ in range(n_parts)]
        self.empty = True

    def add(self, a: torch.Tensor, b: torch.Tensor, rows: slice | None = None, first: bool | None = None) -> None:
        """Add a b, for a of shape (M, K) and b (K, N), to `rows` alone where given (first: they have nothing yet)."""
        parts = [part[slice(*self.within) if rows is None else rows] for part in self.parts]
        kernels("weight_sum", a).forward(parts, a, b, self.empty if first is None else first)
        self.empty = False

    def finish(self) -> torch.Tensor:
        """The sum in dtype. Nothing may be added afterwards."""
        parts, self.parts = self.parts, []
        if self.empty:
            return torch.zeros(self.shape, dtype=self.dtype, device=parts[0].device)
        if self.halves:
            kernels("weight_sum", parts[0]).backward(*(part[slice(*self.within)] for part in parts), self.dtype)
            result = parts[0].view(self.dtype)
        else:
            result = parts[0].to(self.dtype)
        return zero_outside(result, self.within)


def zero_outside(result: torch.Tensor, within: tuple[int, int]) -> torch.Tensor:
    """result, its rows before and after `within` set to zero."""
    result[: within[0]].zero_()
    result[within[1] :].zero_()
    return result


def add_product(parts, a, b, first: bool) -> None:
    """parts = (0 if first else parts) + a b; parts: one matrix or its left and right half, maybe wider than a."""
    width = parts[0].shape[1]
    columns = [b] if len(parts) == 1 else [b[:, :width], b[:, width:]]
    wide, narrow = parts[0].dtype, a.dtype
    if wide == narrow:
        for total, right in zip(parts, columns):
            torch.mm(a, right, out=total) if first else total.addmm_(a, right)
    elif widens(a.device.type, narrow, wide):
        for total, right in zip(parts, columns):
            if first:
                torch.mm(a, right, out_dtype=wide, out=total)
            else:
                torch.addmm(total, a, right, out_dtype=wide, out=total)
    else:
        columns = [right.to(wide) for right in columns]
        step = max(1, SLAB // max(1, a.shape[1] * wide.itemsize))
        for i in range(0, a.shape[0], step):
            part = a[i : i + step].to(wide)
            for total, right in zip(parts, columns):
                rows = total[i : i + step]
                torch.mm(part, right, out=rows) if first else rows.addmm_(part, right)


@functools.cache
def widens(device_type: str, narrow: torch.dtype, wide: torch.dtype) -> bool:
    """Whether this torch multiplies narrow matrices into a wide result on this kind of device."""
    a = torch.zeros(16, 16, dtype=narrow, device=device_type)
    total = torch.zeros(16, 16, dtype=wide, device=device_type)
    try:
        torch.mm(a, a, out_dtype=wide, out=total)
        torch.addmm(total, a, a, out_dtype=wide, out=total)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return True


def narrow(left, right, dtype) -> None:
    """Round (M, N) in two halves of N / 2 columns to dtype, into the memory of the left half."""
    result = left.view(dtype)
    step = max(1, SLAB // max(1, result.shape[1] * dtype.itemsize))
    for i in range(0, left.shape[0], step):
        rows = slice(i, i + step)
        result[rows] = torch.cat((left[rows], right[rows]), 1).to(dtype)  # by way of a copy: these bytes overlap


TORCH = Kernels(add_product, narrow)
