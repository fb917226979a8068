"""Per-token outputs of a language model's head whose vocabulary is split among the ranks of a group.

Shapes    hidden: (..., H), the same on all ranks; weight: (V of this rank, H); bias: (V of this rank,); target: (...).
Numerics  see liger_kernel.ops.head and liger_kernel.ops.vocab_parallel.
Memory    keeps the inputs; the backward recomputes each chunk (8 T H V flops together, shared by the ranks).
Traffic   three numbers per token and rank, once; the gradient of hidden, summed over the ranks.
"""

from __future__ import annotations

import torch
from torch import distributed as dist

from liger_kernel.ops import head
from liger_kernel.ops.core import kernels, wide
from liger_kernel.ops.fused_linear_scaled_cross_entropy import LinearLogprobs
from liger_kernel.ops.row_loss import Given, RowLoss
from liger_kernel.ops.vocab_parallel import combine, find_part, first_largest, size_and_rank, upstream

NAME = "vocab_parallel_head"


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
        top, predicted = None, None
        if weight.shape[0]:
            stats, *_ = kernels("fused_linear_cross_entropy", hidden).forward(
                hidden, weight, bias, Given(part.target), loss,
                fields=("lse",) + ("entropy",) * with_entropy + ("top", "predicted") * with_predicted,
                dtype=dtype, workspace_bytes=workspace_bytes,
            )  # fmt: skip
            nll, lse, entropy, top, predicted = stats.loss, stats.lse, stats.entropy, stats.top, stats.predicted
        else:
            nll = torch.zeros(len(target), dtype=wide(dtype), device=hidden.device)
            lse, entropy = torch.full_like(nll, float("-inf")), None
        whole = combine(part, nll, lse, torch.zeros_like(nll) if entropy is None else entropy, group)
        ctx.save_for_backward(hidden, weight, bias)
        ctx.options = part, whole, loss, group, dtype, workspace_bytes, accum_dtype, sums
        ctx.set_materialize_grads(False)
        if with_predicted:
            top = lse if top is None else top  # an empty part's -inf
            predicted = first_largest(part, top, torch.zeros_like(target) if predicted is None else predicted, group)
            ctx.mark_non_differentiable(predicted)
        return whole.nll, whole.lse, whole.entropy if with_entropy else None, predicted

    @staticmethod
    def backward(ctx, d_nll, d_lse, d_entropy, _):
        hidden, weight, bias = ctx.saved_tensors
        part, whole, loss, group, dtype, workspace_bytes, accum_dtype, sums = ctx.options
        given = [None if d is None else d.where(part.live, 0.0) for d in (d_nll, d_lse, d_entropy)]
        given[0] = torch.zeros_like(whole.nll) if d_nll is None else given[0]
        needs = (*ctx.needs_input_grad[:2], ctx.needs_input_grad[3])
        if weight.shape[0]:
            _, d_hidden, d_weight, d_bias = kernels("fused_linear_cross_entropy", hidden).forward(
                hidden, weight, bias, upstream(part, whole, *given), loss, needs=needs, dtype=dtype,
                accum_dtype=accum_dtype, workspace_bytes=workspace_bytes,
            )  # fmt: skip
        else:
            made = (hidden, weight, bias)
            d_hidden, d_weight, d_bias = (torch.zeros_like(x) if n else None for x, n in zip(made, needs))
        if d_hidden is not None and sums and size_and_rank(group)[0] > 1:
            dist.all_reduce(d_hidden, group=group)
        return d_hidden, d_weight, None, d_bias, *[None] * 7


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
