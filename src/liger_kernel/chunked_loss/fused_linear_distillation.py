"""Losses of a student's logits by a teacher's, over two fused heads."""

from __future__ import annotations

import inspect

import torch

from liger_kernel.chunked_loss.function import IGNORE_INDEX, row_loss
from liger_kernel.ops import head, head_distill
from liger_kernel.ops.core import kernels, wide
from liger_kernel.ops.fused_linear_jsd import check_heads
from liger_kernel.ops.head_distill import Linear
from liger_kernel.ops.row_loss import Given as Labels
from liger_kernel.ops.row_loss import GradAware, check_target, empty_stats, is_early, logits_of, taken

PLACES = (0, 1, 5)  # of the student's hidden states, weight and bias among apply's arguments
SHARE = 8  # chunks are so many times smaller where autograd keeps fp32 copies of them


class LigerFusedLinearDistillationBase(GradAware):
    """A subclass gives the loss of rows of logits in distillation_loss_fn, or rows of its own in rows_of."""

    @staticmethod
    def distillation_loss_fn(student_logits, teacher_logits, target=None, ignore_index=None, **kwargs):
        """(n, V) logits, both divided by the temperature -> the sum of the soft losses of the rows whose target counts.

        On a CPU no other rows come. It gets beta if it has an argument of that name.
        """
        raise NotImplementedError("distillation_loss_fn is what a subclass defines")

    @classmethod
    def rows_of(cls, given: Given) -> head_distill.Rows:
        """The rows that head_distill.run asks for: sums of (soft, hard) losses over their count, and the gradient."""
        return rows_by_autograd(cls, given)

    @staticmethod
    def forward(
        cls, ctx, student_input, student_weight, teacher_input, teacher_weight, target, student_bias=None,
        teacher_bias=None, chunk_size=1024, ignore_index=IGNORE_INDEX, weight_hard_loss=0.5, weight_soft_loss=0.5,
        beta=0.5, compute_ce_loss=True, temperature=1.0, compiled=True, return_soft_hard_loss=False, softcap=None,
        logit_scale=1.0, teacher_softcap=None, teacher_logit_scale=1.0, **loss_kwargs,
    ):  # fmt: skip
        """-> loss, or (loss, soft_loss, hard_loss). chunk_size and compiled have no effect."""
        name = cls.__name__
        hard = row_loss(ignore_index, softcap, logit_scale)
        soft = row_loss(ignore_index, softcap, logit_scale, temperature)
        teacher = row_loss(ignore_index, teacher_softcap, teacher_logit_scale, temperature)
        check_heads((student_input, student_weight, student_bias), (teacher_input, teacher_weight, teacher_bias), name)
        if target.shape != student_input.shape[:-1]:
            raise ValueError(
                f"{name}: target of shape {tuple(target.shape)}, expected {tuple(student_input.shape[:-1])}"
            )
        flat = target.reshape(-1).contiguous()
        check_target(flat.shape[0], student_weight.shape[0], flat, student_input.device, hard, name)
        weights = weight_soft_loss, weight_hard_loss if compute_ce_loss else 0.0
        tensors = student_input, student_weight, teacher_input, teacher_weight, flat, student_bias, teacher_bias
        options = cls, weights, compute_ce_loss and (return_soft_hard_loss or weights[1] != 0), soft, hard, teacher
        options = *options, {"beta": beta} | loss_kwargs, head.product_dtype(student_input)
        if torch.compiler.is_compiling():
            from liger_kernel.chunked_loss.distillation_compile import traced  # registers ops

            totals = traced(name, tensors, options)
            loss = totals[0] * weights[0] + totals[1] * weights[1]
            return (loss, *totals.detach().unbind()) if return_soft_hard_loss else loss
        needs = *(ctx.needs_input_grad[i] for i in PLACES[:2]), student_bias is not None and ctx.needs_input_grad[5]
        early = is_early("mean", options[-1])
        totals, grads = solve(tensors, options, needs if early else (False,) * 3)
        ctx.grads, ctx.options, ctx.name = grads, options, name
        ctx.needs = needs
        if any(needs) and not early:
            ctx.save_for_backward(*tensors)
        loss = totals[0] * weights[0] + totals[1] * weights[1]
        if return_soft_hard_loss:
            parts = [part.clone() for part in totals]
            ctx.mark_non_differentiable(*parts)
            return loss, *parts
        return loss

    @staticmethod
    def backward(ctx, d_loss, *_):
        while isinstance(d_loss, tuple):  # subclasses written for upstream hand on the tuple they got
            d_loss = d_loss[0]
        if ctx.saved_tensors:
            _, grads = solve(ctx.saved_tensors, ctx.options, ctx.needs, d_loss)
        else:
            grads = head.scaled(taken(ctx, ctx.name), d_loss)
        found = [None] * len(ctx.needs_input_grad)
        for place, grad in zip(PLACES, grads):
            found[place] = grad
        return tuple(found)


