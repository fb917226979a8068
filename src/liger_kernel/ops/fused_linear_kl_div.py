"""Kullback-Leibler divergence of given probabilities t from a student's head; the logits never exist whole.

    log q = log_softmax((h W^T) / temperature);  row = sum(t * (log(max(t, eps)) - log q));  dz = q * sum(t) - t
    loss = sum(row) / n      n: batchmean, the rows whose label is not ignore_index; mean, those times V; sum, 1

Shapes    student_input: (T, H), student_weight: (V, H); target: (T, V), probabilities; shift_labels: (T,).
Numerics  see liger_kernel.ops.head; rows in fp32 (fp64 for fp64 inputs). The target takes no gradient.
Memory    a chunk of logits, dh, dW, formed in the forward.
"""

from __future__ import annotations

import torch

from liger_kernel.ops import head, head_distill
from liger_kernel.ops.compat import fused_linear_kl_div_backward, fused_linear_kl_div_forward
from liger_kernel.ops.core import Case, Contract, Kernels, kernels, outputs, upcast, wide
from liger_kernel.ops.fused_linear_jsd import TORCH as JSD
from liger_kernel.ops.head_distill import Linear, Whole
from liger_kernel.ops.row_loss import GradAware, inverse, is_early, taken

__all__ = ["CONTRACT", "TORCH", "LigerFusedLinearKLDivFunction", "fused_linear_kl_div_backward",
           "fused_linear_kl_div_forward", "liger_fused_linear_kl_div", "reference"]  # fmt: skip

NAME = "fused_linear_kl_div"
REDUCTIONS = ("batchmean", "mean", "sum")

# Reference


def reference(x, w, target, shift_labels=None, reduction="batchmean", ignore_index=-100, temperature=1.0, eps=1e-10,
              workspace_bytes=None):  # fmt: skip
    """The same mathematics in plain torch, differentiable: the oracle of the tests."""
    log_q = (upcast(torch.nn.functional.linear(x, w)) / temperature).log_softmax(-1)
    t = target.to(log_q.dtype)
    rows = (t * (t.clamp(min=eps).log() - log_q)).sum(-1)
    live = torch.ones_like(rows, dtype=torch.bool) if shift_labels is None else shift_labels != ignore_index
    n = {"sum": 1, "batchmean": live.sum().clamp(min=1), "mean": live.sum().clamp(min=1) * w.shape[0]}[reduction]
    return rows.where(live, 0.0).sum() / n


# The pair, on rows of logits: forward gives their divergences, and leaves scale times the gradient over x

_TILE = 1 << 18  # elements of a tile: the few it holds at once stay in the caches of a CPU core


