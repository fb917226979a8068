"""The distillation losses as a torch.library op, for torch.compile: its chunk loop is never traced.

Gradients are formed in the backward, where the op runs once more and knows the factor of each loss.
"""

from typing import Sequence  # noqa: UP035  (see head_compile)

import torch

from liger_kernel.chunked_loss.function import row_loss
from liger_kernel.chunked_loss.fused_linear_distillation import LigerFusedLinearDistillationBase, solve
from liger_kernel.ops.core import wide
from liger_kernel.ops.head_compile import Maybe, Tensors, filled


def traced(name: str, tensors, options) -> torch.Tensor:
    """(2,) the soft and the hard loss; called while Dynamo traces."""
    _, weights, wants_hard, soft, hard, teacher, kwargs, dtype = options
    if kwargs.keys() != {"beta"}:
        raise ValueError(f"{name}: options of its own are not known to torch.compile, got {sorted(kwargs)}")
    caps, scales = [soft.softcap or 0.0, teacher.softcap or 0.0], [hard.scale, teacher.scale, soft.temperature]
    return distillation_op(*tensors, name, [float(w) for w in weights], wants_hard, hard.ignore_index, caps,
                           [float(s) for s in scales], float(kwargs["beta"]), dtype)  # fmt: skip


def _options(name, weights, wants_hard, ignore_index, caps, scales, beta, dtype):
    cls = next(c for c in LigerFusedLinearDistillationBase.__subclasses__() if c.__name__ == name)
    (cap, teacher_cap), (scale, teacher_scale, temperature) = (c or None for c in caps), scales
    losses = (row_loss(ignore_index, cap, scale, temperature), row_loss(ignore_index, cap, scale),
              row_loss(ignore_index, teacher_cap, teacher_scale, temperature))  # fmt: skip
    return cls, tuple(weights), wants_hard, *losses, {"beta": beta}, dtype


@torch.library.custom_op("liger_kernel::fused_linear_distillation", mutates_args=())
def distillation_op(
    hidden: torch.Tensor, weight: torch.Tensor, teacher_hidden: torch.Tensor, teacher_weight: torch.Tensor,
    target: torch.Tensor, bias: Maybe, teacher_bias: Maybe, name: str, weights: Sequence[float], wants_hard: bool,
    ignore_index: int, caps: Sequence[float], scales: Sequence[float], beta: float, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    tensors = hidden, weight, teacher_hidden, teacher_weight, target, bias, teacher_bias
    options = _options(name, weights, wants_hard, ignore_index, caps, scales, beta, dtype)
    return solve(tensors, options, (False,) * 3)[0]


@distillation_op.register_fake
def _(hidden, *rest):
    return hidden.new_empty(2, dtype=wide(rest[-1]))


@torch.library.custom_op("liger_kernel::fused_linear_distillation_backward", mutates_args=())
def backward_op(
    d_loss: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor, target: torch.Tensor, bias: Maybe, teacher_bias: Maybe, name: str,
    weights: Sequence[float], wants_hard: bool, ignore_index: int, caps: Sequence[float], scales: Sequence[float],
    beta: float, dtype: torch.dtype, needs: Sequence[bool],
) -> Tensors:  # fmt: skip
    tensors = hidden, weight, teacher_hidden, teacher_weight, target, bias, teacher_bias
    options = _options(name, weights, wants_hard, ignore_index, caps, scales, beta, dtype)
    return [filled(g, hidden) for g in solve(tensors, options, tuple(needs), d_loss)[1]]


@backward_op.register_fake
def _(d_loss, hidden, weight, teacher_hidden, teacher_weight, target, bias, *rest):
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) if n else hidden.new_empty(0)
        for t, n in zip((hidden, weight, bias), rest[-1])
    ]


def _setup(ctx, inputs, output):
    ctx.constants = inputs[7:]
    ctx.save_for_backward(*inputs[:7])


def _backward(ctx, d_totals):
    # The graph outside multiplied by the weights of the two losses; the rows do so too: they get the rest.
    soft, hard = ctx.constants[1]
    d_loss = d_totals[0] / soft if soft else d_totals[1] / hard if hard else torch.zeros_like(d_totals[0])
    needs = [bool(ctx.needs_input_grad[place]) for place in (0, 1, 5)]
    made = backward_op(d_loss, *ctx.saved_tensors, *ctx.constants, needs)
    d_hidden, d_weight, d_bias = (m if n else None for m, n in zip(made, needs))
    return d_hidden, d_weight, None, None, None, d_bias, *[None] * 9


distillation_op.register_autograd(_backward, setup_context=_setup)