class Given:
    """What the rows are given: the labels, the head's options, the weights of the two losses over the count of rows."""

    def __init__(self, target, weights, wants_hard, soft, hard, teacher, loss_kwargs, factor, dtype):
        self.target, self.live = target, target != hard.ignore_index
        self.soft, self.hard, self.teacher, self.loss_kwargs = soft, hard, teacher, loss_kwargs
        self.weights, self.wants_hard = weights, wants_hard
        self.share = 1.0 / self.live.sum(dtype=dtype).clamp(min=1)
        self.factor = self.share if factor is None else self.share * factor.to(dtype)  # of the gradients


def solve(tensors, options, needs, factor=None):
    """((soft, hard) losses, gradients of the student's hidden, weight and bias, times factor)."""
    student_input, student_weight, teacher_input, teacher_weight, target, student_bias, teacher_bias = tensors
    cls, weights, wants_hard, soft, hard, teacher, loss_kwargs, dtype = options
    given = Given(target, weights, wants_hard, soft, hard, teacher, loss_kwargs, factor, wide(dtype))
    rows = cls.rows_of(given)
    totals, d_hidden, *rest = head_distill.run(
        Linear(student_input.reshape(-1, student_input.shape[-1]), student_weight, student_bias),
        Linear(teacher_input.detach().reshape(-1, teacher_input.shape[-1]), teacher_weight, teacher_bias),
        given.live, rows, 2, needs, dtype, share=getattr(rows, "share", 1),
    )  # fmt: skip
    return totals, (None if d_hidden is None else d_hidden.view(student_input.shape), *rest)


def hard_rows(given: Given, x, at, wants_dx):
    """(sum of the labels' losses of the rows x, their gradient in x's dtype or None); x stays as it is."""
    hard, dx, weight = given.share.new_zeros(()), None, given.weights[1]
    if given.wants_hard:
        dx = torch.empty_like(x) if wants_dx and weight else None
        norm = weight * given.factor if dx is not None else torch.ones_like(hard)
        stats = empty_stats(x.shape[0], x.device, wide(x.dtype), ())
        labels = Labels(given.target[at], norm=norm.expand(2).contiguous())
        kernels("cross_entropy", x).forward(x, labels, given.hard, stats, dx)
        hard = stats.loss.sum() / norm
    return hard, dx


def rows_by_autograd(cls, given: Given) -> head_distill.Rows:
    """Rows whose gradient autograd takes of distillation_loss_fn, on fp32 copies of their logits."""
    parameters = inspect.signature(cls.distillation_loss_fn).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    kwargs = {k: v for k, v in given.loss_kwargs.items() if k != "beta" or takes_any or "beta" in parameters}

    def rows(x, y, at, wants_dx):
        target, ignore_index = given.target[at], given.hard.ignore_index
        with torch.set_grad_enabled(wants_dx):
            leaf = x.to(wide(x.dtype), copy=True).requires_grad_(wants_dx)
            soft = cls.distillation_loss_fn(
                logits_of(leaf, given.soft), logits_of(y, given.teacher), target=target, ignore_index=ignore_index,
                **kwargs,
            )  # fmt: skip
            hard = soft.new_zeros(())
            if given.wants_hard:
                hard = torch.nn.functional.cross_entropy(
                    logits_of(leaf, given.hard), target.long(), ignore_index=ignore_index, reduction="sum"
                )
            if wants_dx:
                both = (given.weights[0] * soft + given.weights[1] * hard) * given.factor
                x.copy_(torch.autograd.grad(both, leaf)[0])
        return torch.stack((soft.detach(), hard.detach())) * given.share

    rows.share = SHARE  # type: ignore[attr-defined]
    return rows
