"""The fused heads as torch.library ops, for torch.compile: their chunk loops are never traced.

Optional outputs are empty tensors where they are not asked for: an op has a fixed number of outputs.
"""

# torch 2.6 reads an op's schema from the annotations themselves, which "from __future__ import annotations" makes text
# of, and knows no list[...] nor the Sequence of collections.abc.
from typing import List, Sequence  # noqa: UP035

import torch

from liger_kernel.ops import fused_linear_cross_entropy as room
from liger_kernel.ops import fused_linear_scaled_cross_entropy as logprobs
from liger_kernel.ops import head
from liger_kernel.ops.core import wide
from liger_kernel.ops.row_loss import RECOMPUTED, RowLoss, Stats, is_early

Maybe = torch.Tensor | None
Tensors = List[torch.Tensor]  # noqa: UP006


def on_device(value, like) -> Maybe:
    """A factor of the logits as an op takes it: a tensor, so that another value traces nothing anew; None for 1."""
    if isinstance(value, torch.Tensor):
        return value
    return None if value == 1.0 else torch.zeros((), device=like.device) + value


def or_1(value: Maybe):
    return 1.0 if value is None else value.view(())


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
    scales = on_device(options.logit_scale, hidden), on_device(options.temperature, hidden)
    asked = [return_z_loss, return_token_accuracy, return_predicted_tokens, options.return_entropy]
    loss, *rest = forward_op(
        hidden, weight, target.reshape(-1), bias, ce_weight, options.token_weight, normalizer, low_inputs, low_weight,
        *scales, ignore_index, [lse_square_scale, label_smoothing], reduction, softcap, accum_dtype, use_token_scaling,
        asked, needs, dtype, options.workspace_bytes, None if options.vocab is None else list(options.vocab),
    )[:5]  # fmt: skip
    if reduction == "none":
        loss, rest = loss.view(shape), [rest[0].view(shape) if return_z_loss else None, *rest[1:]]
    z_loss, accuracy, predicted, entropy = (r.detach() if wanted else None for r, wanted in zip(rest, asked))
    entropies = () if entropy is None else (entropy.view(shape),)
    return loss, z_loss, accuracy, None if predicted is None else predicted.view(shape), *entropies


def run(
    hidden, weight, target, bias, ce_weight, token_weight, normalizer, low_inputs, low_weight, scale, temperature,
    ignore_index, numbers, reduction, softcap, accum_dtype, token_scaling, asked, needs, dtype, workspace_bytes, vocab,
    stats=None, d_loss=None,
):  # fmt: skip
    """The four results, the entropy and the five gradients, for d_loss (T,) or for the sum of the losses."""
    z_scale, smoothing = numbers
    low = None if low_inputs is None else head.LowRank(low_inputs, low_weight, tuple(needs[3:]))
    options = room.HeadOptions(
        or_1(scale), or_1(temperature), token_weight, normalizer, workspace_bytes, tuple(needs[:3]), dtype, asked[3],
        low, None if vocab is None else tuple(vocab), stats,
    )  # fmt: skip
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
    token_weight: Maybe, normalizer: Maybe, low_inputs: Maybe, low_weight: Maybe, scale: Maybe, temperature: Maybe,
    ignore_index: int, numbers: Sequence[float], reduction: str, softcap: float | None, accum_dtype: torch.dtype | None,
    token_scaling: bool, asked: Sequence[bool], needs: Sequence[bool], dtype: torch.dtype, workspace_bytes: int | None,
    vocab: Sequence[int] | None,
) -> Tensors:  # fmt: skip
    """-> loss, z_loss, token_accuracy, predicted_tokens, entropy, the five gradients where they are known already, else
    what the backward needs of each row, RECOMPUTED."""
    early = [n and is_early(reduction, dtype) for n in needs]
    stats: list[Stats] = []
    results = run(
        hidden, weight, target, bias, ce_weight, token_weight, normalizer, low_inputs, low_weight, scale, temperature,
        ignore_index, numbers, reduction, softcap, accum_dtype, token_scaling, asked, early, dtype, workspace_bytes,
        vocab, None if early == needs else stats,
    )  # fmt: skip
    kept = [getattr(stats[0], f) if stats else None for f in RECOMPUTED]
    return [filled(r, hidden) for r in (*results, *kept)]


