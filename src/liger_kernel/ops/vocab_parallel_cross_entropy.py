"""Cross entropy of logits whose vocabulary is split among the ranks of a group; see liger_kernel.ops.vocab_parallel.

    loss = (1 - s) * nll + s * (lse - mean_j z_j)         s = eps, or eps * K / (K - 1)
    dz_j = f * (p_j - (1 - s) * [j = y] - s / K)          j of this rank's part

label_smoothing_formula  "pytorch": s = eps (Szegedy et al. 2016, arXiv:1512.00567); "megatron": s = eps K / (K - 1),
                         which leaves 1 - eps to the label.
label_smoothing_mode     "global": K classes and their mean are those of all parts; "partition": those of this rank's,
                         as Megatron-Core computes it, so that the ranks' losses differ.
"""

from __future__ import annotations

import torch

from liger_kernel.ops.core import wide
from liger_kernel.ops.row_loss import Given, RowLoss, compute, inverse, rows_of
from liger_kernel.ops.vocab_parallel import combine, find_part, gather, of_part, upstream

NAME = "vocab_parallel_cross_entropy"
FORMULAS, MODES = ("megatron", "pytorch"), ("global", "partition")


def validate_formula_and_mode(label_smoothing_formula: str, label_smoothing_mode: str) -> None:
    """ValueError for a value that is not one of FORMULAS and MODES."""
    for name, value, known in (
        ("label_smoothing_formula", label_smoothing_formula, FORMULAS),
        ("label_smoothing_mode", label_smoothing_mode, MODES),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {list(known)}, got {value!r}")


class LigerVocabParallelCEFunction(torch.autograd.Function):
    """apply(vocab_parallel_logits (..., V of this rank), target (...), tp_group, ignore_index, label_smoothing,
    label_smoothing_formula, label_smoothing_mode) -> loss like target, fp32 (fp64 for fp64 logits).

    tp_group: None is all ranks of the job. Keeps the logits; the backward reads them again.
    """

    @staticmethod
    def forward(
        ctx, vocab_parallel_logits, target, tp_group, ignore_index, label_smoothing, label_smoothing_formula,
        label_smoothing_mode,
    ):  # fmt: skip
        validate_formula_and_mode(label_smoothing_formula, label_smoothing_mode)
        if target.shape != vocab_parallel_logits.shape[:-1]:
            shape = tuple(vocab_parallel_logits.shape[:-1])
            raise ValueError(f"{NAME}: target of shape {tuple(target.shape)}, expected {shape}")
        RowLoss(label_smoothing=label_smoothing)  # checks its range
        loss = RowLoss(ignore_index)
        labels, n_here = target.reshape(-1), vocab_parallel_logits.shape[-1]
        x = rows_of(vocab_parallel_logits.reshape(len(labels), n_here))
        if labels.device != x.device or labels.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{NAME}: target must be int64 or int32 on {x.device}, got {labels.dtype} on {labels.device}"
            )
        part, loss = find_part(labels, n_here, loss, tp_group, NAME), of_part(loss)
        fields = ("lse", "mean") if label_smoothing else ("lse",)
        nll, lse, mean = _of_part(x, part, loss, fields)
        whole = combine(part, nll, lse, torch.zeros_like(lse), tp_group)
        value, smoothing, n_smoothed = whole.nll, None, None
        if label_smoothing:
            n_smoothed = torch.full_like(part.n_classes, n_here)
            total = mean * n_here
            if label_smoothing_mode == "global":
                n_smoothed, total = part.n_classes, gather(total, tp_group).sum(0)
            n_smoothed = n_smoothed.to(total.dtype)
            smoothing = torch.full_like(n_smoothed, label_smoothing)
            if label_smoothing_formula == "megatron":
                smoothing = label_smoothing * n_smoothed / (n_smoothed - 1).clamp(min=1)
            even = (whole.lse - total * inverse(n_smoothed)).where(part.live, 0.0)
            value = (1 - smoothing) * value + smoothing * even
        ctx.shape, ctx.constants = vocab_parallel_logits.shape, (part, whole, loss, smoothing, n_smoothed)
        ctx.save_for_backward(x)
        return value.view(target.shape)

    @staticmethod
    def backward(ctx, d_loss):
        (x,) = ctx.saved_tensors
        part, whole, loss, smoothing, n_smoothed = ctx.constants
        d_loss = d_loss.reshape(-1).to(wide(x.dtype)).where(part.live, 0.0)
        if smoothing is None:
            given = upstream(part, whole, d_loss)
        else:
            given = upstream(part, whole, (1 - smoothing) * d_loss, smoothing * d_loss)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        compute(x, given, loss, (), dx)
        if smoothing is not None:
            dx.sub_((d_loss * smoothing * inverse(n_smoothed))[:, None])
        return dx.view(ctx.shape), *[None] * 6


def _of_part(x, part, loss, fields):
    if x.shape[1] == 0:
        return [torch.zeros(x.shape[0], dtype=wide(x.dtype), device=x.device)] * 3
    stats = compute(x, Given(part.target), loss, fields)
    return stats.loss, stats.lse, stats.mean
