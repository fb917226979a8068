"""Cross entropy and total variation distance of whole logits as a module, on liger_kernel.ops.fused_ce_tvd."""

from __future__ import annotations

import torch
from torch import nn

from liger_kernel.ops.fused_ce_tvd import LigerFusedCETVDFunction


class LigerFusedCETVDLoss(nn.Module):
    """(cross entropy, total variation distance) of a student's logits, averaged over the tokens that count.

    Raises ValueError, at the call, for shapes, dtypes or devices that do not fit and, on a CPU or under
    LIGER_KERNEL_DEBUG=1, for a label outside [0, V); on a GPU its cross entropy is NaN.
    """

    def __init__(self, ignore_index: int = -100):
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, student_logits: torch.Tensor, teacher_logits: torch.Tensor, target: torch.Tensor):
        """logits: (T, V), the teacher's without a gradient; target: (T,) -> (ce, tvd), 0-d fp32, differentiable."""
        return LigerFusedCETVDFunction.apply(student_logits, teacher_logits, target, self.ignore_index)
