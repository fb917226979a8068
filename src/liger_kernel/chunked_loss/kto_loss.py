"""Kahneman-Tversky optimisation: unpaired sequences, each desirable or not.

    a = log p - log ref of a sequence;  kl: an estimate of the KL to the reference, given
    desirable    w+ (1 - s(beta (a - kl)))        undesirable    w- (1 - s(beta (kl - a)))        loss: their mean

Ethayarajh et al. 2024, arXiv:2402.01306.
"""

from __future__ import annotations

import torch

from liger_kernel.chunked_loss.function import IGNORE_INDEX, Call
from liger_kernel.chunked_loss.fused_linear_unpaired_preference import LigerFusedLinearUnpairedPreferenceBase


class LigerFusedLinearKTOFunction(LigerFusedLinearUnpairedPreferenceBase):
    """apply(_input, weight, target, preference_labels, ...) in the order of forward -> (loss, (chosen_logps_sum,
    rejected_logps_sum, chosen_logits_sum, rejected_logits_sum, chosen_rewards_sum, rejected_rewards_sum)).
    """

    @staticmethod
    def preference_loss_fn(
        log_prob_chunk, preference_labels_chunk, full_target, ref_log_prob_chunk=None, beta=0.1, kl=None,
        desirable_weight=1.0, undesirable_weight=1.0,
    ):  # fmt: skip
        """-> (loss, sum of the desirable sequences' rewards, sum of the others')."""
        desired = preference_labels_chunk
        gap = log_prob_chunk if ref_log_prob_chunk is None else log_prob_chunk - ref_log_prob_chunk
        rewards = beta * gap.detach()
        centred = beta * (gap if kl is None else gap - kl)
        each = torch.where(
            desired, desirable_weight * torch.sigmoid(-centred), undesirable_weight * torch.sigmoid(centred)
        )
        sums = (rewards.where(chosen, 0.0).sum() for chosen in (desired, ~desired))
        return each.sum() / max(full_target.shape[0], 1), *sums

    @classmethod
    def forward(
        cls, ctx, _input, weight, target, preference_labels, bias=None, ref_input=None, ref_weight=None, ref_bias=None,
        kl=None, ignore_index=IGNORE_INDEX, beta=0.1, compiled=True, use_ref_model=True, average_log_prob=False,
        chunk_size=1, desirable_weight=1.0, undesirable_weight=1.0, softcap=None, logit_scale=1.0,
    ):  # fmt: skip
        if isinstance(kl, torch.Tensor):
            if kl.numel() != 1:
                raise ValueError(f"{cls.__name__}: kl must have one element, got shape {tuple(kl.shape)}")
            kl = kl.detach().reshape(()).to(_input.device)
        return LigerFusedLinearUnpairedPreferenceBase.forward(
            cls, ctx, _input, weight, target, preference_labels, bias, ignore_index=ignore_index,
            use_ref_model=use_ref_model, ref_input=ref_input, ref_weight=ref_weight, ref_bias=ref_bias,
            average_log_prob=average_log_prob, softcap=softcap, logit_scale=logit_scale, beta=beta, kl=kl,
            desirable_weight=desirable_weight, undesirable_weight=undesirable_weight,
        )  # fmt: skip


call = Call(LigerFusedLinearKTOFunction)


class LigerFusedLinearKTOLoss(torch.nn.Module):
    """Kahneman-Tversky optimisation over a head, logits never kept.

    A reference model is used where one is given at the call, whatever use_ref_model says: trainers pass False and the
    hidden states of the model without its adapter. With use_ref_model=True one must be given. average_log_prob: of a
    sequence's tokens, not their sum. desirable_weight and undesirable_weight multiply the two kinds of losses. softcap
    and logit_scale are those of both models' heads. compiled and chunk_size have no effect.
    """

    def __init__(
        self, ignore_index: int = IGNORE_INDEX, beta: float = 0.1, compiled: bool = True, use_ref_model: bool = False,
        average_log_prob: bool = False, chunk_size: int = 1, *, desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0, softcap: float | None = None, logit_scale: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        self.ignore_index, self.beta, self.use_ref_model = ignore_index, beta, use_ref_model
        self.average_log_prob, self.compiled, self.chunk_size = average_log_prob, compiled, chunk_size
        self.desirable_weight, self.undesirable_weight = desirable_weight, undesirable_weight
        self.softcap, self.logit_scale = softcap, logit_scale

    def forward(
        self, _input, lin_weight, target, bias=None, preference_labels=None, ref_input=None, ref_weight=None,
        ref_bias=None, kl=None,
    ):  # fmt: skip
        """_input: (N, L, H); target: (N, L), already shifted; preference_labels: (N,), true where desirable; kl: a
        number or a tensor of one element, detached (default 0).

        -> (loss, (chosen_logps_sum, rejected_logps_sum, chosen_logits_sum, rejected_logits_sum, chosen_rewards_sum,
        rejected_rewards_sum)), the sums over the desirable (chosen) and the other sequences, those of the logits over
        live tokens; only loss is differentiable.
        """
        return call(
            _input, lin_weight, target, preference_labels, bias, ref_input, ref_weight, ref_bias, kl,
            self.ignore_index, self.beta, self.compiled, self.use_ref_model or ref_input is not None,
            self.average_log_prob, self.chunk_size, self.desirable_weight, self.undesirable_weight, self.softcap,
            self.logit_scale,
        )  # fmt: skip
