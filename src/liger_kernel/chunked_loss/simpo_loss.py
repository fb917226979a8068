"""Simple preference optimisation: average log-probabilities, a margin, no reference model.

    d = beta (log p(chosen) - log p(rejected)) - gamma;  e: label_smoothing
    loss = alpha NLL(chosen) + mean(-(1 - e) log s(d) - e log s(-d))

Meng et al. 2024, arXiv:2405.14734.
"""

from __future__ import annotations

import torch

from liger_kernel.chunked_loss.cpo_loss import check_smoothing, smoothed
from liger_kernel.chunked_loss.function import IGNORE_INDEX, Call
from liger_kernel.chunked_loss.fused_linear_preference import LigerFusedLinearPreferenceBase


class LigerFusedLinearSimPOFunction(LigerFusedLinearPreferenceBase):
    """apply(_input, weight, target, ...) in the order of forward -> (loss, (chosen_logps, rejected_logps,
    chosen_logits_mean, rejected_logits_mean, nll_loss, chosen_rewards, rejected_rewards)).
    """

    @staticmethod
    def preference_loss_fn(chosen_logps, rejected_logps, full_target, beta=0.1, gamma=0.5, label_smoothing=0.0):
        """-> (loss, chosen_rewards, rejected_rewards)."""
        loss = smoothed(beta * (chosen_logps - rejected_logps) - gamma, label_smoothing).sum()
        loss = loss / max(full_target.shape[0] // 2, 1)
        return loss, beta * chosen_logps.detach(), beta * rejected_logps.detach()

    @classmethod
    def forward(
        cls, ctx, _input, weight, target, bias=None, ignore_index=IGNORE_INDEX, beta=0.1, alpha=1.0,
        label_smoothing=0.0, compute_nll_loss=False, compiled=True, gamma=0.5, chunk_size=1, softcap=None,
        logit_scale=1.0,
    ):  # fmt: skip
        check_smoothing(label_smoothing)
        return LigerFusedLinearPreferenceBase.forward(
            cls, ctx, _input, weight, target, bias, ignore_index=ignore_index, alpha=alpha, beta=beta,
            compute_nll_loss=compute_nll_loss, average_log_prob=True, softcap=softcap, logit_scale=logit_scale,
            gamma=gamma, label_smoothing=label_smoothing,
        )  # fmt: skip


call = Call(LigerFusedLinearSimPOFunction)


class LigerFusedLinearSimPOLoss(torch.nn.Module):
    """Simple preference optimisation over a head, logits never kept.

    gamma: the margin, in units of beta times a log-probability. compute_nll_loss adds alpha times the NLL of the chosen
    tokens. softcap and logit_scale are the head's. compiled and chunk_size have no effect.
    """

    def __init__(
        self, ignore_index: int = IGNORE_INDEX, beta: float = 0.1, alpha: float = 1.0, label_smoothing: float = 0.0,
        compute_nll_loss: bool = True, compiled: bool = True, gamma: float = 0.5, chunk_size: int = 1, *,
        softcap: float | None = None, logit_scale: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        check_smoothing(label_smoothing)
        self.ignore_index, self.beta, self.alpha, self.label_smoothing = ignore_index, beta, alpha, label_smoothing
        self.compute_nll_loss, self.gamma = compute_nll_loss, gamma
        self.compiled, self.chunk_size = compiled, chunk_size
        self.softcap, self.logit_scale = softcap, logit_scale

    def forward(self, lin_weight, _input, target, bias=None):
        """_input: (2 N, L, H), chosen then rejected; target: (2 N, L), already shifted.

        -> (loss, (chosen_logps (N,), rejected_logps, chosen_logits_mean, rejected_logits_mean, nll_loss,
        chosen_rewards (N,), rejected_rewards)); only loss is differentiable.
        """
        return call(
            _input, lin_weight, target, bias, self.ignore_index, self.beta, self.alpha, self.label_smoothing,
            self.compute_nll_loss, self.compiled, self.gamma, self.chunk_size, self.softcap, self.logit_scale,
        )  # fmt: skip
