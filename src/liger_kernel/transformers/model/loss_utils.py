"""The loss of a fused LM head, under the names that other projects replace.

Each function looks the next one up when it is called, `LigerForCausalLMLoss` -> `fixed_fused_linear_cross_entropy` ->
`functional.liger_fused_linear_cross_entropy`, so a replacement of any of them takes effect.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from liger_kernel.backends import while_tracing
from liger_kernel.ops import row_loss
from liger_kernel.transformers import functional
from liger_kernel.transformers.head_weight import merged


def unpack_cross_entropy_result(result) -> tuple:
    """(loss, z_loss, token_accuracy, predicted_tokens) of a CrossEntropyOutput, a tuple or a bare loss."""
    if isinstance(result, tuple):
        return (*result, None, None, None)[:4]
    if isinstance(result, torch.Tensor):
        return result, None, None, None
    return result.loss, result.z_loss, result.token_accuracy, result.predicted_tokens


def unpack(result) -> tuple:
    """unpack_cross_entropy_result, and the entropy."""
    return *unpack_cross_entropy_result(result), getattr(result, "entropy", None)


def fixed_fused_linear_cross_entropy(
    hidden_states: torch.Tensor,
    lm_head_weight: torch.Tensor,
    target: torch.Tensor,
    num_items_in_batch: int | torch.Tensor | None = None,
    ignore_index: int = -100,
    final_logit_softcapping: float | None = None,
    accum_dtype: torch.dtype | None = None,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    **kwargs,
):
    """Cross entropy of hidden_states (T, H) @ lm_head_weight (V, H)^T against target (T,), without the logits.

    The mean over the tokens that are not ignored or, with num_items_in_batch, their sum divided by it. Returns the
    loss, or a CrossEntropyOutput where a return_* is set. Further keywords go to `liger_fused_linear_cross_entropy`.
    """
    divides = num_items_in_batch is not None and "normalizer" in _loss_options(
        functional.liger_fused_linear_cross_entropy
    )
    if divides:
        kwargs["normalizer"] = num_items_in_batch
    result = functional.liger_fused_linear_cross_entropy(
        hidden_states,
        lm_head_weight,
        target,
        reduction="mean" if num_items_in_batch is None else "sum",
        ignore_index=ignore_index,
        softcap=final_logit_softcapping,
        accum_dtype=accum_dtype,
        return_token_accuracy=return_token_accuracy,
        return_predicted_tokens=return_predicted_tokens,
        **kwargs,
    )
    loss, _, token_accuracy, predicted_tokens, entropy = unpack(result)
    if num_items_in_batch is not None and not divides:
        if isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        loss = loss / num_items_in_batch
    if not return_token_accuracy and not return_predicted_tokens and entropy is None:
        return loss
    return functional.CrossEntropyOutput(
        loss=loss, token_accuracy=token_accuracy, predicted_tokens=predicted_tokens, entropy=entropy
    )


def results_of_logits(logits, labels, ignore_index: int = -100, shift_labels=None) -> tuple:
    """(token_accuracy, predicted_tokens, entropy) of logits (..., V), as the fused loss gives them."""
    target = _shifted(labels, shift_labels, ignore_index).reshape(-1).to(logits.device)
    rows = row_loss.rows_of(logits.reshape(-1, logits.shape[-1]))
    loss = row_loss.RowLoss(ignore_index)
    given = row_loss.prepare(target, loss, rows, reduction="none")
    stats = row_loss.compute(rows, given, loss, ("entropy", "predicted"))
    return row_loss.token_accuracy(stats.predicted, target, ignore_index), stats.predicted, stats.entropy


def _shifted(labels, shift_labels, ignore_index):
    if shift_labels is not None:
        return shift_labels
    if labels is None:
        raise ValueError("a causal LM loss needs labels or shift_labels")
    return torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def LigerForCausalLMLoss(
    hidden_states: torch.Tensor,
    lm_head_weight: torch.Tensor,
    labels: torch.Tensor | None,
    hidden_size: int,
    num_items_in_batch: int | torch.Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    final_logit_softcapping: float | None = None,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    **kwargs,
):
    """Causal LM loss of hidden_states (..., H) and labels (...): the token at i predicts the label at i + 1.

    shift_labels, where given, are labels already shifted. Keywords that the fused op does not know are dropped, as
    transformers passes everything it was given. Returns what `fixed_fused_linear_cross_entropy` returns.
    """
    known = _loss_options(functional.liger_fused_linear_cross_entropy)
    kwargs = {name: value for name, value in kwargs.items() if name in known}
    shift_labels = _shifted(labels, shift_labels, ignore_index)
    return fixed_fused_linear_cross_entropy(
        hidden_states.reshape(-1, hidden_size),
        lm_head_weight,
        shift_labels.reshape(-1).to(hidden_states.device),
        num_items_in_batch,
        ignore_index,
        final_logit_softcapping,
        return_token_accuracy=return_token_accuracy,
        return_predicted_tokens=return_predicted_tokens,
        **kwargs,
    )


_CHAIN = LigerForCausalLMLoss, fixed_fused_linear_cross_entropy


def low_rank_options(hidden, weight, low_rank, causal: bool = False) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """(hidden, weight, keywords) for a loss: an adapter's share by keyword to ours, else within hidden and weight.

    causal: for `LigerForCausalLMLoss`. What others put in its place, or in the next one's, may drop a keyword.
    """
    if low_rank is None:
        return hidden, weight, {}
    ours = not causal or (LigerForCausalLMLoss, fixed_fused_linear_cross_entropy) == _CHAIN
    if not ours or "low_rank" not in _loss_options(functional.liger_fused_linear_cross_entropy):
        return *merged(hidden, weight, low_rank), {}
    u, low = low_rank
    return hidden, weight, {"low_rank": (u.reshape(-1, u.shape[-1]) if causal else u, low)}


_known: dict[Any, tuple[str, ...]] = {}


@while_tracing
def _loss_options(function) -> tuple[str, ...]:
    """Keywords that the fused op takes; those of our own op where a wrapper only says (*args, **kwargs)."""
    if function not in _known:
        parameters = dict(inspect.signature(function).parameters)
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            from liger_kernel.ops.fused_linear_cross_entropy import liger_fused_linear_cross_entropy as own

            parameters = {**inspect.signature(own).parameters, **parameters}
        # reduction and softcap have names of their own here; passing them on would give them twice
        own_names = {"input", "weight", "target", "reduction", "softcap"}
        _known[function] = tuple(name for name in parameters if name not in own_names)
    return _known[function]
