"""Embedding as a module."""

from __future__ import annotations

import torch
from torch import nn

from liger_kernel.ops.embedding import LigerEmbeddingFunction


class LigerEmbedding(nn.Module):
    """Rows of a table (num_embeddings, embedding_dim), as torch's nn.Embedding; that of padding_idx takes no gradient.

    Raises ValueError for a padding_idx outside of the table.
    """

    def __init__(self, num_embeddings, embedding_dim, padding_idx=None):
        super().__init__()
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(f"padding_idx must be below num_embeddings={num_embeddings}, got {padding_idx}")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = None if padding_idx is None else padding_idx % num_embeddings
        self.weight = nn.Parameter(torch.randn(num_embeddings, embedding_dim))
        if padding_idx is not None:
            with torch.no_grad():
                self.weight[padding_idx].zero_()

    def forward(self, indices):
        embedded = LigerEmbeddingFunction.apply(self.weight, indices)
        if self.padding_idx is None:
            return embedded
        return torch.where((indices == self.padding_idx)[..., None], embedded.detach(), embedded)

    def extra_repr(self):
        return f"{self.num_embeddings}, {self.embedding_dim}, padding_idx={self.padding_idx}"
