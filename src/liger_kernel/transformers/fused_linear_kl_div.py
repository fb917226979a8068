"""Kullback-Leibler divergence of given probabilities from a head, on liger_kernel.ops.fused_linear_kl_div."""

from __future__ import annotations

import torch
from torch import nn

from liger_kernel.ops.fused_linear_kl_div import check_options
from liger_kernel.transformers import functional


class LigerFusedLinearKLDivLoss(nn.Module):
    """Divergence of a student's head from target probabilities, see liger_fused_linear_kl_div.

    Raises ValueError for an option out of range, at construction.
    """

    def __init__(
        self,
        reduction: str = "batchmean",
        ignore_index: int = -100,
        temperature: float = 1.0,
        eps: float = 1e-10,
        accum_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_options(reduction, temperature, eps)
        self.reduction, self.ignore_index, self.temperature = reduction, ignore_index, temperature
        self.eps, self.accum_dtype = eps, accum_dtype

    def forward(self, student_input, student_weight, target, shift_labels=None):
        """student_input: (T, H), student_weight: (V, H), target: (T, V) -> the loss, 0-d."""
        return functional.liger_fused_linear_kl_div(
            student_input, student_weight, target, shift_labels, self.reduction, self.ignore_index, self.temperature,
            self.eps, self.accum_dtype,
        )  # fmt: skip
