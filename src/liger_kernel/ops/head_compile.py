"""fused_linear_cross_entropy as one torch.library op, for torch.compile: its chunk loop is never traced.

Optional outputs are empty tensors where they are not asked for: an op has a fixed number of outputs.
"""

from __future__ import annotations

import torch

from liger_kernel.ops import fused_linear_cross_entropy as room
from liger_kernel.ops import head
from liger_kernel.ops.core import wide
from liger_kernel.ops.row_loss import is_early

Maybe = torch.Tensor | None


def traced(
    input, weight, target, bias, ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction, softcap,
    return_z_loss, accum_dtype, use_token_scaling, return_token_accuracy, return_predicted_tokens, options,
    low_inputs=None, low_weight=None,
):  # fmt: skip
    """What the Function returns, None for what was not asked; called while Dynamo traces."""
    room.check(input, weight, target, bias, ce_weight, reduction, ignore_index, accum_dtype, options)
    hidden, shape, options = input.reshape(-1, input.shape[-1]), target.shape, room.flat(options, target)
    normalizer = options.normalizer
    if normalizer is not None and not isinstance(normalizer, torch.Tensor):
        normalizer = torch.full((), float(normalizer), device=input.device)
    grown = torch.is_grad_enabled()
    if low_inputs is not None:
        head.check_low_rank(low_inputs, low_weight, input, weight, room.NAME)
        low_inputs = low_inputs.reshape(-1, low_inputs.shape[-1])
    needs = [t is not None and grown and t.requires_grad for t in (input, weight, bias, low_inputs, low_weight)]
    dtype = options.dtype or head.product_dtype(hidden)
    numbers = [lse_square_scale, label_smoothing, options.logit_scale, options.temperature]
    asked = [return_z_loss, return_token_accuracy, return_predicted_tokens, options.return_entropy]
    loss, *rest = forward_op(
        hidden, weight, target.reshape(-1), bias, ce_weight, options.token_weight, normalizer, low_inputs, low_weight,
        ignore_index, numbers, reduction, softcap, accum_dtype, use_token_scaling, asked, needs, dtype,
        options.workspace_bytes,
    )[:5]  # fmt: skip
    if reduction == "none":
        loss, rest = loss.view(shape), [rest[0].view(shape) if return_z_loss else None, *rest[1:]]
    z_loss, accuracy, predicted, entropy = (r.detach() if wanted else None for r, wanted in zip(rest, asked))
    entropies = () if entropy is None else (entropy.view(shape),)
    return loss, z_loss, accuracy, None if predicted is None else predicted.view(shape), *entropies


def run(
    hidden, weight, target, bias, ce_weight, token_weight, normalizer, low_inputs, low_weight, ignore_index, numbers,
    reduction, softcap, accum_dtype, token_scaling, asked, needs, dtype, workspace_bytes, d_loss=None,
):  # fmt: skip
    """The four results, the entropy and the five gradients, for d_loss (T,) or for the sum of the losses."""
    z_scale, smoothing, scale, temperature = numbers
    low = None if low_inputs is None else head.LowRank(low_inputs, low_weight, tuple(needs[3:]))
    options = room.HeadOptions(
        scale, temperature, token_weight, normalizer, workspace_bytes, tuple(needs[:3]), dtype, asked[3], low
    )
    made = room.fused_linear_cross_entropy_forward(
        hidden, weight, target, ce_weight, bias, ignore_index, z_scale, smoothing, reduction, softcap, asked[0],
        accum_dtype, token_scaling, asked[1], asked[2], token_grad_output=d_loss, compute_gradients=any(needs),
        options=options,
    )  # fmt: skip
    results, grads = made[:4], made[4:]
    entropy = None
    if asked[3]:
        *grads, entropy = grads
    return *results, entropy, *grads, *[None] * (5 - len(grads))


def filled(tensor: Maybe, like: torch.Tensor) -> torch.Tensor:
    return like.new_empty(0) if tensor is None else tensor