@forward_op.register_fake
def _(hidden, weight, target, bias, ce_weight, token_weight, normalizer, low_inputs, low_weight, scale, temperature,
      ignore_index, numbers, reduction, softcap, accum_dtype, token_scaling, asked, needs, dtype, workspace_bytes,
      vocab):  # fmt: skip
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
        *(None if early == needs else hidden.new_empty(target.shape, dtype=wide(dtype)) for _ in RECOMPUTED),
    ]  # fmt: skip
    return [filled(o, hidden) for o in outputs]


@torch.library.custom_op("liger_kernel::fused_linear_cross_entropy_backward", mutates_args=())
def backward_op(
    d_loss: torch.Tensor, nll: torch.Tensor, top: torch.Tensor, log_sum: torch.Tensor, hidden: torch.Tensor,
    weight: torch.Tensor, target: torch.Tensor, bias: Maybe, ce_weight: Maybe, token_weight: Maybe, normalizer: Maybe,
    low_inputs: Maybe, low_weight: Maybe, scale: Maybe, temperature: Maybe, ignore_index: int, numbers: Sequence[float],
    reduction: str, softcap: float | None, accum_dtype: torch.dtype | None, token_scaling: bool, needs: Sequence[bool],
    dtype: torch.dtype, workspace_bytes: int | None, vocab: Sequence[int] | None,
) -> Tensors:  # fmt: skip
    """The gradients, recomputed for d_loss (T,)."""
    results = run(
        hidden, weight, target, bias, ce_weight, token_weight, normalizer, low_inputs, low_weight, scale, temperature,
        ignore_index, numbers, reduction, softcap, accum_dtype, token_scaling, [False] * 4, needs, dtype,
        workspace_bytes, vocab, [Stats(nll, nll=nll, top=top, log_sum=log_sum)], d_loss,
    )  # fmt: skip
    return [filled(r, hidden) for r in results[5:]]


@backward_op.register_fake
def _(d_loss, nll, top, log_sum, hidden, weight, target, bias, *options):
    needs, low = options[-4], options[3:5]
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) if n else hidden.new_empty(0)
        for t, n in zip((hidden, weight, bias, *low), needs)
    ]


FIELDS = ("ignore_index", "numbers", "reduction", "softcap", "accum_dtype", "token_scaling", "asked", "needs", "dtype",
          "workspace_bytes", "vocab")  # fmt: skip


def _setup(ctx, inputs, output):
    ctx.constants = dict(zip(FIELDS, inputs[11:]))
    ctx.needs = ctx.constants["needs"]
    ctx.early = is_early(ctx.constants["reduction"], ctx.constants["dtype"])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(output[5:10] if ctx.early else (*output[10:], *inputs[:11])))


def _backward(ctx, grads):
    d_loss = grads[0]
    if d_loss is None:
        return (None,) * 22
    if ctx.early:
        made = [g * d_loss.to(wide(g.dtype)) for g in ctx.saved_tensors]
        made = [m.to(g.dtype) for m, g in zip(made, ctx.saved_tensors)]
    else:
        constants = [v for k, v in ctx.constants.items() if k != "asked"]
        saved = ctx.saved_tensors
        made = backward_op(d_loss.expand(saved[0].shape[0]).contiguous(), *saved, *constants)
    d_hidden, d_weight, d_bias, *d_low = (m if n else None for m, n in zip(made, ctx.needs))
    return d_hidden, d_weight, None, d_bias, None, None, None, *d_low, *[None] * 13


forward_op.register_autograd(_backward, setup_context=_setup)


# Per-token outputs