def _forward(x, t, live, scale, temperature, eps, wants_dx):
    step = max(1, x.shape[0] if torch.compiler.is_compiling() else _TILE // max(x.shape[1], 1))
    loss = torch.zeros(x.shape[0], dtype=wide(x.dtype), device=x.device)
    for i in range(0, x.shape[0], step):
        j = min(i + step, x.shape[0])
        log_q = (upcast(x[i:j]) / temperature).log_softmax(1)
        p = t[i:j].to(log_q.dtype)
        each = p.clamp(min=eps).log_().sub_(log_q).masked_fill_(p == 0, 0.0).mul_(p)
        dead = None if live is None else ~live[i:j]
        loss[i:j] = each.sum(1) if dead is None else each.sum(1).masked_fill_(dead, 0.0)
        if wants_dx:
            dz = log_q.exp_().mul_(p.sum(1, keepdim=True)).sub_(p).mul_(scale / temperature)
            x[i:j] = dz if dead is None else dz.masked_fill_(dead[:, None], 0.0)
    return loss


TORCH = Kernels(_forward, JSD.backward)


# Autograd


class LigerFusedLinearKLDivFunction(GradAware):
    """apply(student_input, student_weight, target, shift_labels=None, reduction="batchmean", ignore_index=-100,
    temperature=1.0, eps=1e-10, accum_dtype=None, workspace_bytes=None) -> loss.
    """

    @staticmethod
    def forward(
        ctx, student_input, student_weight, target, shift_labels=None, reduction="batchmean", ignore_index=-100,
        temperature=1.0, eps=1e-10, accum_dtype=None, workspace_bytes=None,
    ):  # fmt: skip
        check(student_input, student_weight, target, shift_labels, reduction, temperature, eps)
        tensors = student_input, student_weight, target, shift_labels
        options = reduction, ignore_index, temperature, eps, accum_dtype, workspace_bytes
        ctx.early, wanted = is_early("mean", head.product_dtype(student_input)), ctx.needs_input_grad[:2]
        loss, *ctx.grads = solve(*tensors, *options, needs=wanted if ctx.early else (False, False))
        if any(wanted) and not ctx.early:
            ctx.save_for_backward(*tensors)
            ctx.options = options
        return outputs(loss)

    @staticmethod
    def backward(ctx, d_loss):
        if ctx.early:
            grads = fused_linear_kl_div_backward(d_loss, *taken(ctx, NAME))
        else:
            _, *grads = solve(*ctx.saved_tensors, *ctx.options, needs=ctx.needs_input_grad[:2], factor=d_loss)
        return *grads, *[None] * 8


def solve(x, w, target, labels, reduction, ignore_index, temperature, eps, accum_dtype=None, workspace_bytes=None,
          needs=(False, False), factor=None):  # fmt: skip
    """(loss, dx, dw); factor, a 0-d tensor, multiplies all."""
    dtype, pair = wide(x.dtype), kernels(NAME, x)
    live = None if labels is None else labels != ignore_index
    count = x.new_full((), x.shape[0], dtype=dtype) if live is None else live.sum(dtype=dtype)
    scale = {"sum": torch.ones_like(count), "batchmean": inverse(count), "mean": inverse(count * w.shape[0])}[reduction]
    scale = scale if factor is None else scale * factor.to(dtype)

    def rows(logits, t, at, wants_dx):
        part = None if live is None else live[at]
        return pair.forward(logits, t.contiguous(), part, scale, temperature, eps, wants_dx).sum().view(1) * scale

    totals, *grads = head_distill.run(
        Linear(x, w), Whole(target), live, rows, 1, (*needs, False), None, accum_dtype, workspace_bytes
    )
    return totals[0], *grads[:2]


# Functional


def liger_fused_linear_kl_div(
    student_input: torch.Tensor,
    student_weight: torch.Tensor,
    target: torch.Tensor,
    shift_labels: torch.Tensor | None = None,
    reduction: str = "batchmean",
    ignore_index: int = -100,
    temperature: float = 1.0,
    eps: float = 1e-10,
    accum_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Kullback-Leibler divergence of target, probabilities (T, V), from softmax(input x weight^T / temperature).

    student_input: (T, H), student_weight: (V, H), any float dtypes; target takes no gradient. reduction: "batchmean"
    (over rows), "mean" (over their elements) or "sum"; rows whose shift_labels (T,) are ignore_index do not count.
    eps: lower bound of what the log of a target is taken of. accum_dtype: that of dW's sum over the chunks, default
    fp32. The loss is fp32. Raises ValueError for shapes, dtypes, devices or options that do not fit.
    """
    return LigerFusedLinearKLDivFunction.apply(
        student_input, student_weight, target, shift_labels, reduction, ignore_index, temperature, eps, accum_dtype
    )


def check(x, w, target, shift_labels, reduction, temperature, eps) -> None:
    """ValueError for what cannot be honoured, by name."""
    check_options(reduction, temperature, eps)
    head.check(x, w, None, NAME)
    if x.dim() != 2 or target.shape != (x.shape[0], w.shape[0]) or not target.is_floating_point():
        raise ValueError(
            f"{NAME}: inputs {tuple(x.shape)} and {w.shape[0]} classes need float probabilities (T, V), got "
            f"{target.dtype} {tuple(target.shape)}"
        )
    if shift_labels is not None and shift_labels.shape != x.shape[:1]:
        raise ValueError(f"{NAME}: shift_labels of shape {tuple(shift_labels.shape)}, expected ({x.shape[0]},)")


def check_options(reduction, temperature, eps) -> None:
    """ValueError for what no call could honour."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {sorted(REDUCTIONS)}, got {reduction!r}")
    if not temperature > 0.0:
        raise ValueError(f"temperature must be positive, got {temperature!r}")
    if not eps >= 0.0:
        raise ValueError(f"{NAME}: eps must not be negative, got {eps!r}")


# Contract


def _case(rows, n_classes, dtype, device, labels=None, width=16, **options):
    make = dict(dtype=dtype, device=device)
    x, w = torch.randn(rows, width, **make), torch.randn(n_classes, width, **make) / width**0.5  # logits of size 1
    given = {"target": torch.randn(rows, n_classes, device=device).softmax(-1).to(dtype)}
    if labels is not None:
        given["shift_labels"] = torch.where(torch.rand(rows, device=device) < labels, -100, 1)
    return Case((x, w), given | options)


def _cases(dtype, device):
    shapes = ((9, 41), (1, 1), (0, 8), (1, 5000))
    options = (("batchmean", None, 1.0, None), ("mean", 0.4, 2.0, 512), ("sum", 1.0, 0.7, 512), ("sum", 0.4, 1.0, 512))
    return [
        _case(*shape, dtype, device, labels=labels, reduction=reduction, temperature=t, workspace_bytes=budget)
        for shape in shapes
        for reduction, labels, t, budget in options
    ]


def _call(x, w, target, shift_labels=None, reduction="batchmean", ignore_index=-100, temperature=1.0, eps=1e-10,
          workspace_bytes=None):  # fmt: skip
    return LigerFusedLinearKLDivFunction.apply(
        x, w, target, shift_labels, reduction, ignore_index, temperature, eps, None, workspace_bytes
    )


CONTRACT = Contract(
    call=_call,
    reference=reference,
    cases=_cases,
    timed=lambda dtype, device: {"4096x4096x128256": _case(4096, 128256, dtype, device, width=4096)},
    bytes_moved=lambda x, w, **options: 2 * (x.numel() + w.numel()) * x.element_size(),
)
