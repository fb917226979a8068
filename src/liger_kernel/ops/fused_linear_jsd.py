"""Generalised Jensen-Shannon divergence of a student's head from a teacher's; the logits never exist whole.

    log q = log_softmax(z), z of the student's logits;  log p the same of the teacher's;  z as in ops.cross_entropy
    loss = sum of JSD(p, q) over the rows whose label is not ignore_index / their number;  JSD as in ops.jsd
    dz = s - q * sum(s),  s = dJSD / dlog q

Shapes    student_input: (T, H), student_weight: (V, H); teacher_input: (T, H'), teacher_weight: (V, H'); labels: (T,).
Numerics  see liger_kernel.ops.head; divergences in fp32 (fp64 for fp64 inputs). The teacher takes no gradient.
Memory    two chunks of logits, dh, dW, formed in the forward.
"""

from __future__ import annotations

import torch

from liger_kernel.ops import head, head_distill, jsd
from liger_kernel.ops.compat import fused_linear_jsd_backward, fused_linear_jsd_forward
from liger_kernel.ops.core import Case, Contract, Kernels, kernels, outputs, upcast, wide
from liger_kernel.ops.head_distill import Linear
from liger_kernel.ops.row_loss import GradAware, RowLoss, inverse, is_early, logits_of, taken

__all__ = ["CONTRACT", "TORCH", "LigerFusedLinearJSDFunction", "fused_linear_jsd_backward",
           "fused_linear_jsd_forward", "liger_fused_linear_jsd", "reference"]  # fmt: skip

NAME = "fused_linear_jsd"

# Reference


def reference(x, w, teacher_input, teacher_weight, shift_labels=None, jsd_beta=0.5, ignore_index=-100, temperature=1.0,
              workspace_bytes=None):  # fmt: skip
    """The same mathematics in plain torch, differentiable: the oracle of the tests."""
    log_q, log_p = (
        (upcast(torch.nn.functional.linear(*side)) / temperature).log_softmax(-1)
        for side in ((x, w), (teacher_input, teacher_weight))
    )
    return jsd.reference(log_q, log_p, shift_labels, jsd_beta, ignore_index)


# The pair, on rows of logits: forward gives their divergences, and leaves scale times the gradient, plus also, over x

_TILE = 1 << 18  # elements of a tile: the few it holds at once stay in the caches of a CPU core


