"""torch.nn.KLDivLoss on liger_kernel.ops.kl_div."""

from __future__ import annotations

import torch
from torch import nn

from liger_kernel.transformers import functional


class LigerKLDIVLoss(nn.KLDivLoss):
    """Kullback-Leibler divergence of log-probabilities, with the options of torch.nn.KLDivLoss after eps.

    eps: lower bound of what the log of a target is taken of. Raises what liger_kl_div raises, at the call.
    """

    def __init__(self, eps: float = 1e-10, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.eps = eps

    def forward(self, y_pred: torch.Tensor, y_true: torch.Tensor):
        """y_pred: log-probabilities; y_true: probabilities, or logs of them with log_target=True -> the loss."""
        return functional.liger_kl_div(
            y_pred, y_true, reduction=self.reduction, log_target=self.log_target, eps=self.eps
        )
