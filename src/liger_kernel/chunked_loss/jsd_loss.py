"""Distillation by the generalised Jensen-Shannon divergence of a student from a teacher, and by labels.

    loss = weight_soft mean(JSD_beta(softmax(y / T), softmax(x / T))) + weight_hard mean(cross entropy of x)

over the tokens whose label counts; x: the student's logits, y: the teacher's; JSD as in liger_kernel.ops.jsd, 0 the
forward and 1 the reverse KL. Agarwal et al. 2023, arXiv:2306.13649.
"""

from __future__ import annotations

import torch

from liger_kernel.chunked_loss.function import IGNORE_INDEX, Call
from liger_kernel.chunked_loss.fused_linear_distillation import LigerFusedLinearDistillationBase, hard_rows
from liger_kernel.ops import jsd
from liger_kernel.ops.core import kernels


class LigerFusedLinearJSDFunction(LigerFusedLinearDistillationBase):
    """apply(student_input, student_weight, teacher_input, teacher_weight, true_labels, ...) in the order of forward
    -> loss, or (loss, soft_loss, hard_loss).
    """

    @staticmethod
    def distillation_loss_fn(student_logits, teacher_logits, beta=0.5, target=None, ignore_index=IGNORE_INDEX):
        """The sum of the divergences of the rows."""
        log_q, log_p = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
        rows = log_q.shape[0] if target is None else (target != ignore_index).sum()
        return jsd.reference(log_q, log_p, target, beta, ignore_index) * rows

    @classmethod
    def rows_of(cls, given):
        """In one pass over the logits, instead of autograd on copies of them."""
        if cls.distillation_loss_fn is not LigerFusedLinearJSDFunction.distillation_loss_fn:
            return super().rows_of(given)
        beta, soft_weight = given.loss_kwargs["beta"], given.weights[0]

        def rows(x, y, at, wants_dx):
            hard, dx = hard_rows(given, x, at, wants_dx)
            soft = kernels("fused_linear_jsd", x).forward(
                x, y, given.live[at], soft_weight * given.factor, beta, given.soft, given.teacher, wants_dx, dx
            )
            return torch.stack((soft.sum(), hard)) * given.share

        return rows

    @classmethod
    def forward(
        cls, ctx, student_input, student_weight, teacher_input, teacher_weight, true_labels, student_bias, teacher_bias,
        weight_hard_loss=0.5, weight_soft_loss=0.5, beta=0.5, ignore_index=IGNORE_INDEX, temperature=1.0, compiled=True,
        chunk_size=1024, return_soft_hard_loss=False, softcap=None, logit_scale=1.0, teacher_softcap=None,
        teacher_logit_scale=1.0,
    ):  # fmt: skip
        jsd.check_options(beta, ignore_index)
        return LigerFusedLinearDistillationBase.forward(
            cls, ctx, student_input, student_weight, teacher_input, teacher_weight, true_labels, student_bias,
            teacher_bias, ignore_index=ignore_index, weight_hard_loss=weight_hard_loss,
            weight_soft_loss=weight_soft_loss, beta=beta, temperature=temperature,
            return_soft_hard_loss=return_soft_hard_loss, softcap=softcap, logit_scale=logit_scale,
            teacher_softcap=teacher_softcap, teacher_logit_scale=teacher_logit_scale,
        )  # fmt: skip


call = Call(LigerFusedLinearJSDFunction)


class LigerFusedLinearJSDLoss(torch.nn.Module):
    """Distillation over two heads, neither's logits kept: the divergence of this file's docstring and the labels' loss.

    beta in [0, 1]: 0 is KL(teacher || student), 1 the reverse. temperature divides both logits, of the divergence
    only. softcap and logit_scale are the student's head's, teacher_softcap and teacher_logit_scale the teacher's. With
    return_soft_hard_loss the call returns (loss, soft_loss, hard_loss). compiled and chunk_size have no effect.
    """

    def __init__(
        self, weight_hard_loss: float = 0.5, weight_soft_loss: float = 0.5, beta: float = 0.5,
        ignore_index: int = IGNORE_INDEX, temperature: float = 1.0, compiled: bool = True, chunk_size: int = 1024,
        return_soft_hard_loss: bool = False, *, softcap: float | None = None, logit_scale: float = 1.0,
        teacher_softcap: float | None = None, teacher_logit_scale: float = 1.0,
    ):  # fmt: skip
        super().__init__()
        jsd.check_options(beta, ignore_index)
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
