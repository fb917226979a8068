"""Odds ratio preference optimisation.

    log odds(x) = log p - log(1 - p), p: the geometric mean of a sequence's token probabilities
    loss = NLL(chosen) - beta mean(log s(log odds(chosen) - log odds(rejected)))

Hong et al. 2024, arXiv:2403.07691.
"""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid

from liger_kernel.chunked_loss.function import IGNORE_INDEX, Call
from liger_kernel.chunked_loss.fused_linear_preference import LigerFusedLinearPreferenceBase


class LigerFusedLinearORPOFunction(LigerFusedLinearPreferenceBase):
    """apply(_input, weight, target, ...) in the order of forward -> (loss, (chosen_logps, rejected_logps,
    chosen_logits_mean, rejected_logits_mean, nll_loss, chosen_rewards, rejected_rewards, log_odds_ratio,
    log_odds_chosen)).
    """

    @staticmethod
    def preference_loss_fn(chosen_logps, rejected_logps, full_target, beta=0.1):
        """-> (loss, chosen_rewards, rejected_rewards, mean log s(log odds), mean log odds)."""
        gap = chosen_logps - rejected_logps - (log1mexp(chosen_logps) - log1mexp(rejected_logps))
        ratio, n_pairs = logsigmoid(gap), max(full_target.shape[0] // 2, 1)
        means = ratio.detach().sum() / n_pairs, gap.detach().sum() / n_pairs
        return -beta * ratio.sum() / n_pairs, beta * chosen_logps.detach(), beta * rejected_logps.detach(), *means

    @classmethod
    def forward(
        cls, ctx, _input, weight, target, bias=None, ignore_index=IGNORE_INDEX, beta=0.1, compute_nll_loss=True,
        nll_target=None, compiled=True, chunk_size=1, softcap=None, logit_scale=1.0,
    ):  # fmt: skip
        return LigerFusedLinearPreferenceBase.forward(
            cls, ctx, _input, weight, target, bias, ignore_index=ignore_index, beta=beta,
            compute_nll_loss=compute_nll_loss, nll_target=nll_target, average_log_prob=True, softcap=softcap,
            logit_scale=logit_scale,
        )  # fmt: skip


def log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x <= 0, without cancellation (Maechler 2012); what rounds to 0 is held just below it."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    near = x > -0.6931471805599453
    return torch.where(
        near, torch.log(-torch.expm1(x.where(near, -0.5))), torch.log1p(-torch.exp(x.where(~near, -1.0)))
    )


call = Call(LigerFusedLinearORPOFunction)


class LigerFusedLinearORPOLoss(torch.nn.Module):
    """Odds ratio preference optimisation over a head, logits never kept.

    compute_nll_loss=False leaves out the NLL of the chosen tokens. softcap and logit_scale are the head's. compiled and
    chunk_size have no effect.
    """

    def __init__(
        self, ignore_index: int = IGNORE_INDEX, beta: float = 0.1, compute_nll_loss: bool = True, compiled: bool = True,
        chunk_size: int = 1, *, softcap: float | None = None, logit_scale: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        self.ignore_index, self.beta, self.compute_nll_loss = ignore_index, beta, compute_nll_loss
        self.compiled, self.chunk_size = compiled, chunk_size
        self.softcap, self.logit_scale = softcap, logit_scale

    def forward(self, lin_weight, _input, target, bias=None, nll_target=None):
        """_input: (2 N, L, H), chosen then rejected; target: (2 N, L), already shifted; nll_target: (N, L) or (2 N, L),
        the labels of the chosen that the NLL is over (default: target's). Raises ValueError for a token that the two
        give different labels (on a GPU the loss is NaN).

        -> (loss, (chosen_logps (N,), rejected_logps, chosen_logits_mean, rejected_logits_mean, nll_loss,
        chosen_rewards (N,), rejected_rewards, log_odds_ratio, log_odds_chosen)); only loss is differentiable.
        """
        return call(
            _input, lin_weight, target, bias, self.ignore_index, self.beta, self.compute_nll_loss, nll_target,
            self.compiled, self.chunk_size, self.softcap, self.logit_scale,
        )  # fmt: skip
