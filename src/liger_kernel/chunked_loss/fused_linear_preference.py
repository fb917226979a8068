"""Losses of pairs: sequences that were chosen against sequences that were rejected, over a fused head."""

from __future__ import annotations

import torch

from liger_kernel.chunked_loss.function import IGNORE_INDEX, HeadLoss, batch_of, detached, log_probs_of, row_loss
from liger_kernel.ops.live_rows import counts_for_free


class LigerFusedLinearPreferenceBase(HeadLoss):
    """A subclass gives the loss of pairs by their sequences' log-probabilities in preference_loss_fn.

    The batch is [chosen; rejected]: sequence i of the first half belongs to sequence i of the second.
    """

    @staticmethod
    def preference_loss_fn(*args, **kwargs):
        """(chosen_logps (n,), rejected_logps (n,), full_target (2 N, L), beta=, **loss_kwargs) -> loss or (loss, *aux).

        The loss is what these n of all N pairs add to that of the batch. With a reference model it gets
        ref_chosen_logps and ref_rejected_logps too.
        """
        raise NotImplementedError("preference_loss_fn is what a subclass defines")

    @staticmethod
    def forward(
        cls, ctx, _input, weight, target, bias=None, chunk_size=1, ignore_index=IGNORE_INDEX, alpha=1.0, beta=0.1,
        compute_nll_loss=True, nll_target=None, compiled=True, use_ref_model=False, ref_input=None, ref_weight=None,
        ref_bias=None, average_log_prob=True, ref_chosen_logps=None, ref_rejected_logps=None, softcap=None,
        logit_scale=1.0, couples_batch=False, **loss_kwargs,
    ):  # fmt: skip
        """-> (loss, (chosen_logps, rejected_logps, chosen_logits_mean, rejected_logits_mean, nll_loss, *aux)).

        couples_batch: preference_loss_fn needs all pairs at once. chunk_size and compiled have no effect.
        """
        name, loss = cls.__name__, row_loss(ignore_index, softcap, logit_scale)
        live = target != ignore_index
        nll_live, rows = live.chunk(2)[0] if live.shape[0] else live, target
        if nll_target is not None:
            nll_live, rows = with_nll_target(target, nll_target, ignore_index, name)
        batch = batch_of(_input, weight, bias, rows, loss, 2, name)
        sides = {"live": batch.units(live), "nll_live": nll_live, "ref": None}
        if ref_chosen_logps is not None or ref_rejected_logps is not None:
            sides["ref"] = given_reference(ref_chosen_logps, ref_rejected_logps, target, use_ref_model, name)
        elif use_ref_model:
            ref = log_probs_of(ref_input, ref_weight, ref_bias, target, loss, f"{name}, reference")
            sides["ref"] = of_sequences(batch.units(ref), sides["live"], average_log_prob)
        nll_count = nll_live.sum().clamp(min=1)

        def objective(log_prob, live, nll_live, ref):
            chosen, rejected = of_sequences(log_prob, live, average_log_prob).unbind(1)
            given = {} if ref is None else {"ref_chosen_logps": ref[:, 0], "ref_rejected_logps": ref[:, 1]}
            value = cls.preference_loss_fn(chosen, rejected, target, **given, beta=beta, **loss_kwargs)
            total, *aux = value if isinstance(value, tuple) else (value,)
            nll = total.new_zeros(())
            if compute_nll_loss:
                nll = -(log_prob[:, 0] * nll_live).sum() / nll_count
                total = total + alpha * nll
            return total, (chosen, rejected, nll, tuple(aux))

        outcome = cls.solve(ctx, batch, objective, sides, couples_batch, fields=("mean",))
        chosen, rejected, nll, aux = detached(outcome.aux)
        means = (outcome.mean * sides["live"]).sum((0, 2)) / sides["live"].sum((0, 2)).clamp(min=1)
        return outcome.loss, (chosen, rejected, means[0], means[1], nll, *aux)


def of_sequences(log_prob: torch.Tensor, live: torch.Tensor, average: bool) -> torch.Tensor:
    """Log-probabilities (..., L) of tokens to those of sequences (...): sums or, over the live tokens, averages."""
    total = (log_prob * live).sum(-1)
    return total / live.sum(-1).clamp(min=1) if average else total


def with_nll_target(target, nll_target, ignore_index, name):
    """(what counts for the NLL of the chosen (N, L), the label of every row that counts for anything (2 N, L))."""
    n_pairs = target.shape[0] // 2
    if nll_target.shape[0] not in (n_pairs, 2 * n_pairs) or nll_target.shape[1:] != target.shape[1:]:
        raise ValueError(f"{name}: nll_target of shape {tuple(nll_target.shape)}, expected {tuple(target.shape)}")
    nll_target, chosen = nll_target[:n_pairs], target[:n_pairs]
    live = nll_target != ignore_index
    clash = live & (chosen != ignore_index) & (chosen != nll_target)
    if counts_for_free(clash) and clash.any():
        raise ValueError(f"{name}: nll_target and target name different labels for the same token")
    out_of_range = torch.iinfo(torch.int32).max  # on a device that may not be waited for: NaN, not a plausible number
    merged = chosen.where(~live, nll_target).masked_fill(clash, out_of_range)
    return live, torch.cat((merged, target[n_pairs:]))


def given_reference(chosen, rejected, target, use_ref_model, name):
    """(N, 2) from the two (N,) log-probabilities of sequences."""
    if not use_ref_model:
        raise ValueError(f"{name}: ref_chosen_logps and ref_rejected_logps were given, but use_ref_model is False")
    shape = (target.shape[0] // 2,)
    for label, value in (("ref_chosen_logps", chosen), ("ref_rejected_logps", rejected)):
        if value is None or value.shape != shape:
            raise ValueError(
                f"{name}: {label} must have shape {shape}, got {None if value is None else tuple(value.shape)}"
            )
    return torch.stack((chosen, rejected), dim=1).detach()