def _forward(x, y, live, scale, beta, of_x: RowLoss, of_y: RowLoss, wants_dx, also=None):
    step = max(1, x.shape[0] if torch.compiler.is_compiling() else _TILE // max(x.shape[1], 1))
    loss = torch.zeros(x.shape[0], dtype=wide(x.dtype), device=x.device)
    for i in range(0, x.shape[0], step):
        j = min(i + step, x.shape[0])
        z, z_p = logits_of(x[i:j], of_x), logits_of(y[i:j], of_y)
        log_q = z - z.logsumexp(1, keepdim=True)
        log_p = z_p - z_p.logsumexp(1, keepdim=True)
        part = None if live is None else live[i:j]
        loss[i:j], s = jsd.TORCH.forward(log_q, log_p, part, 1.0, beta, wants_dx)
        if wants_dx:
            dz = s - log_q.exp_() * s.sum(1, keepdim=True)
            if of_x.softcap is not None:
                dz *= 1 - (z * (of_x.temperature / of_x.softcap)).square_()
            dz *= scale * (of_x.scale / of_x.temperature)
            x[i:j] = dz if also is None else dz.add_(also[i:j])
    return loss


TORCH = Kernels(_forward, head.scaled)


def rows_of_divergence(like, live, scale, beta, of_x, of_y, impl=None):
    """The rows that head_distill.run asks for: (1,) sums of JSD times scale."""
    pair = kernels(NAME, like, impl)

    def rows(x, y, at, wants_dx):
        part = None if live is None else live[at]
        return pair.forward(x, y, part, scale, beta, of_x, of_y, wants_dx).sum().view(1) * scale

    return rows


# Autograd


class LigerFusedLinearJSDFunction(GradAware):
    """apply(student_input, student_weight, teacher_input, teacher_weight, shift_labels=None, jsd_beta=0.5,
    ignore_index=-100, temperature=1.0, accum_dtype=None, jsd_impl=None, jsd_mode=None, workspace_bytes=None) -> loss.

    jsd_impl names the implementation for this call; jsd_mode has no effect.
    """

    @staticmethod
    def forward(
        ctx, student_input, student_weight, teacher_input, teacher_weight, shift_labels=None, jsd_beta=0.5,
        ignore_index=-100, temperature=1.0, accum_dtype=None, jsd_impl=None, jsd_mode=None, workspace_bytes=None,
    ):  # fmt: skip
        check(student_input, student_weight, teacher_input, teacher_weight, shift_labels, jsd_beta, ignore_index)
        sides = student_input, student_weight, teacher_input, teacher_weight, shift_labels
        dtype = head.product_dtype(student_input)
        options = dict(beta=jsd_beta, ignore_index=ignore_index, temperature=temperature, impl=jsd_impl, dtype=dtype,
                       accum_dtype=accum_dtype, workspace_bytes=workspace_bytes)  # fmt: skip
        ctx.early, wanted = is_early("mean", dtype), ctx.needs_input_grad[:2]
        loss, *ctx.grads = solve(*sides, **options, needs=wanted if ctx.early else (False, False))
        if any(wanted) and not ctx.early:
            ctx.save_for_backward(*sides)
            ctx.options = options
        return outputs(loss)

    @staticmethod
    def backward(ctx, d_loss):
        if ctx.early:
            grads = fused_linear_jsd_backward(d_loss, *taken(ctx, NAME))
        else:
            _, *grads = solve(*ctx.saved_tensors, **ctx.options, needs=ctx.needs_input_grad[:2], factor=d_loss)
        return *grads, *[None] * 10


def solve(x, w, teacher_input, teacher_weight, labels, beta, ignore_index, temperature, needs, impl=None, dtype=None,
          accum_dtype=None, workspace_bytes=None, factor=None):  # fmt: skip
    """(loss, dx, dw); factor, a 0-d tensor, multiplies all."""
    live = None if labels is None else labels != ignore_index
    count = x.new_full((), max(x.shape[0], 1), dtype=wide(x.dtype)) if live is None else live.sum(dtype=wide(x.dtype))
    scale = inverse(count) if factor is None else inverse(count) * factor.to(count.dtype)
    loss = RowLoss(temperature=temperature)
    rows = rows_of_divergence(x, live, scale, beta, loss, loss, impl)
    totals, *grads = head_distill.run(
        Linear(x, w), Linear(teacher_input, teacher_weight), live, rows, 1, (*needs, False), dtype, accum_dtype,
        workspace_bytes,
    )  # fmt: skip
    return totals[0], *grads[:2]


# Functional


def liger_fused_linear_jsd(
    student_input: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_input: torch.Tensor,
    teacher_weight: torch.Tensor,
    shift_labels: torch.Tensor | None = None,
    jsd_beta: float = 0.5,
    ignore_index: int = -100,
    temperature: float = 1.0,
    accum_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Generalised Jensen-Shannon divergence, arXiv:2306.13649, of two heads over the same classes, averaged over rows.

    student_input: (T, H), student_weight: (V, H); teacher_input: (T, H'), teacher_weight: (V, H'), without gradients;
    any float dtypes. jsd_beta in [0, 1]: 0 is KL(teacher || student), 1 the reverse. Both logits are divided by
    temperature. shift_labels: (T,) integers, rows of ignore_index do not count. accum_dtype: that of dW's
    sum over the chunks, default fp32. The loss is fp32; its gradient is formed in the forward (except in fp16).
    Raises ValueError for shapes, dtypes, devices or options that do not fit.
    """
    return LigerFusedLinearJSDFunction.apply(
        student_input, student_weight, teacher_input, teacher_weight, shift_labels, jsd_beta, ignore_index, temperature,
        accum_dtype,
    )  # fmt: skip


def check(student_input, student_weight, teacher_input, teacher_weight, shift_labels, beta, ignore_index) -> None:
    """ValueError for what cannot be honoured, by name."""
    jsd.check_options(beta, ignore_index)
    check_heads((student_input, student_weight, None), (teacher_input, teacher_weight, None), NAME)
    if student_input.dim() != 2:
        raise ValueError(f"{NAME}: expected inputs (T, H), got {tuple(student_input.shape)}")
    if shift_labels is not None and shift_labels.shape != student_input.shape[:1]:
        raise ValueError(
            f"{NAME}: shift_labels of shape {tuple(shift_labels.shape)}, expected ({student_input.shape[0]},)"
        )


def check_heads(student, teacher, op: str) -> None:
    """ValueError where two (hidden, weight, bias) do not go together."""
    for (hidden, weight, bias), name in ((student, op), (teacher, f"{op}, teacher")):
        head.check(hidden, weight, bias, name)
    if teacher[0].shape[:-1] != student[0].shape[:-1] or teacher[1].shape[0] != student[1].shape[0]:
        raise ValueError(
            f"{op}: the teacher has rows {tuple(teacher[0].shape[:-1])} and {teacher[1].shape[0]} classes, the student "
            f"{tuple(student[0].shape[:-1])} and {student[1].shape[0]}"
        )


# Contract


def _case(rows, n_classes, dtype, device, labels=None, width=16, **options):
    make = dict(dtype=dtype, device=device)

    def side(width):  # logits of size 1
        return torch.randn(rows, width, **make), torch.randn(n_classes, width, **make) / width**0.5

    (x, w), teacher = side(width), side(width // 2)
    given = dict(zip(("teacher_input", "teacher_weight"), teacher))
    if labels is not None:
        given["shift_labels"] = torch.where(torch.rand(rows, device=device) < labels, -100, 1)
    return Case((x, w), given | options)


def _cases(dtype, device):
    shapes = ((9, 41), (1, 1), (0, 8), (1, 5000))
    return [
        _case(*shape, dtype, device, labels=labels, jsd_beta=beta, temperature=temperature, workspace_bytes=budget)
        for shape in shapes
        for labels, beta, temperature, budget in (
            (None, 0.5, 1.0, None),
            (0.4, 0.0, 2.0, 512),
            (1.0, 1.0, 0.7, 512),
            (0.4, 0.1, 1.0, 512),
        )  # fmt: skip
    ]


CONTRACT = Contract(
    call=lambda x, w, teacher_input, teacher_weight, shift_labels=None, jsd_beta=0.5, ignore_index=-100,
    temperature=1.0, workspace_bytes=None: LigerFusedLinearJSDFunction.apply(
        x, w, teacher_input, teacher_weight, shift_labels, jsd_beta, ignore_index, temperature, None, None, None,
        workspace_bytes,
    ),
    reference=reference,
    cases=_cases,
    timed=lambda dtype, device: {"4096x4096x128256": _case(4096, 128256, dtype, device, width=4096)},
    bytes_moved=lambda x, w, **options: 2 * (x.numel() + w.numel()) * x.element_size(),
)  # fmt: skip
