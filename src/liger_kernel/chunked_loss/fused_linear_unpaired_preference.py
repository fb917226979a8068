"""Losses of sequences that are desirable or not, each by itself, over a fused head."""

from __future__ import annotations

import torch

from liger_kernel.chunked_loss.function import IGNORE_INDEX, HeadLoss, batch_of, detached, log_probs_of, row_loss
from liger_kernel.chunked_loss.fused_linear_preference import of_sequences


class LigerFusedLinearUnpairedPreferenceBase(HeadLoss):
    """A subclass gives the loss of sequences by their log-probabilities in preference_loss_fn."""

    PLACES = (0, 1, 4)

    @staticmethod
    def preference_loss_fn(*args, **kwargs):
        """(log_prob_chunk (n,), preference_labels_chunk (n,) bool, full_target (N, L), **loss_kwargs) -> loss or
        (loss, *aux).

        The loss is what these n of all N sequences add to that of the batch. With a reference model it gets
        ref_log_prob_chunk too.
        """
        raise NotImplementedError("preference_loss_fn is what a subclass defines")

    @staticmethod
    def forward(
        cls, ctx, _input, weight, target, preference_labels, bias=None, chunk_size=1, ignore_index=IGNORE_INDEX,
        compiled=True, use_ref_model=False, ref_input=None, ref_weight=None, ref_bias=None, average_log_prob=False,
        softcap=None, logit_scale=1.0, **loss_kwargs,
    ):  # fmt: skip
        """-> (loss, (chosen_logps_sum, rejected_logps_sum, chosen_logits_sum, rejected_logits_sum, *aux)).

        chunk_size and compiled have no effect.
        """
        name, loss = cls.__name__, row_loss(ignore_index, softcap, logit_scale)
        batch = batch_of(_input, weight, bias, target, loss, 1, name)
        live, desired = target != ignore_index, labels_of(preference_labels, target, name)
        sides = {"live": live, "desired": desired, "ref": None}
        if use_ref_model:
            ref = log_probs_of(ref_input, ref_weight, ref_bias, target, loss, f"{name}, reference")
            sides["ref"] = of_sequences(ref, live, average_log_prob)

        def objective(log_prob, live, desired, ref):
            logps = of_sequences(log_prob[:, 0], live, average_log_prob)
            given = {} if ref is None else {"ref_log_prob_chunk": ref}
            value = cls.preference_loss_fn(logps, desired, target, **given, **loss_kwargs)
            total, *aux = value if isinstance(value, tuple) else (value,)
            return total, (logps, tuple(aux))

        outcome = cls.solve(ctx, batch, objective, sides, fields=("mean",))
        logps, aux = detached(outcome.aux)
        logits = outcome.mean[:, 0].sum(-1) * weight.shape[0]
        sums = (value.where(chosen, 0.0).sum() for value in (logps, logits) for chosen in (desired, ~desired))
        return outcome.loss, (*sums, *aux)


def labels_of(preference_labels, target, name) -> torch.Tensor:
    """(N,) bool from a tensor or a list of anything true or false."""
    if preference_labels is None:
        raise ValueError(f"{name}: preference_labels are needed, one per sequence")
    labels = torch.as_tensor(preference_labels, device=target.device).bool()
    if labels.shape != target.shape[:1]:
        raise ValueError(f"{name}: preference_labels of shape {tuple(labels.shape)}, expected ({target.shape[0]},)")
    return labels