def traced_logprobs(hidden, weight, target, bias, loss, fields, workspace_bytes):
    """(log_prob, lse, entropy, predicted, mean), None for what was not asked; called while Dynamo traces."""
    grown = torch.is_grad_enabled()
    needs = [grown and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    asked = ["entropy" in fields, "predicted" in fields, "mean" in fields]
    log_prob, lse, entropy, predicted, mean, *_ = logprobs_op(
        hidden, weight, target, bias, on_device(loss.scale, hidden), on_device(loss.temperature, hidden),
        loss.ignore_index, loss.softcap, asked, needs, head.product_dtype(hidden), workspace_bytes,
    )  # fmt: skip
    rest = (r.detach() if wanted else None for r, wanted in zip((predicted, mean), asked[1:]))
    return log_prob, lse, entropy if asked[0] else None, *rest


@torch.library.custom_op("liger_kernel::fused_linear_logprobs", mutates_args=())
def logprobs_op(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, bias: Maybe, scale: Maybe,
    temperature: Maybe, ignore_index: int, softcap: float | None, asked: Sequence[bool], needs: Sequence[bool],
    dtype: torch.dtype, workspace_bytes: int | None,
) -> Tensors:  # fmt: skip
    """-> log_prob, lse, entropy, predicted, the mean logit and, for the backward, top and log_sum."""
    fields = "lse", *(f for f, wanted in zip(("entropy", "predicted", "mean"), asked) if wanted)
    loss = RowLoss(ignore_index, softcap=softcap, scale=or_1(scale), temperature=or_1(temperature))
    stats = logprobs.logprobs_forward(hidden, weight, target, bias, loss, fields, dtype, workspace_bytes)
    optional = stats.lse, stats.entropy, stats.predicted, stats.mean, stats.top, stats.log_sum
    return [-stats.loss, *(filled(o, hidden) for o in optional)]


@logprobs_op.register_fake
def _(hidden, weight, target, bias, scale, temperature, ignore_index, softcap, asked, needs, dtype, workspace_bytes):
    outputs = [hidden.new_empty(target.shape, dtype=wide(dtype)) for _ in range(2 + asked[0])]
    outputs += [hidden.new_empty(0)] * (not asked[0])
    outputs.append(target.new_empty(target.shape, dtype=torch.int64) if asked[1] else hidden.new_empty(0))
    outputs.append(hidden.new_empty(target.shape, dtype=wide(dtype)) if asked[2] else hidden.new_empty(0))
    return [*outputs, *(hidden.new_empty(target.shape, dtype=wide(dtype)) for _ in range(2))]


@torch.library.custom_op("liger_kernel::fused_linear_logprobs_backward", mutates_args=())
def logprobs_backward_op(
    d_log_prob: Maybe, d_lse: Maybe, d_entropy: Maybe, log_prob: torch.Tensor, top: torch.Tensor,
    log_sum: torch.Tensor, entropy: Maybe, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor,
    bias: Maybe, scale: Maybe, temperature: Maybe, ignore_index: int, softcap: float | None, needs: Sequence[bool],
    dtype: torch.dtype, workspace_bytes: int | None,
) -> Tensors:  # fmt: skip
    """The gradients of (hidden, weight, bias)."""
    nll = -log_prob
    made = logprobs.logprobs_backward(
        (d_log_prob, d_lse, d_entropy), hidden, weight, target, bias,
        Stats(nll, nll=nll, top=top, log_sum=log_sum, entropy=entropy),
        RowLoss(ignore_index, softcap=softcap, scale=or_1(scale), temperature=or_1(temperature)), tuple(needs), dtype,
        workspace_bytes,
    )  # fmt: skip
    return [filled(m, hidden) for m in made]


@logprobs_backward_op.register_fake
def _(d_log_prob, d_lse, d_entropy, log_prob, top, log_sum, entropy, hidden, weight, target, bias, *options):
    needs = options[4]
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) if n else hidden.new_empty(0)
        for t, n in zip((hidden, weight, bias), needs)
    ]


def _logprobs_setup(ctx, inputs, output):
    ctx.constants, ctx.asked, ctx.needs = (*inputs[6:8], *inputs[9:]), inputs[8], inputs[9]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], *output[5:], output[2] if ctx.asked[0] else None, *inputs[:6])


def _logprobs_backward(ctx, grads):
    d_log_prob, d_lse, d_entropy = grads[0], grads[1], grads[2] if ctx.asked[0] else None
    made = logprobs_backward_op(d_log_prob, d_lse, d_entropy, *ctx.saved_tensors, *ctx.constants)
    d_hidden, d_weight, d_bias = (m if n else None for m, n in zip(made, ctx.needs))
    return d_hidden, d_weight, None, d_bias, *[None] * 8


logprobs_op.register_autograd(_logprobs_backward, setup_context=_logprobs_setup)