@torch.library.custom_op("liger_kernel::fused_linear_cross_entropy", mutates_args=())
def forward_op(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, bias: Maybe, ce_weight: Maybe,
    token_weight: Maybe, normalizer: Maybe, low_inputs: Maybe, low_weight: Maybe, ignore_index: int,
    numbers: list[float], reduction: str, softcap: float | None, accum_dtype: torch.dtype | None, token_scaling: bool,
    asked: list[bool], needs: list[bool], dtype: torch.dtype, workspace_bytes: int | None,
) -> list[torch.Tensor]:  # fmt: skip
    """-> loss, z_loss, token_accuracy, predicted_tokens, entropy and, where they are known already, the gradients."""
    early = [n and is_early(reduction, dtype) for n in needs]
    results = run(
        hidden, weight, target, bias, ce_weight, token_weight, normalizer, low_inputs, low_weight, ignore_index,
        numbers, reduction, softcap, accum_dtype, token_scaling, asked, early, dtype, workspace_bytes,
    )  # fmt: skip
    return [filled(r, hidden) for r in results]


@forward_op.register_fake
def _(hidden, weight, target, bias, ce_weight, token_weight, normalizer, low_inputs, low_weight, ignore_index,
      numbers, reduction, softcap, accum_dtype, token_scaling, asked, needs, dtype, workspace_bytes):  # fmt: skip
    shape = target.shape if reduction == "none" else ()
    early = [n and is_early(reduction, dtype) for n in needs]
    outputs = [
        hidden.new_empty(shape, dtype=wide(dtype)),
        hidden.new_empty(shape, dtype=wide(dtype)) if asked[0] else None,
        hidden.new_empty((), dtype=torch.float32) if asked[1] else None,
        target.new_empty(target.shape, dtype=torch.int64) if asked[2] else None,
        hidden.new_empty(target.shape, dtype=wide(dtype)) if asked[3] else None,
        *(torch.empty_like(t, memory_format=torch.contiguous_format) if e else None
          for t, e in zip((hidden, weight, bias, low_inputs, low_weight), early)),
    ]  # fmt: skip
    return [filled(o, hidden) for o in outputs]


@torch.library.custom_op("liger_kernel::fused_linear_cross_entropy_backward", mutates_args=())
def backward_op(
    d_loss: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, bias: Maybe,
    ce_weight: Maybe, token_weight: Maybe, normalizer: Maybe, low_inputs: Maybe, low_weight: Maybe, ignore_index: int,
    numbers: list[float], reduction: str, softcap: float | None, accum_dtype: torch.dtype | None, token_scaling: bool,
    needs: list[bool], dtype: torch.dtype, workspace_bytes: int | None,
) -> list[torch.Tensor]:  # fmt: skip
    """The gradients, recomputed for d_loss (T,)."""
    results = run(
        hidden, weight, target, bias, ce_weight, token_weight, normalizer, low_inputs, low_weight, ignore_index,
        numbers, reduction, softcap, accum_dtype, token_scaling, [False] * 4, needs, dtype, workspace_bytes, d_loss,
    )  # fmt: skip
    return [filled(r, hidden) for r in results[5:]]


@backward_op.register_fake
def _(d_loss, hidden, weight, target, bias, *options):
    needs, low = options[-3], options[3:5]
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) if n else hidden.new_empty(0)
        for t, n in zip((hidden, weight, bias, *low), needs)
    ]


FIELDS = ("ignore_index", "numbers", "reduction", "softcap", "accum_dtype", "token_scaling", "asked", "needs", "dtype",
          "workspace_bytes")  # fmt: skip


def _setup(ctx, inputs, output):
    ctx.constants = dict(zip(FIELDS, inputs[9:]))
    ctx.needs = ctx.constants["needs"]
    ctx.early = is_early(ctx.constants["reduction"], ctx.constants["dtype"])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(output[5:] if ctx.early else inputs[:9]))


def _backward(ctx, grads):
    d_loss = grads[0]
    if d_loss is None:
        return (None,) * 19
    if ctx.early:
        made = [g * d_loss.to(wide(g.dtype)) for g in ctx.saved_tensors]
        made = [m.to(g.dtype) for m, g in zip(made, ctx.saved_tensors)]
    else:
        constants = [v for k, v in ctx.constants.items() if k != "asked"]
        hidden, weight, target, *rest = ctx.saved_tensors
        tokens = d_loss.expand(target.shape[0]).contiguous()
        made = backward_op(tokens, hidden, weight, target, *rest, *constants)
    d_hidden, d_weight, d_bias, *d_low = (m if n else None for m, n in zip(made, ctx.needs))
    return d_hidden, d_weight, None, d_bias, None, None, None, *d_low, *[None] * 10


forward_op.register_autograd(_backward, setup_context=_setup)
