"""Sparsemax as a module."""

from __future__ import annotations

from torch import nn

from liger_kernel.ops.sparsemax import LigerSparsemaxFunction


class LigerSparsemax(nn.Module):
    """Sparsemax over dim (arXiv:1602.02068) -> the same shape and dtype. Raises ValueError as liger_sparsemax does."""

    def __init__(self, dim=-1):
        super().__init__()
        self.dim = dim

    def forward(self, x):
        return LigerSparsemaxFunction.apply(x, self.dim)

    def extra_repr(self):
        return f"dim={self.dim}"
