"""Per-token outputs of a language model's head, each differentiable, logits never kept: for policy gradients.

    z = softcap * tanh(scale * (hidden W^T + b) / softcap) / temperature
    log_prob = z_y - lse        lse = log(sum(exp(z)))        entropy = lse - sum_j p_j * z_j
    dz_j = d_log_prob * ([j = y] - p_j) + d_lse * p_j - d_entropy * p_j * (z_j - lse + entropy)

Shapes    hidden: (..., H); weight: (V, H); bias: (V,); target: (...) integers; every output like target.
Numerics  see liger_kernel.ops.head; outputs are fp32 (fp64 for fp64 hidden), 0 where the target is ignored.
Memory    keeps the inputs and four numbers a token; the backward computes the logits again (8 T H V flops together),
          see head_slabs.
Needs     all tensors on one device.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from liger_kernel.ops import fused_linear_cross_entropy, head
from liger_kernel.ops.core import Case, Contract, kernels
from liger_kernel.ops.row_loss import RECOMPUTED, GradAware, RowLoss, Stats, check_target, logits_of, prepare

NAME = "fused_linear_scaled_cross_entropy"
TORCH = fused_linear_cross_entropy.TORCH


@dataclass
class LinearLogprobs:
    """Outputs of liger_fused_linear_logprobs, each of target's shape; None where not asked for."""

    log_prob: torch.Tensor
    lse: torch.Tensor
    entropy: torch.Tensor | None = None
    predicted: torch.Tensor | None = None  # argmax, -1 where ignored
    hit: torch.Tensor | None = None  # predicted == target


# Reference


def reference(hidden, weight, bias=None, target=None, temperature=1.0, logit_scale=1.0, softcap=None, **sizes):
    """(log_prob, lse, entropy) in plain torch, differentiable: the oracle of the tests."""
    loss = RowLoss(softcap=softcap, scale=logit_scale, temperature=temperature)
    z = logits_of(torch.nn.functional.linear(hidden, weight, bias), loss)
    live = target != loss.ignore_index
    log_p = z.log_softmax(-1)
    log_prob = log_p.gather(-1, target.where(live, 0)[..., None]).squeeze(-1)
    outputs = log_prob, z.logsumexp(-1), -(log_p.exp() * log_p).sum(-1)
    out_dtype = torch.promote_types(hidden.dtype, torch.float32)
    return tuple(o.masked_fill(~live, 0.0).to(out_dtype) for o in outputs)


# Autograd


def logprobs_forward(hidden, weight, target, bias, loss, fields, dtype, workspace_bytes) -> Stats:
    """The Stats of rows of hidden (T, H), with RECOMPUTED; its loss is the negative log-probability."""
    with torch.no_grad():
        given = prepare(target, loss, hidden, reduction="none")
        return kernels(NAME, hidden).forward(
            hidden,
            weight,
            bias,
            given,
            loss,
            fields=(*fields, *RECOMPUTED),
            dtype=dtype,
            workspace_bytes=workspace_bytes,
        )[0]


def logprobs_backward(upstream, hidden, weight, target, bias, stats, loss, needs, dtype, workspace_bytes):
    """The gradients of (hidden, weight, bias) for upstream = (d_log_prob, d_lse, d_entropy), None for one of zeros."""
    with torch.no_grad():
        d_log_prob, d_lse, d_entropy = (None if d is None else d.to(stats.loss.dtype) for d in upstream)
        factor = torch.zeros_like(stats.loss) if d_log_prob is None else -d_log_prob
        given = dataclasses.replace(
            prepare(target, loss, hidden, reduction="none", factor=factor),
            d_lse=None if d_lse is None else d_lse.contiguous(),
            d_entropy=None if d_entropy is None else d_entropy.contiguous(),
        )
        return kernels("head_slabs", hidden).forward(
            hidden, weight, bias, given, loss, stats=stats, needs=needs, dtype=dtype, workspace_bytes=workspace_bytes
        )


