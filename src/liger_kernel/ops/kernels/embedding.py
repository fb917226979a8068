"""Embedding in Triton; the mathematics is in liger_kernel.ops.embedding.

The backward sorts the indices. The program of a table row's first place in that order adds all its gradients, so that
no two programs write to one row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from liger_kernel.ops.core import Kernels
from liger_kernel.ops.kernels.blocks import cdiv, int64, launch, power_of_2_from, programs_for

# Kernels: Capital = memory, lower case = registers, ALL_CAPS = compile time.


@triton.jit(do_not_specialize=["T", "V"])
def _forward_kernel(W, Index, Y, T, V, N, BLOCK: tl.constexpr):
    strips = tl.cdiv(N, BLOCK)
    for item in range(tl.program_id(0), T * strips, tl.num_programs(0)):
        cols = (item % strips) * BLOCK + tl.arange(0, BLOCK)
        at = tl.load(Index + item // strips).to(tl.int64)
        known = tl.where((at >= 0) & (at < V), N, 0)  # columns there are
        w = tl.load(W + at * N + cols, mask=cols < known, other=0.0).to(tl.float32)
        y = tl.where(cols < known, w, float("nan")).to(Y.dtype.element_ty)
        tl.store(Y + int64(item // strips) * N + cols, y, mask=cols < N)


@triton.jit(do_not_specialize=["T", "V"])
def _backward_kernel(dY, Ordered, Order, End, dW, T, V, N, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Ordered: the sorted indices; Order: where each was; End: how many of them are not above it."""
    strips = tl.cdiv(N, BLOCK)
    rows = tl.arange(0, ROWS)
    for item in range(tl.program_id(0), T * strips, tl.num_programs(0)):
        place = int64(item // strips)
        cols = (item % strips) * BLOCK + tl.arange(0, BLOCK)
        at = tl.load(Ordered + place).to(tl.int64)
        before = tl.load(Ordered + place - 1, mask=place > 0, other=-1).to(tl.int64)
        first = (at != before) & (at >= 0) & (at < V)
        end = tl.where(first, tl.load(End + place), place)
        dw = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for start in range(place, end, ROWS):
            mine = start + rows < end
            source = tl.load(Order + start + rows, mask=mine, other=0).to(tl.int64)
            mask = mine[:, None] & (cols < N)[None, :]
            dw += tl.load(dY + source[:, None] * N + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(dW + at * N + cols, tl.sum(dw, axis=0).to(dW.dtype.element_ty), mask=cols < tl.where(first, N, 0))


# Launchers


def _launch(kernel, n_cols, elements, device, *args, **meta):
    block = min(power_of_2_from(n_cols), elements)
    programs = programs_for(args[-3] * cdiv(n_cols, block), device)
    launch(kernel, programs, device, *args, BLOCK=block, num_warps=4, **meta)


def embedding_forward(w, index):
    """w: (V, H) contiguous; index: integers -> y (*index.shape, H) like w."""
    n_rows, n_cols = w.shape
    y = w.new_empty(*index.shape, n_cols)
    if y.numel():
        _launch(_forward_kernel, n_cols, 2048, w.device, w, index, y, index.numel(), n_rows, n_cols)
    return y


def embedding_backward(dy, index, n_rows):
    """dy: (*index.shape, H) contiguous -> dw (n_rows, H) like dy."""
    n_cols = dy.shape[-1]
    dw = dy.new_zeros(n_rows, n_cols)
    if dy.numel():
        ordered, order = index.flatten().sort(stable=True)
        end = torch.searchsorted(ordered, ordered, right=True)
        tensors = dy, ordered, order, end, dw, index.numel(), n_rows, n_cols
        _launch(_backward_kernel, n_cols, 512, dy.device, *tensors, ROWS=4)
    return dw


KERNELS = Kernels(embedding_forward, embedding_backward)
