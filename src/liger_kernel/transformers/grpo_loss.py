"""Policy-gradient losses of whole logits, on liger_kernel.ops.grpo_loss."""

from __future__ import annotations

import torch

from liger_kernel.ops.grpo_loss import GrpoLossFunction


def triton_grpo_loss(
    logits: torch.Tensor,
    old_logp: torch.Tensor | None,
    ref_logp: torch.Tensor | None,
    completion_ids: torch.Tensor,
    advantages: torch.Tensor,
    completion_mask: torch.Tensor | None = None,
    temperature: float = 0.9,
    beta: float = 0.04,
    eps_low: float = 0.2,
    eps_high: float = 0.4,
    inplace: bool = True,
    loss_type: str = "dapo",
    max_completion_length: int | None = None,
    importance_sampling_level: str = "token",
    reduce: bool = False,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vllm_is_ratio: torch.Tensor | None = None,
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
    num_items_in_batch: float | torch.Tensor | None = None,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
):
    """The losses of liger_kernel.chunked_loss.grpo_loss of logits (B, L + 1, V), whose last position is left out.

    old_logp, ref_logp, completion_ids and completion_mask: (B, L); advantages: (B,) or (B, L). With inplace, the
    default, the gradient is written over the logits. -> (losses, kl or None, clipped), each (B, L), or with reduce
    (loss, metrics): where beta != 0 the mean KL, then the share of clipped tokens.
    Raises ValueError for shapes or options that do not fit.
    """
    gamma = vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg
    first, kl, clipped = GrpoLossFunction.apply(
        logits, old_logp, ref_logp, completion_ids, advantages, completion_mask, temperature, beta, eps_low, eps_high,
        inplace, loss_type, max_completion_length, reduce, importance_sampling_level, sapo_temperature_pos,
        sapo_temperature_neg, vllm_is_ratio, delta, use_bias_correction_kl, num_items_in_batch, None, gamma,
    )  # fmt: skip
    return (first, [*([] if kl is None else [kl]), clipped]) if reduce else (first, kl, clipped)