class LigerFusedLinearLogprobsFunction(GradAware):
    """apply(hidden (T, H), weight, target (T,), bias, loss: RowLoss, fields, workspace_bytes)
    -> (log_prob, lse, entropy, predicted).
    """

    @staticmethod
    def forward(ctx, hidden, weight, target, bias, loss, fields, workspace_bytes):
        dtype = head.product_dtype(hidden)
        stats = logprobs_forward(hidden, weight, target, bias, loss, fields, dtype, workspace_bytes)
        ctx.save_for_backward(hidden, weight, target, bias, *(getattr(stats, f) for f in RECOMPUTED), stats.entropy)
        ctx.options = loss, dtype, workspace_bytes
        ctx.set_materialize_grads(False)
        if stats.predicted is not None:
            ctx.mark_non_differentiable(stats.predicted)
        return -stats.loss, stats.lse, stats.entropy, stats.predicted

    @staticmethod
    def backward(ctx, d_log_prob, d_lse, d_entropy, _):
        hidden, weight, target, bias, nll, top, log_sum, entropy = ctx.saved_tensors
        loss, dtype, workspace_bytes = ctx.options
        needs = (*ctx.needs_input_grad[:2], ctx.needs_input_grad[3])
        stats = Stats(nll, nll=nll, top=top, log_sum=log_sum, entropy=entropy)
        d_hidden, d_weight, d_bias = logprobs_backward(
            (d_log_prob, d_lse, d_entropy), hidden, weight, target, bias, stats, loss, needs, dtype, workspace_bytes,
        )  # fmt: skip
        return d_hidden, d_weight, None, d_bias, None, None, None


class LigerFusedLinearScaledCrossEntropyFunction:
    """apply(_input, weight, target, temperature=1.0, ignore_index=-100, m_tiles_per_cluster=1, return_entropy=False,
    selected_token_ids=None) -> nll, or (nll, entropy), each of target's shape and differentiable.
    """

    @staticmethod
    def apply(
        _input, weight, target, temperature=1.0, ignore_index=-100, m_tiles_per_cluster=1, return_entropy=False,
        selected_token_ids=None,
    ):  # fmt: skip
        """m_tiles_per_cluster has no effect. Raises ValueError for selected_token_ids, which is not offered."""
        if selected_token_ids is not None:
            raise ValueError(f"{NAME}: selected_token_ids is not offered; pass the rows of weight that are selected")
        outputs = liger_fused_linear_logprobs(
            _input, weight, target, temperature=temperature, ignore_index=ignore_index, return_entropy=return_entropy
        )
        return (-outputs.log_prob, outputs.entropy) if return_entropy else -outputs.log_prob


class LigerFusedLinearScaledCrossEntropyTPFunction:
    """apply(_input, weight, target, tp_group, temperature=1.0, ignore_index=-100, tiles_per_reduce=1,
    return_entropy=False) -> nll, or (nll, entropy), each of target's shape and differentiable.

    weight is this rank's part of a vocabulary that is split among tp_group; see liger_vocab_parallel_logprobs.
    """

    @staticmethod
    def apply(
        _input, weight, target, tp_group, temperature=1.0, ignore_index=-100, tiles_per_reduce=1, return_entropy=False
    ):
        """tiles_per_reduce has no effect: the ranks meet once for all tokens."""
        from liger_kernel.ops.vocab_parallel_head import liger_vocab_parallel_logprobs

        outputs = liger_vocab_parallel_logprobs(
            _input, weight, target, group=tp_group, temperature=temperature, ignore_index=ignore_index,
            return_entropy=return_entropy,
        )  # fmt: skip
        return (-outputs.log_prob, outputs.entropy) if return_entropy else -outputs.log_prob


# Functional


def liger_fused_linear_scaled_cross_entropy_tp(
    input, weight, target, tp_group, temperature=1.0, ignore_index=-100, tiles_per_reduce=1, return_entropy=False
):
    """The functional form of LigerFusedLinearScaledCrossEntropyTPFunction."""
    return LigerFusedLinearScaledCrossEntropyTPFunction.apply(
        input, weight, target, tp_group, temperature, ignore_index, tiles_per_reduce, return_entropy
    )


