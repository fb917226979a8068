"""Per-token outputs of a language model's head whose vocabulary is split among the ranks of a group.

Shapes    hidden: (..., H), the same on all ranks; weight: (V of this rank, H); bias: (V of this rank,); target: (...).
Numerics  see liger_kernel.ops.head and liger_kernel.ops.vocab_parallel.
Memory    keeps the inputs; the backward recomputes each chunk (8 T H V flops together, shared by the ranks). run keeps
          the gradients (6 T H V).
Traffic   three numbers per token and rank, once, in run once a chunk; the gradient of hidden, summed over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import distributed as dist

from liger_kernel.ops import head
from liger_kernel.ops.core import kernels, wide
from liger_kernel.ops.fused_linear_scaled_cross_entropy import LinearLogprobs
from liger_kernel.ops.row_loss import RECOMPUTED, Given, RowLoss
from liger_kernel.ops.vocab_parallel import combine, find_part, first_largest, of_part, size_and_rank, upstream

NAME = "vocab_parallel_head"


@torch.no_grad()
def run(
    hidden, weight, target, bias, loss: RowLoss, group, derive: Callable, needs, n_classes: int, with_entropy=False,
    with_predicted=False, workspace_bytes=None, accum_dtype=None,
):  # fmt: skip
    """(nll, lse, entropy, predicted), each (T,), and the gradients of (hidden, weight, bias) that needs asks for.

    derive: (nll, lse, their rows) -> the gradients of the loss for these two (None: zeros), so that none of it depends
    on other rows. n_classes: as of head.Split. The gradient of hidden is this rank's share of it.
    """
    dtype = head.product_dtype(hidden)
    part = find_part(target, weight.shape[0], loss, group, NAME)
    found = torch.zeros(3, len(target), dtype=wide(dtype), device=hidden.device)

    def settle(stats, rows):
        here = part.take(rows)
        whole = _whole(here, stats, group)
        found[:, rows] = torch.stack((whole.nll, whole.lse, whole.entropy))
        return upstream(here, whole, *derive(whole.nll, whole.lse, rows))

    w, b = _filled(weight, bias)
    fields = (*RECOMPUTED, *(f for f in _fields(with_entropy, with_predicted) if f not in RECOMPUTED))
    stats, d_hidden, d_weight, d_bias = head.run(
        hidden, w, b, Given(part.target), of_part(loss), fields, needs, dtype, accum_dtype, workspace_bytes,
        split=head.Split(n_classes, settle),
    )  # fmt: skip
    predicted = first_largest(part, stats, group) if with_predicted else None
    return (*found[:2], found[2] if with_entropy else None, predicted), (d_hidden, *_cut(weight, d_weight, d_bias))


class LigerVocabParallelLogprobsFunction(torch.autograd.Function):
    """apply(hidden (T, H), weight, target (T,), bias, loss: RowLoss, group, with_entropy, workspace_bytes,
    with_predicted=False, accum_dtype=None, sums=True) -> (nll, lse, entropy, predicted), each (T,).
    Without sums the gradient of hidden is this rank's share of it.
    """

    @staticmethod
    def forward(
        ctx, hidden, weight, target, bias, loss, group, with_entropy, workspace_bytes, with_predicted=False,
        accum_dtype=None, sums=True,
    ):  # fmt: skip
        dtype = head.product_dtype(hidden)
        part = find_part(target, weight.shape[0], loss, group, NAME)
        stats, *_ = kernels("fused_linear_cross_entropy", hidden).forward(
            hidden, *_filled(weight, bias), Given(part.target), of_part(loss),
            fields=_fields(with_entropy, with_predicted), dtype=dtype, workspace_bytes=workspace_bytes,
        )  # fmt: skip
        whole = _whole(part, stats, group)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.options = part, whole, loss, group, dtype, workspace_bytes, accum_dtype, sums
        ctx.set_materialize_grads(False)
        predicted = None
        if with_predicted:
            predicted = first_largest(part, stats, group)
            ctx.mark_non_differentiable(predicted)
        return whole.nll, whole.lse, whole.entropy if with_entropy else None, predicted

    @staticmethod
    def backward(ctx, d_nll, d_lse, d_entropy, _):
        hidden, weight, bias = ctx.saved_tensors
        part, whole, loss, group, dtype, workspace_bytes, accum_dtype, sums = ctx.options
        given = [None if d is None else d.where(part.live, 0.0) for d in (d_nll, d_lse, d_entropy)]
        given[0] = torch.zeros_like(whole.nll) if d_nll is None else given[0]
        needs = (*ctx.needs_input_grad[:2], ctx.needs_input_grad[3])
        _, d_hidden, d_weight, d_bias = kernels("fused_linear_cross_entropy", hidden).forward(
            hidden, *_filled(weight, bias), upstream(part, whole, *given), of_part(loss), needs=needs, dtype=dtype,
            accum_dtype=accum_dtype, workspace_bytes=workspace_bytes,
        )  # fmt: skip
        if d_hidden is not None and sums and size_and_rank(group)[0] > 1:
            dist.all_reduce(d_hidden, group=group)
        d_weight, d_bias = _cut(weight, d_weight, d_bias)
        return d_hidden, d_weight, None, d_bias, *[None] * 7


def _fields(with_entropy, with_predicted) -> tuple[str, ...]:
    return ("lse",) + ("entropy",) * bool(with_entropy) + ("top", "predicted") * bool(with_predicted)


def _whole(part, stats, group):
    entropy = torch.zeros_like(stats.loss) if stats.entropy is None else stats.entropy
    return combine(part, stats.loss, stats.lse, entropy, group)


def _filled(weight, bias):
    """Those of this part; of an empty one a class that stands in for none, since the kernels need one."""
    if weight.shape[0]:
        return weight, bias
    return weight.new_zeros(1, weight.shape[1]), None if bias is None else bias.new_zeros(1)


def _cut(weight, *grads):
    """Gradients without that of the class that stood in."""
    return [g if g is None or weight.shape[0] else g[:0] for g in grads]


def liger_vocab_parallel_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    group=None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    workspace_bytes: int | None = None,
) -> LinearLogprobs:
    """`liger_fused_linear_logprobs` of a head whose vocabulary is split among the ranks of `group`, in their order.

    hidden (..., H) and target (...), of the whole vocabulary, are the same on all ranks, weight (V, H) and bias (V,)
    are this rank's part, of any size. Every rank gets the outputs of the whole, and the whole gradient of hidden.
    group: None is all ranks of the job. Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    head.check(hidden, weight, bias, NAME)
    if target.shape != hidden.shape[:-1] or target.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{NAME}: target must be int64 or int32 of shape {tuple(hidden.shape[:-1])}, got {target.dtype} of shape "
            f"{tuple(target.shape)}"
        )
    loss = RowLoss(ignore_index, softcap=softcap, scale=logit_scale, temperature=temperature)
    nll, lse, entropy, _ = LigerVocabParallelLogprobsFunction.apply(
        hidden.reshape(-1, hidden.shape[-1]), weight, target.reshape(-1).contiguous(), bias, loss, group,
        bool(return_entropy), workspace_bytes,
    )  # fmt: skip
    return LinearLogprobs(
        -nll.view(target.shape), lse.view(target.shape), None if entropy is None else entropy.view(target.shape)
    )
