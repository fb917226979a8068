"""LigerVocabParallelCrossEntropy: the loss of logits whose vocabulary is split among ranks."""

from __future__ import annotations

import torch
from torch import nn

from liger_kernel.ops.core import wide
from liger_kernel.ops.row_loss import REDUCTIONS, inverse
from liger_kernel.ops.vocab_parallel_cross_entropy import LigerVocabParallelCEFunction, validate_formula_and_mode


class LigerVocabParallelCrossEntropy(nn.Module):
    """Cross entropy of each rank's part of the logits; every rank of the group gets the loss.

    label_smoothing_formula and label_smoothing_mode: see liger_kernel.ops.vocab_parallel_cross_entropy. Raises
    ValueError for an option that is not one of theirs.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "none",
        label_smoothing_formula: str = "pytorch",
        label_smoothing_mode: str = "global",
    ):
        super().__init__()
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {sorted(REDUCTIONS)}, got {reduction!r}")
        validate_formula_and_mode(label_smoothing_formula, label_smoothing_mode)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.label_smoothing_formula = label_smoothing_formula
        self.label_smoothing_mode = label_smoothing_mode

    def forward(self, vocab_parallel_logits: torch.Tensor, target: torch.Tensor, tp_group=None) -> torch.Tensor:
        """vocab_parallel_logits: (..., V of this rank); target: (...) of the whole vocabulary. tp_group: None is all
        ranks of the job. The loss is fp32, like target or 0-d; "mean" is over the tokens that are not ignored."""
        loss = LigerVocabParallelCEFunction.apply(
            vocab_parallel_logits, target, tp_group, self.ignore_index, self.label_smoothing,
            self.label_smoothing_formula, self.label_smoothing_mode,
        )  # fmt: skip
        if self.reduction == "none":
            return loss
        if self.reduction == "sum":
            return loss.sum()
        return loss.sum() * inverse((target != self.ignore_index).sum(dtype=wide(loss.dtype)))
