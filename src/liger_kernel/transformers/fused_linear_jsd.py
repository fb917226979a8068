"""Jensen-Shannon divergence of two heads as a module, on liger_kernel.ops.fused_linear_jsd."""

from __future__ import annotations

import torch
from torch import nn

from liger_kernel.ops.jsd import check_options
from liger_kernel.transformers import functional


class LigerFusedLinearJSD(nn.Module):
    """Jensen-Shannon divergence of a student's head from a teacher's, see liger_fused_linear_jsd.

    Raises ValueError for an option out of range, at construction.
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_options(jsd_beta, ignore_index)
        self.jsd_beta, self.ignore_index = jsd_beta, ignore_index
        self.temperature, self.accum_dtype = temperature, accum_dtype

    def forward(self, student_input, student_weight, teacher_input, teacher_weight, shift_labels=None):
        """student_input: (T, H), student_weight: (V, H), the teacher's (T, H') and (V, H') -> the loss, 0-d."""
        return functional.liger_fused_linear_jsd(
            student_input, student_weight, teacher_input, teacher_weight, shift_labels, self.jsd_beta,
            self.ignore_index, self.temperature, self.accum_dtype,
        )  # fmt: skip
