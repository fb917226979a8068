"""Generalised Jensen-Shannon divergence as a module."""

from __future__ import annotations

import torch
from torch import nn

from liger_kernel.ops.jsd import check_options
from liger_kernel.transformers import functional


class LigerJSD(nn.Module):
    """Jensen-Shannon divergence of log-probabilities (T, V), see liger_jsd.

    Raises ValueError for an option out of range, at construction.
    """

    def __init__(self, beta: float = 0.5, ignore_index: int = -100):
        super().__init__()
        check_options(beta, ignore_index)
        self.beta = beta
        self.ignore_index = ignore_index

    def forward(self, log_q: torch.Tensor, log_p: torch.Tensor, shift_labels: torch.Tensor | None = None):
        """log_q: the student's, log_p: the teacher's, which take no gradient -> the loss, 0-d."""
        return functional.liger_jsd(log_q, log_p, shift_labels, self.beta, self.ignore_index)
