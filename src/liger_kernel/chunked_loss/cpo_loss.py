"""Contrastive preference optimisation.

    d = log p(chosen) - log p(rejected);  e: label_smoothing
    loss = alpha NLL(chosen) + mean(-(1 - e) log s(beta d) - e log s(-beta d))

Xu et al. 2024, arXiv:2401.08417.
"""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from liger_kernel.chunked_loss.function import IGNORE_INDEX, Call
from liger_kernel.chunked_loss.fused_linear_preference import LigerFusedLinearPreferenceBase


def smoothed(d: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """-log s(d), with a share label_smoothing of the labels taken for wrong."""
    return -(1 - label_smoothing) * logsigmoid(d) - label_smoothing * logsigmoid(-d)


def check_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing!r}")


class LigerFusedLinearCPOFunction(LigerFusedLinearPreferenceBase):
    """apply(_input, weight, target, ...) in the order of forward -> (loss, (chosen_logps, rejected_logps,
    chosen_logits_mean, rejected_logits_mean, nll_loss, chosen_rewards, rejected_rewards)).
    """

    @staticmethod
    def preference_loss_fn(chosen_logps, rejected_logps, full_target, beta=0.1, label_smoothing=0.0):
        """-> (loss, chosen_rewards, rejected_rewards)."""
        loss = smoothed(beta * (chosen_logps - rejected_logps), label_smoothing).sum()
        loss = loss / max(full_target.shape[0] // 2, 1)
        return loss, beta * chosen_logps.detach(), beta * rejected_logps.detach()

    @classmethod
    def forward(
        cls, ctx, _input, weight, target, bias=None, ignore_index=IGNORE_INDEX, beta=0.1, alpha=1.0,
        label_smoothing=0.0, compute_nll_loss=True, compiled=True, average_log_prob=False, chunk_size=1, softcap=None,
        logit_scale=1.0,
    ):  # fmt: skip
        check_smoothing(label_smoothing)
        return LigerFusedLinearPreferenceBase.forward(
            cls, ctx, _input, weight, target, bias, ignore_index=ignore_index, alpha=alpha, beta=beta,
            compute_nll_loss=compute_nll_loss, average_log_prob=average_log_prob, softcap=softcap,
            logit_scale=logit_scale, label_smoothing=label_smoothing,
        )  # fmt: skip


call = Call(LigerFusedLinearCPOFunction)


class LigerFusedLinearCPOLoss(torch.nn.Module):
    """Contrastive preference optimisation over a head, logits never kept.

    compute_nll_loss adds alpha times the NLL of the chosen tokens. average_log_prob: of a sequence's tokens, not their
    sum. softcap and logit_scale are the head's. compiled and chunk_size have no effect.
    """

    def __init__(
        self, ignore_index: int = IGNORE_INDEX, beta: float = 0.1, alpha: float = 1.0, label_smoothing: float = 0.0,
        compute_nll_loss: bool = True, compiled: bool = True, average_log_prob: bool = False, chunk_size: int = 1, *,
        softcap: float | None = None, logit_scale: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        check_smoothing(label_smoothing)
        self.ignore_index, self.beta, self.alpha, self.label_smoothing = ignore_index, beta, alpha, label_smoothing
        self.compute_nll_loss, self.average_log_prob = compute_nll_loss, average_log_prob
        self.compiled, self.chunk_size = compiled, chunk_size
        self.softcap, self.logit_scale = softcap, logit_scale

    def forward(self, lin_weight, _input, target, bias=None):
        """_input: (2 N, L, H), chosen then rejected; target: (2 N, L), already shifted.

        -> (loss, (chosen_logps (N,), rejected_logps, chosen_logits_mean, rejected_logits_mean, nll_loss,
        chosen_rewards (N,), rejected_rewards)); only loss is differentiable.
        """
        return call(
            _input, lin_weight, target, bias, self.ignore_index, self.beta, self.alpha, self.label_smoothing,
            self.compute_nll_loss, self.compiled, self.average_log_prob, self.chunk_size, self.softcap,
            self.logit_scale,
        )  # fmt: skip
