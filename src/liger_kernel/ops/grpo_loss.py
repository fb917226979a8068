"""Policy-gradient losses of whole logits: log-probabilities of sampled tokens, and liger_kernel.chunked_loss on them.

    log p = z_y - lse(z), z = logits / temperature;  dlogits = d_log_p * ([j = y] - p_j) / temperature

Shapes    logits: (B, L + 1, V), of which the last position predicts nothing; tokens: (B, L).
Numerics  fp32 (fp64 for fp64 logits), one cast at the store; log p is fp32, 0 where a mask says so.
Memory    keeps the logits, whose memory the gradient takes with inplace=True.
"""

from __future__ import annotations

import torch

from liger_kernel.ops.core import kernels, wide
from liger_kernel.ops.row_loss import Given, GradAware, RowLoss, check_target, empty_stats

IGNORE_INDEX = -100


class SelectiveLogSoftmaxFunction(GradAware):
    """apply(logits (R, V), target (R,), loss: RowLoss, inplace) -> log p (R,), 0 where the target is ignored."""

    @staticmethod
    def forward(ctx, logits, target, loss, inplace):
        stats = empty_stats(logits.shape[0], logits.device, wide(logits.dtype), ())
        if logits.numel():
            kernels("cross_entropy", logits).forward(logits, Given(target), loss, stats, None)
        ctx.save_for_backward(logits, target)
        ctx.loss, ctx.inplace, ctx.spent = loss, inplace, False
        return stats.loss.neg_()

    @staticmethod
    def backward(ctx, d_log_p):
        if ctx.spent:
            raise RuntimeError(
                "grpo_loss: a second backward, but the first wrote its gradient over the logits (inplace)"
            )
        logits, target = ctx.saved_tensors
        dx, ctx.spent = logits if ctx.inplace else torch.empty_like(logits), ctx.inplace
        if logits.numel():
            stats = empty_stats(logits.shape[0], logits.device, wide(logits.dtype), ())
            given = Given(target, factor=d_log_p.neg().contiguous())
            kernels("cross_entropy", logits).forward(logits, given, ctx.loss, stats, dx)
        return dx, None, None, None


def fused_selective_log_softmax(
    logits: torch.Tensor,
    input_ids: torch.Tensor,
    temperature: float = 0.9,
    mask: torch.Tensor | None = None,
    inplace: bool = False,
) -> torch.Tensor:
    """log_softmax(logits[:, :-1] / temperature) at the tokens input_ids, (B, L) fp32, differentiable.

    logits: (B, L + 1, V), any float dtype; input_ids: (B, L) integers; mask: (B, L), 0 where the result is 0 and no
    gradient flows. inplace: the backward may write its gradient over the logits. Raises ValueError for shapes that do
    not fit and, on a CPU or under LIGER_KERNEL_DEBUG=1, for a token outside [0, V).
    """
    if logits.dim() != 3 or input_ids.shape != (logits.shape[0], logits.shape[1] - 1):
        raise ValueError(
            f"grpo_loss: logits (B, L + 1, V) go with tokens (B, L), got {tuple(logits.shape)} and "
            f"{tuple(input_ids.shape)}"
        )
    target = torch.nn.functional.pad(input_ids.long(), (0, 1), value=IGNORE_INDEX)
    if mask is not None:
        if mask.shape != input_ids.shape:
            raise ValueError(f"grpo_loss: a mask of shape {tuple(mask.shape)} for tokens {tuple(input_ids.shape)}")
        target = target.masked_fill(torch.nn.functional.pad(mask == 0, (0, 1), value=True), IGNORE_INDEX)
    loss, rows = RowLoss(IGNORE_INDEX, temperature=temperature), logits.reshape(-1, logits.shape[-1])
    rows = rows if rows.stride(-1) == 1 or rows.shape[1] <= 1 else rows.contiguous()
    check_target(rows.shape[0], rows.shape[1], target.view(-1), logits.device, loss, "grpo_loss")
    log_p = SelectiveLogSoftmaxFunction.apply(rows, target.view(-1), loss, inplace)
    return log_p.view(target.shape)[:, :-1]


class GrpoLossFunction:
    """apply(logits, old_logp, ref_logp, completion_ids, advantages, completion_mask, temperature, beta, eps_low,
    eps_high, inplace, ...) -> (loss, mean kl or None, clip ratio); with reduce=False (losses, kl, clipped), all (B, L).
    """

    @staticmethod
    def apply(
        logits, old_logp, ref_logp, completion_ids, advantages, completion_mask, temperature, beta, eps_low, eps_high,
        inplace, loss_type="grpo", max_completion_length=None, reduce=True, importance_sampling_level="token",
        sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, vllm_is_ratio=None, delta=None,
        use_bias_correction_kl=False, num_items_in_batch=None, phi_seq=None, gamma=(2.0, 3.0, 3.0, 2.0),
    ):  # fmt: skip
        """phi_seq: (B, 1) weights of vespo in place of those that gamma gives. The first result is differentiable."""
        from liger_kernel.chunked_loss import grpo_loss as losses

        losses.check(loss_type, importance_sampling_level, max_completion_length, delta, eps_low, eps_high)
        if beta and ref_logp is None:
            raise ValueError(f"grpo_loss: beta={beta!r} needs ref_logp")
        mask = torch.ones_like(completion_ids) if completion_mask is None else completion_mask
        live = mask != 0
        log_p = fused_selective_log_softmax(logits, completion_ids, temperature, mask, inplace)
        each, kl, clipped = losses.per_token(
            log_p, live, advantages, ref_logp, old_logp, eps_low, eps_high, beta, loss_type, importance_sampling_level,
            sapo_temperature_pos, sapo_temperature_neg, vllm_is_ratio, delta, use_bias_correction_kl, gamma, phi_seq,
        )  # fmt: skip
        kl = None if kl is None else kl.detach()
        if not reduce:
            clipped = torch.zeros_like(live) if clipped is None else clipped & live
            return each, kl, clipped.to(each.dtype)
        weights = losses.weigh(mask, mask, each.dtype, loss_type, max_completion_length, num_items_in_batch)
        *kl_mean, share = losses.metrics_of(kl, clipped, live, importance_sampling_level)
        return (each * weights).sum(), kl_mean[0] if kl_mean else None, share
