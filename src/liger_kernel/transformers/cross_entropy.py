"""torch.nn.CrossEntropyLoss on liger_kernel.ops.cross_entropy."""

from __future__ import annotations

import torch

from liger_kernel.ops.row_loss import REDUCTIONS, RowLoss
from liger_kernel.transformers import functional


class LigerCrossEntropyLoss(torch.nn.Module):
    """Cross entropy of logits (N, V) and labels (N,), with the options of liger_cross_entropy.

    Raises ValueError for an option out of range, at construction.
    """

    def __init__(
        self,
        weight: torch.Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ):
        super().__init__()
        check_options(reduction, ignore_index, label_smoothing, lse_square_scale, softcap)
        self.register_buffer("weight", weight, persistent=False)
        self.ignore_index = ignore_index
        self.lse_square_scale = lse_square_scale
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.softcap = softcap
        self.return_z_loss = return_z_loss
        self.return_token_accuracy = return_token_accuracy
        self.return_predicted_tokens = return_predicted_tokens

    def forward(self, _input: torch.Tensor, target: torch.Tensor):
        """-> the loss, or a CrossEntropyOutput where a return_* is set."""
        return functional.liger_cross_entropy(
            _input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            lse_square_scale=self.lse_square_scale,
            softcap=self.softcap,
            return_z_loss=self.return_z_loss,
            return_token_accuracy=self.return_token_accuracy,
            return_predicted_tokens=self.return_predicted_tokens,
        )


def check_options(reduction, ignore_index, label_smoothing, lse_square_scale, softcap) -> None:
    """ValueError for what no call could honour."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {sorted(REDUCTIONS)}, got {reduction!r}")
    RowLoss(ignore_index, label_smoothing, lse_square_scale, softcap)
