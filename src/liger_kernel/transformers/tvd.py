"""Total variation distance as a module."""

from __future__ import annotations

import torch
from torch import nn

from liger_kernel.ops.tvd import REDUCTIONS
from liger_kernel.transformers import functional


class LigerTVDLoss(nn.Module):
    """Total variation distance of probabilities (T, V), see liger_tvd. Raises ValueError for an unknown reduction."""

    def __init__(self, reduction: str = "batchmean", ignore_index: int = -100):
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {sorted(REDUCTIONS)}, got {reduction!r}")
        self.reduction = reduction
        self.ignore_index = ignore_index

    def forward(self, p: torch.Tensor, q: torch.Tensor, shift_labels: torch.Tensor | None = None):
        """p: the student's, q: the teacher's, which take no gradient -> the loss."""
        return functional.liger_tvd(p, q, shift_labels, self.reduction, self.ignore_index)
