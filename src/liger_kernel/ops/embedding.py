"""Embedding: rows of a table.

    y[t] = w[index[t]]        dw[v] = sum of dy[t] over t with index[t] = v

Shapes    w: (V, H); index: any shape of integers; y: (*index.shape, H).
Numerics  y is a copy; dw is summed in fp32, in one order, and cast once.
Memory    keeps the index for backward, which sorts it; dw is dense.
Needs     one device. An index outside of the table raises IndexError on a CPU, and elsewhere is a row of NaN.
"""

from __future__ import annotations

import torch

from liger_kernel.ops.core import Case, Contract, Kernels, kernels, outputs, upcast

# Reference


def reference(w, index):
    """The same mathematics in plain torch, differentiable: the oracle of the tests."""
    return upcast(w)[index].to(w.dtype)


# Torch pair


def _forward(w, index):
    return torch.nn.functional.embedding(index, w)


def _backward(dy, index, n_rows):
    return torch.ops.aten.embedding_dense_backward(upcast(dy), index, n_rows, -1, False).to(dy.dtype)


TORCH = Kernels(_forward, _backward)


# Autograd


class LigerEmbeddingFunction(torch.autograd.Function):
    """apply(embeddings, indices) -> the rows of embeddings (V, H) at indices, (*indices.shape, H).

    Raises ValueError for a table that is not floating of two dimensions, and for indices that are not integers there.
    """

    @staticmethod
    def forward(ctx, embeddings, indices):
        check(embeddings, indices)
        embeddings, indices = embeddings.contiguous(), indices.contiguous()
        ctx.save_for_backward(indices)
        ctx.n_rows = embeddings.shape[0]
        return outputs(kernels("embedding", embeddings).forward(embeddings, indices))

    @staticmethod
    def backward(ctx, dy):
        (indices,) = ctx.saved_tensors
        return kernels("embedding", dy).backward(dy.contiguous(), indices, ctx.n_rows), None


def check(w, index):
    """ValueError for what cannot be honoured."""
    if w.dim() != 2 or not w.is_floating_point():
        raise ValueError(f"embedding: the table must be floating, (V, H), got {w.dtype} of shape {tuple(w.shape)}")
    if index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"embedding: indices must be int32 or int64, got {index.dtype}")
    if index.device != w.device:
        raise ValueError(f"embedding: the table is on {w.device} and the indices on {index.device}")


# Contract


def _case(shape, size, dtype, device):
    return Case((torch.randn(size, dtype=dtype, device=device), torch.randint(size[0], shape, device=device)))


def _cases(dtype, device):
    sizes = (((2, 8), (50, 64)), ((3, 7), (4, 41)), ((1,), (1, 1)), ((0,), (4, 8)), ((5,), (2, 2500)))
    return [_case(*size, dtype, device) for size in sizes]  # (3, 7): more of a row than a tile takes


def _timed(dtype, device):
    sizes = ((16384, (32000, 4096)), (16384, (128256, 2048)))
    return {f"{t} of {v}x{h}": _case((t,), (v, h), dtype, device) for t, (v, h) in sizes}


CONTRACT = Contract(
    call=LigerEmbeddingFunction.apply,
    reference=reference,
    cases=_cases,
    timed=_timed,
    # y is read and written, dy read, dw written in full
    bytes_moved=lambda w, index: (3 * index.numel() * w.shape[1] + w.numel()) * w.element_size(),
)
