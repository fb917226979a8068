"""Direct preference optimisation and its relatives.

a = log p(chosen) - log ref(chosen);  b the same of the rejected;  d = a - b;  e: label_smoothing
sigmoid    -(1 - e) log s(beta d) - e log s(-beta d)                           Rafailov et al. 2023, arXiv:2305.18290
hinge      max(0, 1 - beta d)                                                  Zhao et al. 2023, arXiv:2305.10425
ipo        (d - 1 / (2 beta))^2, of average log-probabilities                  Azar et al. 2023, arXiv:2310.12036
exo_pair   KL(s(beta d), s(-beta d) || 1 - e, e)                               Ji et al. 2024, arXiv:2402.00856
nca_pair   -log s(beta a) - (log s(-beta a) + log s(-beta b)) / 2              Chen et al. 2024, arXiv:2402.05369
robust     (-(1 - e) log s(beta d) + e log s(-beta d)) / (1 - 2 e)             Chowdhury et al. 2024, arXiv:2403.00409
bco_pair   -log s(beta a - m) - log s(m - beta b), m = mean(beta a, beta b)    Jung et al. 2024, arXiv:2404.04656
sppo_hard  (a - 1 / (2 beta))^2 + (b + 1 / (2 beta))^2                         Wu et al. 2024, arXiv:2405.00675
apo_zero   1 - s(beta a) + s(beta b)                                           D'Oosterlinck et al. 2024,
apo_down   s(beta a) + 1 - s(beta d)                                             arXiv:2408.06266
discopop   -(1 - g) log s(beta d) + g exp(-beta d), g = s(beta d / tau)        Lu et al. 2024, arXiv:2406.08414
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import logsigmoid

from liger_kernel.chunked_loss.cpo_loss import smoothed
from liger_kernel.chunked_loss.function import IGNORE_INDEX, Call
from liger_kernel.chunked_loss.fused_linear_preference import LigerFusedLinearPreferenceBase


def _discopop(d, tau):
    mix = torch.sigmoid(d / tau)
    return -(1 - mix) * logsigmoid(d) + mix * torch.exp(-d)


def _bco_pair(a, b):
    mean = torch.cat((a, b)).detach().mean() if a.numel() else 0.0
    return -logsigmoid(a - mean) - logsigmoid(mean - b)


# By the rewards a and b (times beta), their difference, label_smoothing, beta and discopop_tau.
LOSSES = {
    "sigmoid": lambda a, b, d, e, beta, tau: smoothed(d, e),
    "hinge": lambda a, b, d, e, beta, tau: torch.relu(1 - d),
    "ipo": lambda a, b, d, e, beta, tau: ((d - 0.5) / beta).square(),
    "exo_pair": lambda a, b, d, e, beta, tau: (
        torch.sigmoid(d) * (logsigmoid(d) - math.log1p(-e)) + torch.sigmoid(-d) * (logsigmoid(-d) - math.log(e))
    ),
    "nca_pair": lambda a, b, d, e, beta, tau: -logsigmoid(a) - (logsigmoid(-a) + logsigmoid(-b)) / 2,
    "robust": lambda a, b, d, e, beta, tau: (-(1 - e) * logsigmoid(d) + e * logsigmoid(-d)) / (1 - 2 * e),
    "bco_pair": lambda a, b, d, e, beta, tau: _bco_pair(a, b),
    "sppo_hard": lambda a, b, d, e, beta, tau: ((a - 0.5) / beta).square() + ((b + 0.5) / beta).square(),
    "apo_zero": lambda a, b, d, e, beta, tau: torch.sigmoid(-a) + torch.sigmoid(b),
    "apo_down": lambda a, b, d, e, beta, tau: torch.sigmoid(a) + torch.sigmoid(-d),
    "discopop": lambda a, b, d, e, beta, tau: _discopop(d, tau),
}
_SMOOTHED = ("exo_pair", "robust", "sigmoid")


def check(loss_type, beta, label_smoothing, discopop_tau) -> None:
    """ValueError for what cannot be honoured, by name."""
    if loss_type not in LOSSES:
        raise ValueError(f"loss_type must be one of {sorted(LOSSES)}, got {loss_type!r}")
    if loss_type in ("ipo", "sppo_hard") and not beta > 0:
        raise ValueError(f"loss_type={loss_type!r} divides by beta, which must be positive, got {beta!r}")
    if label_smoothing and loss_type not in _SMOOTHED:
        raise ValueError(f"label_smoothing goes with loss_type {sorted(_SMOOTHED)}, not with {loss_type!r}")
    if loss_type == "exo_pair" and not 0 < label_smoothing < 1:
        raise ValueError(f"loss_type='exo_pair' needs label_smoothing in (0, 1), such as 1e-3, got {label_smoothing!r}")
    if not 0 <= label_smoothing <= 1 or loss_type == "robust" and label_smoothing >= 0.5:
        raise ValueError(
            f"label_smoothing must be in [0, 1], in [0, 0.5) for loss_type='robust', got {label_smoothing!r}"
        )
    if not discopop_tau > 0:
        raise ValueError(f"discopop_tau must be positive, got {discopop_tau!r}")


class LigerFusedLinearDPOFunction(LigerFusedLinearPreferenceBase):
    """apply(_input, weight, target, ...) in the order of forward -> (loss, (chosen_logps, rejected_logps,
    chosen_logits_mean, rejected_logits_mean, nll_loss, chosen_rewards, rejected_rewards)).
    """

    @staticmethod
    def preference_loss_fn(
        chosen_logps, rejected_logps, full_target, ref_chosen_logps=None, ref_rejected_logps=None, beta=0.1,
        loss_type="sigmoid", label_smoothing=0.0, discopop_tau=0.05,
    ):  # fmt: skip
        """-> (loss, chosen_rewards, rejected_rewards)."""
        a = beta * (chosen_logps if ref_chosen_logps is None else chosen_logps - ref_chosen_logps)
        b = beta * (rejected_logps if ref_rejected_logps is None else rejected_logps - ref_rejected_logps)
        each = LOSSES[loss_type](a, b, a - b, label_smoothing, beta, discopop_tau)
        return each.sum() / max(full_target.shape[0] // 2, 1), a.detach(), b.detach()

    @classmethod
    def forward(
        cls, ctx, _input, weight, target, bias=None, ref_input=None, ref_weight=None, ref_bias=None,
        ignore_index=IGNORE_INDEX, beta=0.1, compute_nll_loss=False, compiled=True, use_ref_model=True,
        average_log_prob=False, chunk_size=1, loss_type="sigmoid", label_smoothing=0.0, discopop_tau=0.05, alpha=1.0,
        ref_chosen_logps=None, ref_rejected_logps=None, softcap=None, logit_scale=1.0,
    ):  # fmt: skip
        check(loss_type, beta, label_smoothing, discopop_tau)
        return LigerFusedLinearPreferenceBase.forward(
            cls, ctx, _input, weight, target, bias, ignore_index=ignore_index, alpha=alpha, beta=beta,
            compute_nll_loss=compute_nll_loss, use_ref_model=use_ref_model, ref_input=ref_input, ref_weight=ref_weight,
            ref_bias=ref_bias, average_log_prob=average_log_prob or loss_type == "ipo",
            ref_chosen_logps=ref_chosen_logps, ref_rejected_logps=ref_rejected_logps, softcap=softcap,
            logit_scale=logit_scale, couples_batch=loss_type == "bco_pair", loss_type=loss_type,
            label_smoothing=label_smoothing, discopop_tau=discopop_tau,
        )  # fmt: skip


call = Call(LigerFusedLinearDPOFunction)


class LigerFusedLinearDPOLoss(torch.nn.Module):
    """Direct preference optimisation over a head, logits never kept; the loss_types are in this file's docstring.

    use_ref_model: compare with a reference model, given at the call. average_log_prob: of a sequence's tokens, not
    their sum; loss_type="ipo" always averages. compute_nll_loss adds alpha times the NLL of the chosen tokens. softcap
    and logit_scale are those of both models' heads. compiled and chunk_size have no effect.
    Raises ValueError for an option out of range, or one that the loss_type does not know.
    """

    def __init__(
        self, ignore_index: int = IGNORE_INDEX, beta: float = 0.1, alpha: float = 1.0, compute_nll_loss: bool = False,
        compiled: bool = True, use_ref_model: bool = True, average_log_prob: bool = False, chunk_size: int = 1,
        loss_type: str = "sigmoid", label_smoothing: float = 0.0, discopop_tau: float = 0.05, *,
        softcap: float | None = None, logit_scale: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        check(loss_type, beta, label_smoothing, discopop_tau)
        self.ignore_index, self.beta, self.alpha, self.compute_nll_loss = ignore_index, beta, alpha, compute_nll_loss
        self.compiled, self.chunk_size = compiled, chunk_size
        self.use_ref_model, self.average_log_prob, self.loss_type = use_ref_model, average_log_prob, loss_type
        self.label_smoothing, self.discopop_tau = label_smoothing, discopop_tau
        self.softcap, self.logit_scale = softcap, logit_scale

    def forward(
        self, lin_weight, _input, target, bias=None, ref_input=None, ref_weight=None, ref_bias=None,
        ref_chosen_logps=None, ref_rejected_logps=None,
    ):  # fmt: skip
        """_input: (2 N, L, H), chosen then rejected; target: (2 N, L), already shifted; ref_chosen_logps,
        ref_rejected_logps: (N,), in place of a reference model.

        -> (loss, (chosen_logps (N,), rejected_logps, chosen_logits_mean, rejected_logits_mean, nll_loss,
        chosen_rewards (N,), rejected_rewards)); the logits' means are over live tokens; only loss is differentiable.
        """
        return call(
            _input, lin_weight, target, bias, ref_input, ref_weight, ref_bias, self.ignore_index, self.beta,
            self.compute_nll_loss, self.compiled, self.use_ref_model, self.average_log_prob, self.chunk_size,
            self.loss_type, self.label_smoothing, self.discopop_tau, self.alpha, ref_chosen_logps, ref_rejected_logps,
            self.softcap, self.logit_scale,
        )  # fmt: skip
