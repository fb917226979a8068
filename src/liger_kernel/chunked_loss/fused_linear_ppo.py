"""Policy-gradient losses of completions, over a fused head."""

from __future__ import annotations

from liger_kernel.chunked_loss.function import IGNORE_INDEX, HeadLoss, batch_of, detached, log_probs_of, row_loss
from liger_kernel.ops.core import wide


class LigerFusedLinearPPOBase(HeadLoss):
    """A subclass gives the loss of completions by their tokens' log-probabilities in ppo_loss_fn."""

    PLACES = (0, 1, 5)

    @staticmethod
    def ppo_loss_fn(*args, **kwargs):
        """(per_token_logps (n, T), attention_mask (n, T), advantages (n,) or (n, T), full_attention_mask (B, T),
        **options) -> (loss, metrics): what these n completions of all B add to the loss of the batch.
        """
        raise NotImplementedError("ppo_loss_fn is what a subclass defines")

    @staticmethod
    def token_weights(full_attention_mask, dtype, **options):
        """(B, T) weights of the tokens' losses where these are independent of each other, else None.

        With weights, ppo_loss_fn is called with tokens as completions of length 1, and their token_weights (n, 1).
        """

    @staticmethod
    def forward(
        cls, ctx, _input, weight, selected_token_ids, attention_mask, advantages, bias=None, ref_per_token_logps=None,
        old_per_token_logps=None, ref_input=None, ref_weight=None, ref_bias=None, epsilon_low=0.2, epsilon_high=0.2,
        beta=0.04, loss_type="dapo", max_completion_length=None, importance_sampling_level="token", temperature=1.0,
        compiled=True, use_ref_model=False, chunk_size=1, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
        vllm_is_ratio=None, delta=None, use_bias_correction_kl=False, vespo_k_pos=2.0, vespo_lambda_pos=3.0,
        vespo_k_neg=3.0, vespo_lambda_neg=2.0, num_items_in_batch=None, softcap=None, logit_scale=1.0,
    ):  # fmt: skip
        """-> (loss, metrics). chunk_size and compiled have no effect."""
        name, loss = cls.__name__, row_loss(softcap=softcap, logit_scale=logit_scale, temperature=temperature)
        if attention_mask.shape != selected_token_ids.shape:
            raise ValueError(
                f"{name}: attention_mask of shape {tuple(attention_mask.shape)}, expected that of the tokens, "
                f"{tuple(selected_token_ids.shape)}"
            )
        target = selected_token_ids.masked_fill(attention_mask == 0, IGNORE_INDEX)
        batch = batch_of(_input, weight, bias, target, loss, 1, name)
        if beta and ref_per_token_logps is None:
            if not use_ref_model:
                raise ValueError(
                    f"{name}: beta={beta!r} needs ref_per_token_logps, or use_ref_model=True and ref_input"
                )
            ref_per_token_logps = log_probs_of(ref_input, ref_weight, ref_bias, target, loss, f"{name}, reference")
        options = dict(
            epsilon_low=epsilon_low, epsilon_high=epsilon_high, beta=beta, loss_type=loss_type,
            max_completion_length=max_completion_length, importance_sampling_level=importance_sampling_level,
            sapo_temperature_pos=sapo_temperature_pos, sapo_temperature_neg=sapo_temperature_neg, delta=delta,
            use_bias_correction_kl=use_bias_correction_kl, vespo_k_pos=vespo_k_pos, vespo_lambda_pos=vespo_lambda_pos,
            vespo_k_neg=vespo_k_neg, vespo_lambda_neg=vespo_lambda_neg, num_items_in_batch=num_items_in_batch,
        )  # fmt: skip
        per_token = dict(ref_per_token_logps=ref_per_token_logps, old_per_token_logps=old_per_token_logps,
                         advantages=advantages, vllm_is_ratio=vllm_is_ratio)  # fmt: skip
        sides = {k: None if v is None else v.detach() for k, v in per_token.items()} | {
            "attention_mask": attention_mask
        }
        weights = cls.token_weights(attention_mask, wide(_input.dtype), **options)
        if weights is not None:
            sides["token_weights"] = weights
            sides = {k: None if v is None else every_token(k, v, target, name) for k, v in sides.items()}
            hidden, rows = _input.reshape(-1, 1, _input.shape[-1]), target.reshape(-1, 1)
            batch = batch_of(hidden, weight, bias, rows, loss, 1, name)

        def objective(log_prob, **sides):
            return cls.ppo_loss_fn(
                per_token_logps=log_prob[:, 0], full_attention_mask=attention_mask, **sides, **options
            )

        # Of tokens that are independent all gradients could be formed at once, in three quarters of the time; on a GPU
        # the fp32 sum of V x H that this takes would be most of the memory.
        late = weights is not None and _input.device.type != "cpu"
        outcome = cls.solve(ctx, batch, objective, sides, late)
        ctx.shape = _input.shape
        return outcome.loss, detached(tuple(outcome.aux))

    @staticmethod
    def backward(ctx, *d_outputs):
        d_hidden, *rest = HeadLoss.backward(ctx, *d_outputs)
        return None if d_hidden is None else d_hidden.view(ctx.shape), *rest


def every_token(label, value, target, name):
    """value (B,), (B, 1) or (B, T) as (B T, 1): one of each token."""
    value = value[:, None] if value.dim() == 1 else value
    if value.shape[0] != target.shape[0] or value.shape[1] not in (1, target.shape[1]):
        raise ValueError(f"{name}: {label} of shape {tuple(value.shape)} does not go with tokens {tuple(target.shape)}")
    return value.expand(target.shape).reshape(-1, 1)
