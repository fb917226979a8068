"""Distillation by the angle between a student's and a teacher's logits, and by labels.

    loss = weight_soft beta mean(1 - cos(x, y)) + weight_hard mean(cross entropy of x)

over the tokens whose label counts; x: the student's logits, y: the teacher's.

    dcos(x, y) / dx = (y / |y| - cos(x, y) x / |x|) / |x|
"""

from __future__ import annotations

import torch

from liger_kernel.chunked_loss.function import IGNORE_INDEX, Call
from liger_kernel.chunked_loss.fused_linear_distillation import SHARE, LigerFusedLinearDistillationBase, hard_rows
from liger_kernel.ops.row_loss import logits_of

_EPS = 1e-8  # of torch's cosine_similarity: norms are at least so long


class LigerFusedLinearCosineSimilarityFunction(LigerFusedLinearDistillationBase):
    """apply(student_input, student_weight, teacher_input, teacher_weight, true_labels, ...) in the order of forward
    -> loss, or (loss, soft_loss, hard_loss).
    """

    @staticmethod
    def distillation_loss_fn(student_logits, teacher_logits, target=None, ignore_index=None, beta=1.0):
        """The sum over the rows of beta times one minus the cosine."""
        rows = 1 - torch.nn.functional.cosine_similarity(student_logits, teacher_logits, dim=-1)
        return beta * (rows if target is None else rows.where(target != ignore_index, 0.0)).sum()

    @classmethod
    def rows_of(cls, given):
        """With the gradient of this file's docstring, instead of autograd's."""
        if cls.distillation_loss_fn is not LigerFusedLinearCosineSimilarityFunction.distillation_loss_fn:
            return super().rows_of(given)
        beta, scale = given.loss_kwargs["beta"], given.soft.scale / given.soft.temperature

        def rows(x, y, at, wants_dx):
            hard, also = hard_rows(given, x, at, wants_dx)
            z, live = logits_of(x, given.soft), given.live[at]
            away = logits_of(y, given.teacher)
            length = z.norm(dim=-1, keepdim=True).clamp(min=_EPS)
            away = away / away.norm(dim=-1, keepdim=True).clamp(min=_EPS)
            cosine = (z * away).sum(-1, keepdim=True) / length
            soft = (beta * (1 - cosine.squeeze(-1))).where(live, 0.0).sum()
            if wants_dx:
                away.addcmul_(z, cosine / length, value=-1)
                away *= -beta * given.weights[0] * given.factor * scale / length
                if given.soft.softcap is not None:
                    away *= 1 - (z * (given.soft.temperature / given.soft.softcap)).square_()
                away = away.where(live[:, None], 0.0)
                x.copy_(away if also is None else away.add_(also))
            return torch.stack((soft, hard)) * given.share

        rows.share = SHARE  # type: ignore[attr-defined]
        return rows

    @classmethod
    def forward(
        cls, ctx, student_input, student_weight, teacher_input, teacher_weight, true_labels, student_bias, teacher_bias,
        weight_hard_loss=0.5, weight_soft_loss=0.5, beta=0.5, ignore_index=IGNORE_INDEX, temperature=1.0, compiled=True,
        chunk_size=1024, return_soft_hard_loss=False, softcap=None, logit_scale=1.0, teacher_softcap=None,
        teacher_logit_scale=1.0,
    ):  # fmt: skip
        return LigerFusedLinearDistillationBase.forward(
            cls, ctx, student_input, student_weight, teacher_input, teacher_weight, true_labels, student_bias,
            teacher_bias, ignore_index=ignore_index, weight_hard_loss=weight_hard_loss,
            weight_soft_loss=weight_soft_loss, beta=beta, temperature=temperature,
            return_soft_hard_loss=return_soft_hard_loss, softcap=softcap, logit_scale=logit_scale,
            teacher_softcap=teacher_softcap, teacher_logit_scale=teacher_logit_scale,
        )  # fmt: skip


call = Call(LigerFusedLinearCosineSimilarityFunction)


class LigerFusedLinearCosineSimilarityLoss(torch.nn.Module):
    """Distillation over two heads, neither's logits kept: the angle of this file's docstring and the labels' loss.

    The temperature divides both logits, of the soft loss only, which it does not change. softcap and logit_scale are
    the student's head's, teacher_softcap and teacher_logit_scale the teacher's. With return_soft_hard_loss the call
    returns (loss, soft_loss, hard_loss). compiled and chunk_size have no effect.
    """

    def __init__(
        self, weight_hard_loss: float = 0.5, weight_soft_loss: float = 0.5, beta: float = 0.5,
        ignore_index: int = IGNORE_INDEX, temperature: float = 1.0, compiled: bool = True, chunk_size: int = 1024,
        return_soft_hard_loss: bool = False, *, softcap: float | None = None, logit_scale: float = 1.0,
        teacher_softcap: float | None = None, teacher_logit_scale: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        self.weight_hard_loss, self.weight_soft_loss = weight_hard_loss, weight_soft_loss
        self.beta, self.ignore_index, self.temperature = beta, ignore_index, temperature
        self.compiled, self.chunk_size, self.return_soft_hard_loss = compiled, chunk_size, return_soft_hard_loss
        self.softcap, self.logit_scale = softcap, logit_scale
        self.teacher_softcap, self.teacher_logit_scale = teacher_softcap, teacher_logit_scale

    def forward(
        self, student_input, student_weight, teacher_input, teacher_weight, true_labels, student_bias=None,
        teacher_bias=None,
    ):  # fmt: skip
        """student_input: (..., H), student_weight: (V, H); teacher_input: (..., H'), teacher_weight: (V, H'), without
        gradients; true_labels: (...), whose ignore_index rows do not count -> the loss, averaged over the others.
        """
        return call(
            student_input, student_weight, teacher_input, teacher_weight, true_labels, student_bias, teacher_bias,
            self.weight_hard_loss, self.weight_soft_loss, self.beta, self.ignore_index, self.temperature, self.compiled,
            self.chunk_size, self.return_soft_hard_loss, self.softcap, self.logit_scale, self.teacher_softcap,
            self.teacher_logit_scale,
        )  # fmt: skip
