"""Group relative policy optimisation and its relatives, on the log-probabilities of sampled tokens.

    r = exp(log p - log old) of a token, with importance_sampling_level="sequence" of its sequence's mean; A: advantage
    grpo, bnpo, dr_grpo, dapo, luspo    -min(min(r, delta) A, clip(r, 1 - low, 1 + high) A)
    cispo    -min(r, high) A log p, the ratio without a gradient
    sapo     -4 / t * s(t (r - 1)) A,  t: sapo_temperature of the sign of A
    vespo    -phi A log p,  phi = exp(l + k log w - l w) without a gradient, w = product of the sequence's ratios
    each token's loss times vllm_is_ratio (in vespo: w's factor), plus beta (exp(q) - q - 1), q = log ref - log p, which
    use_bias_correction_kl multiplies by r
    weights of the tokens    grpo, sapo: 1 / (B length of the sequence)    bnpo: 1 / tokens    luspo: 1 / B
                             dr_grpo: 1 / (B max_completion_length)    dapo, cispo, vespo: 1 / num_items_in_batch

Shao et al. 2024, arXiv:2402.03300; Dr. GRPO, Liu et al. 2025, arXiv:2503.20783; DAPO, Yu et al. 2025, arXiv:2503.14476;
CISPO, MiniMax 2025, arXiv:2506.13585; GSPO, Zheng et al. 2025, arXiv:2507.18071; SAPO, Gao et al. 2025,
arXiv:2511.20347; LUSPO and VESPO as in TRL.
"""

from __future__ import annotations

import math

import torch

from liger_kernel.chunked_loss.function import Call
from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

CLIPPED = ("bnpo", "dapo", "dr_grpo", "grpo", "luspo")
LOSS_TYPES = (*CLIPPED, "cispo", "sapo", "vespo")