def liger_fused_linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    temperature: float | torch.Tensor = 1.0,
    logit_scale: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    return_predicted: bool = False,
    workspace_bytes: int | None = None,
) -> LinearLogprobs:
    """Log-probability of each target, log-sum-exp and, on request, entropy, argmax and top-1 hit of each token.

    hidden: (..., H), weight: (V, H), bias: (V,), any float dtypes; target: (...) int64. log_prob, lse and entropy are
    fp32, differentiable any number of times each, and 0 where the target is ignore_index. The logits are multiplied
    by logit_scale, capped by softcap, divided by temperature; the first and the last may be tensors of one element,
    which take no gradient. workspace_bytes: memory of a chunk of logits.
    Raises ValueError for shapes, dtypes, devices or options that do not fit and, on a CPU or under
    LIGER_KERNEL_DEBUG=1, for a label outside [0, V); on a GPU such a row is NaN.
    """
    head.check(hidden, weight, bias, NAME)
    if target.shape != hidden.shape[:-1]:
        raise ValueError(f"{NAME}: target of shape {tuple(target.shape)}, expected {tuple(hidden.shape[:-1])}")
    head.check_scales(logit_scale, temperature, hidden, NAME)
    loss = RowLoss(ignore_index, softcap=softcap, scale=logit_scale, temperature=temperature)
    shape, target = target.shape, target.reshape(-1).contiguous()
    check_target(target.shape[0], weight.shape[0], target, hidden.device, loss, NAME)
    fields = ("lse",) + ("entropy",) * bool(return_entropy) + ("predicted",) * bool(return_predicted)
    flat = hidden.reshape(-1, hidden.shape[-1])
    arguments = flat, weight, target, bias, loss, fields, workspace_bytes
    if torch.compiler.is_compiling():
        from liger_kernel.ops.head_compile import traced_logprobs

        log_prob, lse, entropy, predicted, _ = traced_logprobs(*arguments)
    else:
        log_prob, lse, entropy, predicted = LigerFusedLinearLogprobsFunction.apply(*arguments)
    hit = None if predicted is None else (predicted == target) & (target != ignore_index)
    optional = (None if o is None else o.view(shape) for o in (entropy, predicted, hit))
    return LinearLogprobs(log_prob.view(shape), lse.view(shape), *optional)


# Contract


def _call(hidden, weight, bias=None, target=None, **options):
    outputs = liger_fused_linear_logprobs(hidden, weight, target, bias, return_entropy=True, **options)
    return outputs.log_prob, outputs.lse, outputs.entropy


def _case(rows, width, n_classes, dtype, device, bias=False, **options):
    hidden = torch.randn(rows, width, dtype=dtype, device=device)
    weight = torch.randn(n_classes, width, dtype=dtype, device=device) / width**0.5
    target = torch.randint(0, n_classes, (rows,), device=device)
    target = target.where(torch.rand(rows, device=device) >= 0.25, -100)
    return Case((hidden, weight, torch.randn(n_classes, dtype=dtype, device=device) if bias else None), {
        "target": target, **options
    })  # fmt: skip


def _cases(dtype, device):
    capped = dict(softcap=8.0, logit_scale=0.5, temperature=0.7, bias=True, workspace_bytes=1)
    shapes = ((9, 16, 41), (1, 1, 1), (5, 8, 3), (0, 8, 7), (33, 8, 300))
    return [_case(*shape, dtype, device, **more) for shape in shapes for more in ({}, capped)]


CONTRACT = Contract(
    call=_call,
    reference=reference,
    cases=_cases,
    timed=lambda dtype, device: {"8192x4096x128256": _case(8192, 4096, 128256, dtype, device)},
    bytes_moved=lambda hidden, weight, *args, **options: 2 * (hidden.numel() + weight.numel()) * hidden.element_size(),
    flops=lambda hidden, weight, *args, **options: 6 * hidden.numel() * weight.shape[0],
)