def k3_loss_fn(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """exp(log_p - log_q) - (log_p - log_q) - 1, an estimate of KL(q || p) at samples of q (Schulman's k3)."""
    gap = log_p - log_q
    return torch.expm1(gap) - gap


def sapo_loss_fn(importance_ratio: torch.Tensor, temperature) -> torch.Tensor:
    """4 / t * sigmoid(t (r - 1)): slope 1 at r = 1, saturating away from it."""
    return torch.sigmoid(temperature * (importance_ratio - 1)) * (4 / temperature)


def clip_coef_fn(coef, epsilon_low, epsilon_high, loss_type):
    """(clipped ratio, whether it was too low, whether it was too high)."""
    if loss_type == "cispo":
        return coef.clamp(max=epsilon_high).detach(), torch.zeros_like(coef, dtype=torch.bool), coef > epsilon_high
    return coef.clamp(1 - epsilon_low, 1 + epsilon_high), coef < 1 - epsilon_low, coef > 1 + epsilon_high


def get_gamma_weights(
    advantages, log_ratio_per_token, mask, importance_sampling_ratio=None, k_pos=2.0, lambda_pos=3.0, k_neg=3.0,
    lambda_neg=2.0,
):  # fmt: skip
    """phi (B, 1) of vespo, without a gradient. Its logarithms are kept in [log 1e-8, 20], a token's in [-20, 20]."""
    low, high = math.log(1e-8), 20.0
    log_w = (log_ratio_per_token.detach().clamp(-high, high) * mask).sum(-1, keepdim=True)
    if importance_sampling_ratio is not None:
        log_is = importance_sampling_ratio.log().clamp(low, high)
        log_w = log_w + (log_is if log_is.shape[-1] == 1 else log_is.where(mask != 0, 0.0)).sum(-1, keepdim=True)
    log_w = log_w.clamp(low, high)
    positive = (advantages[:, None] if advantages.dim() == 1 else advantages[:, :1]) >= 0
    k, rate = torch.where(positive, k_pos, k_neg), torch.where(positive, lambda_pos, lambda_neg)
    return (rate + k * log_w - rate * log_w.exp()).exp()


def check(loss_type, importance_sampling_level, max_completion_length, delta, epsilon_low, epsilon_high) -> None:
    """ValueError for what cannot be honoured, by name."""
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type must be one of {sorted(LOSS_TYPES)}, got {loss_type!r}")
    if importance_sampling_level not in ("sequence", "token"):
        raise ValueError(f"importance_sampling_level must be 'sequence' or 'token', got {importance_sampling_level!r}")
    if importance_sampling_level == "sequence" and loss_type not in CLIPPED:
        raise ValueError(f"importance_sampling_level='sequence' goes with loss_type {CLIPPED}, not with {loss_type!r}")
    if loss_type == "dr_grpo" and max_completion_length is None:
        raise ValueError("loss_type='dr_grpo' needs max_completion_length")
    if delta is not None and loss_type not in CLIPPED:
        raise ValueError(f"delta goes with loss_type {CLIPPED}, not with {loss_type!r}")
    for label, value in (("epsilon_low", epsilon_low), ("epsilon_high", epsilon_high)):
        if not value >= 0:
            raise ValueError(f"{label} must not be negative, got {value!r}")


def weigh(mask, full_mask, dtype, loss_type, max_completion_length=None, num_items_in_batch=None):
    """(n, T) by which the tokens' losses of n of B completions are multiplied; their sum is the batch's loss."""
    mask, n_sequences = (mask != 0).to(dtype), max(full_mask.shape[0], 1)
    if loss_type in ("grpo", "sapo"):
        return mask / mask.sum(-1, keepdim=True).clamp(min=1) / n_sequences
    if loss_type == "luspo":
        return mask / n_sequences
    if loss_type == "dr_grpo":
        return mask / (n_sequences * max_completion_length)
    if loss_type == "bnpo" or num_items_in_batch is None:
        return mask / (full_mask != 0).sum(dtype=dtype).clamp(min=1)
    items = torch.as_tensor(num_items_in_batch, device=mask.device).to(dtype)
    return mask * (world_size() / items.clamp(min=1))


def world_size() -> int:
    """Processes whose gradients are averaged; num_items_in_batch counts the tokens of them all."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def per_token(
    logps, live, advantages, ref=None, old=None, epsilon_low=0.2, epsilon_high=0.2, beta=0.04, loss_type="dapo",
    importance_sampling_level="token", sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, vllm_is_ratio=None,
    delta=None, use_bias_correction_kl=False, gamma=(2.0, 3.0, 3.0, 2.0), phi=None,
):  # fmt: skip
    """(losses (n, T), 0 where not live; kl (n, T), None without beta; what is clipped (n, T), or (n, 1) by sequence,
    None for a loss_type that does not clip). gamma: vespo's k and lambda of A >= 0, then of A < 0; phi: its weights.
    """
    dtype = logps.dtype
    a = advantages[:, None] if advantages.dim() == 1 else advantages
    old = logps.detach() if old is None else old.to(dtype)
    log_ratio = (logps - old).where(live, 0.0)
    if importance_sampling_level == "sequence":
        log_ratio = log_ratio.sum(-1, keepdim=True) / live.sum(-1, keepdim=True).clamp(min=1)
    ratio, counted = log_ratio.exp(), None
    if loss_type in CLIPPED or loss_type == "cispo":
        clipped, too_low, too_high = clip_coef_fn(ratio, epsilon_low, epsilon_high, loss_type)
        counted = too_low & (a < 0) | too_high & (a > 0)
    if loss_type == "cispo":
        each = -clipped * a * logps
    elif loss_type == "sapo":
        each = -sapo_loss_fn(ratio, torch.where(a > 0, sapo_temperature_pos, sapo_temperature_neg)) * a
    elif loss_type == "vespo":
        each = -(get_gamma_weights(a, log_ratio, live, vllm_is_ratio, *gamma) if phi is None else phi) * a * logps
    else:
        capped = ratio if delta is None else ratio.clamp(max=delta)
        each = -torch.minimum(capped * a, clipped * a)
    if vllm_is_ratio is not None and loss_type != "vespo":
        each = each * vllm_is_ratio
    kl = None
    if beta:
        kl = k3_loss_fn(ref.to(dtype), logps).where(live, 0.0)
        kl = kl * ratio if use_bias_correction_kl else kl
        each = each + beta * kl
    return each.where(live, 0.0), kl, counted


def metrics_of(kl, clipped, live, importance_sampling_level):
    """([mean kl,] share of clipped tokens, or of sequences)."""
    tokens = live.sum().clamp(min=1)
    if clipped is None:
        share = torch.zeros((), device=live.device)
    elif importance_sampling_level == "sequence":
        share = clipped.float().sum() / max(clipped.numel(), 1)
    else:
        share = (clipped & live).sum() / tokens
    return (share,) if kl is None else (kl.sum() / tokens, share)


class LigerFusedLinearGRPOFunction(LigerFusedLinearPPOBase):
    """apply(_input, weight, selected_token_ids, attention_mask, advantages, ...) in the order of forward
    -> (loss, ([kl,] clip_ratio)).
    """

    @staticmethod
    def token_weights(
        full_attention_mask, dtype, loss_type="dapo", max_completion_length=None, importance_sampling_level="token",
        num_items_in_batch=None, **options,
    ):  # fmt: skip
        if importance_sampling_level == "sequence" or loss_type == "vespo":
            return None
        mask = full_attention_mask
        return weigh(mask, mask, dtype, loss_type, max_completion_length, num_items_in_batch)

    @staticmethod
    def ppo_loss_fn(
        per_token_logps, attention_mask, advantages, full_attention_mask, ref_per_token_logps=None,
        old_per_token_logps=None, epsilon_low=0.2, epsilon_high=0.2, beta=0.04, loss_type="dapo",
        max_completion_length=None, importance_sampling_level="token", sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05, vllm_is_ratio=None, delta=None, use_bias_correction_kl=False, vespo_k_pos=2.0,
        vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0, num_items_in_batch=None, token_weights=None,
    ):  # fmt: skip
        """-> (loss, ([kl,] clip_ratio)); token_weights (n, T): default those of the loss_type."""
        dtype, live = per_token_logps.dtype, attention_mask != 0
        each, kl, clipped = per_token(
            per_token_logps, live, advantages, ref_per_token_logps, old_per_token_logps, epsilon_low, epsilon_high,
            beta, loss_type, importance_sampling_level, sapo_temperature_pos, sapo_temperature_neg, vllm_is_ratio,
            delta, use_bias_correction_kl, (vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg),
        )  # fmt: skip
        if token_weights is None:
            token_weights = weigh(
                attention_mask, full_attention_mask, dtype, loss_type, max_completion_length, num_items_in_batch
            )
        return (each * token_weights).sum(), metrics_of(kl, clipped, live, importance_sampling_level)

    @classmethod
    def forward(
        cls, ctx, _input, weight, selected_token_ids, attention_mask, advantages, bias=None, ref_per_token_logps=None,
        old_per_token_logps=None, ref_input=None, ref_weight=None, ref_bias=None, beta=0.04, epsilon_low=0.2,
        epsilon_high=0.2, loss_type="dapo", max_completion_length=None, importance_sampling_level="token",
        sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, temperature=1.0, compiled=True, use_ref_model=True,
        chunk_size=1, vllm_is_ratio=None, delta=None, use_bias_correction_kl=False, vespo_k_pos=2.0,
        vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0, num_items_in_batch=None, softcap=None,
        logit_scale=1.0,
    ):  # fmt: skip
        check(loss_type, importance_sampling_level, max_completion_length, delta, epsilon_low, epsilon_high)
        return LigerFusedLinearPPOBase.forward(
            cls, ctx, _input, weight, selected_token_ids, attention_mask, advantages, bias, ref_per_token_logps,
            old_per_token_logps, ref_input, ref_weight, ref_bias, epsilon_low, epsilon_high, beta, loss_type,
            max_completion_length, importance_sampling_level, temperature, compiled, use_ref_model, chunk_size,
            sapo_temperature_pos, sapo_temperature_neg, vllm_is_ratio, delta, use_bias_correction_kl, vespo_k_pos,
            vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg, num_items_in_batch, softcap, logit_scale,
        )  # fmt: skip


call = Call(LigerFusedLinearGRPOFunction)


class LigerFusedLinearGRPOLoss(torch.nn.Module):
    """A policy-gradient loss over a head, logits never kept; the loss_types are in this file's docstring.

    beta: of the KL to a reference model, whose log-probabilities, or with use_ref_model whose hidden states and weight,
    are given at the call. temperature: that of the sampling; delta: upper bound of the ratio; epsilon_high: of cispo,
    its upper bound. softcap and logit_scale are those of both models' heads. compiled and chunk_size have no effect.
    Raises ValueError for an option out of range, or one that the loss_type does not know.
    """

    def __init__(
        self, beta: float = 0.04, compiled: bool = True, use_ref_model: bool = True, chunk_size: int = 1,
        epsilon_low: float = 0.2, epsilon_high: float = 0.2, loss_type: str = "dapo",
        max_completion_length: int | None = None, importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0, sapo_temperature_neg: float = 1.05, temperature: float = 1.0,
        delta: float | None = None, use_bias_correction_kl: bool = False, vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0, vespo_k_neg: float = 3.0, vespo_lambda_neg: float = 2.0, *,
        softcap: float | None = None, logit_scale: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        check(loss_type, importance_sampling_level, max_completion_length, delta, epsilon_low, epsilon_high)
        self.beta, self.compiled, self.use_ref_model, self.chunk_size = beta, compiled, use_ref_model, chunk_size
        self.epsilon_low, self.epsilon_high, self.loss_type = epsilon_low, epsilon_high, loss_type
        self.max_completion_length = max_completion_length
        self.importance_sampling_level = importance_sampling_level
        self.sapo_temperature_pos, self.sapo_temperature_neg = sapo_temperature_pos, sapo_temperature_neg
        self.temperature, self.delta, self.use_bias_correction_kl = temperature, delta, use_bias_correction_kl
        self.vespo_k_pos, self.vespo_lambda_pos = vespo_k_pos, vespo_lambda_pos
        self.vespo_k_neg, self.vespo_lambda_neg = vespo_k_neg, vespo_lambda_neg
        self.softcap, self.logit_scale = softcap, logit_scale

    def forward(
        self, _input, lin_weight, selected_token_ids, attention_mask, advantages, bias=None, ref_per_token_logps=None,
        old_per_token_logps=None, ref_input=None, ref_weight=None, ref_bias=None, vllm_is_ratio=None,
        num_items_in_batch=None,
    ):  # fmt: skip
        """_input: (B, T, H), of the positions that predict selected_token_ids (B, T); attention_mask: (B, T), 0 where a
        token counts for nothing; advantages: (B,) or (B, T); *_per_token_logps: (B, T), old: default those of now;
        vllm_is_ratio: (B, T) or (B, 1); num_items_in_batch: tokens of the batch over all processes and accumulation
        steps, a number or a 0-d tensor (default: the tokens at hand).

        -> (loss, metrics): where beta != 0 the mean KL, then the share of clipped tokens; only loss is differentiable.
        """
        return call(
            _input, lin_weight, selected_token_ids, attention_mask, advantages, bias, ref_per_token_logps,
            old_per_token_logps, ref_input, ref_weight, ref_bias, self.beta, self.epsilon_low, self.epsilon_high,
            self.loss_type, self.max_completion_length, self.importance_sampling_level, self.sapo_temperature_pos,
            self.sapo_temperature_neg, self.temperature, self.compiled, self.use_ref_model, self.chunk_size,
            vllm_is_ratio, self.delta, self.use_bias_correction_kl, self.vespo_k_pos, self.vespo_lambda_pos,
            self.vespo_k_neg, self.vespo_lambda_neg, num_items_in_batch, self.softcap, self.logit_scale,
        )  # fmt: skip
