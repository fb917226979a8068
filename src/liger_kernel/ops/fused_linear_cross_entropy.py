"""Linear projection and cross entropy in one op: the loss of a language model's head without its logits.

    loss = cross_entropy(hidden W^T + b, target)        options and mathematics: liger_kernel.ops.cross_entropy

Shapes    hidden: (..., H); weight: (V, H); bias: (V,); target: (...) integers; the loss: 0-d, or like target.
Numerics  see liger_kernel.ops.head; the loss is fp32 (fp64 for fp64 hidden).
Memory    mean and sum: dhidden and dweight, formed in the forward (6 T H V flops). none, and fp16: nothing but the
          inputs and three numbers a row; the backward computes the logits again (8 T H V), see head_slabs.
Needs     all tensors on one device.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from liger_kernel.backends import device_of
from liger_kernel.ops import cross_entropy, head, head_chunks
from liger_kernel.ops.core import Case, Contract, Kernels, kernels
from liger_kernel.ops.cross_entropy import CrossEntropyOutput
from liger_kernel.ops.row_loss import (
    RECOMPUTED,
    RECOMPUTES,
    REDUCTIONS,
    GradAware,
    RowLoss,
    Stats,
    check_class_weight,
    check_target,
    finish,
    is_early,
    logits_of,
    prepare,
    taken,
    wanted,
)
from liger_kernel.ops.sharded import is_dtensor

NAME = "fused_linear_cross_entropy"
_CHUNK_MEM_CONST = 1
SMALL: int | None = None  # in place of the device's small_head


@dataclass(frozen=True)
class HeadOptions:
    """What goes beyond liger-kernel's interface; see liger_fused_linear_cross_entropy."""

    logit_scale: float | torch.Tensor = 1.0
    temperature: float | torch.Tensor = 1.0
    token_weight: torch.Tensor | None = None
    normalizer: float | torch.Tensor | None = None
    workspace_bytes: int | None = None
    needs: tuple[bool, bool, bool] | None = None  # which of hidden, weight and bias take a gradient; None: all
    dtype: torch.dtype | None = None  # of the products; None: head.product_dtype
    return_entropy: bool = False
    low_rank: head.LowRank | None = None
    vocab: tuple[int, int] | None = None  # the rows of the weights and bias that are the classes
    # The rows' Stats: an empty list receives them, and given back with token_grad_output they save their computation.
    stats: list | None = None


DEFAULT = HeadOptions()


# Reference


def reference(x, weight, bias=None, target=None, token_weight=None, low_rank=None, **options):
    """The same mathematics in plain torch, differentiable: the oracle of the tests."""
    for dropped in ("accum_dtype", "workspace_bytes"):
        options.pop(dropped, None)
    if (part := options.pop("vocab_slice", None)) is not None:
        weight, bias = weight[slice(*part)], None if bias is None else bias[slice(*part)]
    if "logit_scale" in options:
        options["scale"] = options.pop("logit_scale")
    options["token_scaling"] = options.pop("use_token_scaling", False)
    logits = torch.nn.functional.linear(x, weight, bias)
    if low_rank is not None:
        low_rank = low_rank[0], low_rank[1] if part is None else low_rank[1][slice(*part)]
        logits = logits + torch.nn.functional.linear(*low_rank)
    out_dtype = torch.promote_types(x.dtype, torch.float32)
    return cross_entropy.reference(
        logits, target, options.pop("ce_weight", None), token_weight=token_weight, out_dtype=out_dtype, **options
    )


# The pair: one engine for every device, whose GEMMs are torch's and whose row kernel is cross_entropy's


TORCH = Kernels(head.run, head.scaled)


# Autograd


def fused_linear_cross_entropy_forward(
    _input, weight, target, ce_weight=None, bias=None, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0,
    reduction="mean", softcap=None, return_z_loss=False, accum_dtype=None, use_token_scaling=False,
    return_token_accuracy=False, return_predicted_tokens=False, ce_impl=None, ce_mode=None, token_grad_output=None,
    compute_gradients=None, weight_requires_grad=None, chunk_mem_const=_CHUNK_MEM_CONST, options=DEFAULT,
):  # fmt: skip
    """-> (loss, z_loss, token_accuracy, predicted_tokens, grad_input, grad_weight, grad_bias), None for what is not
    asked, then what options asks for: the two gradients of its low_rank, the entropy.
    _input: (T, H). token_grad_output: (T,) gradient that arrives at each token's loss.

    The gradients are those of the sum of the losses. ce_impl, ce_mode and chunk_mem_const have no effect.
    """
    loss = RowLoss(
        ignore_index, label_smoothing, lse_square_scale, softcap, options.logit_scale, options.temperature,
        use_token_scaling,
    )  # fmt: skip
    if compute_gradients is None:
        compute_gradients = token_grad_output is not None or _input.requires_grad or weight.requires_grad
    needs = options.needs or (True, weight_requires_grad is not False, bias is not None)
    needs = tuple(compute_gradients and n for n in needs)
    low = options.low_rank
    if low is not None:
        low = dataclasses.replace(low, needs=tuple(compute_gradients and n for n in low.needs))
    factor = options.token_weight
    if token_grad_output is not None:
        factor = token_grad_output if factor is None else token_grad_output * factor.to(token_grad_output.dtype)
    with torch.no_grad():
        given = prepare(target, loss, _input, ce_weight, reduction, factor, options.normalizer)
        sizes = dict(dtype=options.dtype, accum_dtype=accum_dtype, workspace_bytes=options.workspace_bytes)
        sizes |= {k: v for k, v in (("low_rank", low), ("vocab", options.vocab)) if v is not None}
        if options.stats and token_grad_output is not None:
            grads = kernels("head_slabs", _input).forward(
                _input, weight, bias, given, loss, stats=options.stats[0], needs=needs, **sizes
            )
            return None, None, None, None, *grads
        fields = wanted(return_z_loss, return_token_accuracy, return_predicted_tokens, options.return_entropy)
        fields += RECOMPUTED * (options.stats is not None)
        stats, *grads = kernels(NAME, _input).forward(
            _input, weight, bias, given, loss, fields=fields, needs=needs, **sizes
        )
        if options.stats is not None:
            options.stats.append(stats)
        results = finish(
            stats, target, ignore_index, reduction, stats.loss.dtype, return_z_loss, return_token_accuracy,
            return_predicted_tokens,
        )  # fmt: skip
    return *results, *grads, *((stats.entropy,) if options.return_entropy else ())


def fused_linear_cross_entropy_backward(grad_output, grad_input, grad_weight, grad_bias, *more):
    """The gradients times the 0-d grad_output, in place; None stays None."""
    grads = grad_input, grad_weight, grad_bias, *more
    present = next((g for g in grads if g is not None), None)
    return grads if present is None else kernels(NAME, present).backward(grads, grad_output)


class LigerFusedLinearCrossEntropyFunction(GradAware):
    """apply(_input, weight, target, bias=None, ce_weight=None, ignore_index=-100, lse_square_scale=0.0,
    label_smoothing=0.0, reduction="mean", softcap=None, return_z_loss=False, accum_dtype=None,
    use_token_scaling=False, return_token_accuracy=False, return_predicted_tokens=False, ce_impl=None, ce_mode=None,
    chunk_mem_const=1, options=HeadOptions(), low_inputs=None, low_weight=None)
    -> (loss, z_loss, token_accuracy, predicted_tokens), then the entropy where options asks for it.
    """

    @staticmethod
    def forward(
        ctx, _input, weight, target, bias=None, ce_weight=None, ignore_index=-100, lse_square_scale=0.0,
        label_smoothing=0.0, reduction="mean", softcap=None, return_z_loss=False, accum_dtype=None,
        use_token_scaling=False, return_token_accuracy=False, return_predicted_tokens=False, ce_impl=None,
        ce_mode=None, chunk_mem_const=_CHUNK_MEM_CONST, options=DEFAULT, low_inputs=None, low_weight=None,
    ):  # fmt: skip
        check(_input, weight, target, bias, ce_weight, reduction, ignore_index, accum_dtype, options)
        if low_inputs is not None:
            head.check_low_rank(low_inputs, low_weight, _input, weight, NAME)
            low_inputs = low_inputs.reshape(-1, low_inputs.shape[-1])
        hidden, labels, options = _input.reshape(-1, _input.shape[-1]), target.reshape(-1), flat(options, target)
        needs = (*ctx.needs_input_grad[:2], bias is not None and ctx.needs_input_grad[3])
        ctx.low_needs = ctx.needs_input_grad[19:]
        dtype = options.dtype or head.product_dtype(hidden)
        ctx.early = is_early(reduction, dtype)
        grown, kept = any(needs) or any(ctx.low_needs), []
        options = dataclasses.replace(
            options, needs=needs, dtype=dtype, stats=kept if grown and not ctx.early else None
        )
        constants = dict(
            ignore_index=ignore_index, lse_square_scale=lse_square_scale, label_smoothing=label_smoothing,
            reduction=reduction, softcap=softcap, accum_dtype=accum_dtype, use_token_scaling=use_token_scaling,
            options=options,
        )  # fmt: skip
        made = fused_linear_cross_entropy_forward(
            hidden, weight, labels, ce_weight, bias, return_z_loss=return_z_loss,
            return_token_accuracy=return_token_accuracy, return_predicted_tokens=return_predicted_tokens,
            compute_gradients=ctx.early and grown, weight_requires_grad=needs[1],
            **_with_low_rank(constants, low_inputs, low_weight, ctx.low_needs),
        )  # fmt: skip
        ctx.shape = _input.shape
        if ctx.early:
            ctx.grads = made[4:-1] if options.return_entropy else made[4:]
        elif grown:
            rows = (getattr(kept[0], field) for field in RECOMPUTED)
            ctx.save_for_backward(hidden, weight, labels, bias, ce_weight, low_inputs, low_weight, *rows)
            constants["options"] = dataclasses.replace(options, return_entropy=False, stats=None)
            ctx.constants = constants
        loss, z_loss, accuracy, predicted = made[:4]
        if reduction == "none":
            loss, z_loss = loss.view(target.shape), None if z_loss is None else z_loss.view(target.shape)
        predicted = None if predicted is None else predicted.view(target.shape)
        entropy = (made[-1].view(target.shape),) if options.return_entropy else ()
        ctx.mark_non_differentiable(*(r for r in (z_loss, accuracy, predicted, *entropy) if r is not None))
        return loss, z_loss, accuracy, predicted, *entropy

    @staticmethod
    def backward(ctx, d_loss, *_):
        if ctx.early:
            formed = taken(ctx, NAME, RECOMPUTES)
            d_input, d_weight, d_bias, *low = fused_linear_cross_entropy_backward(d_loss, *formed)
        else:
            hidden, weight, labels, bias, ce_weight, *low, nll, top, log_sum = ctx.saved_tensors
            tokens = d_loss.reshape(-1).expand(labels.shape[0]).contiguous()
            known = dataclasses.replace(ctx.constants["options"], stats=[Stats(nll, nll=nll, top=top, log_sum=log_sum)])
            d_input, d_weight, d_bias, *low = fused_linear_cross_entropy_forward(
                hidden, weight, labels, ce_weight, bias, token_grad_output=tokens, compute_gradients=True,
                weight_requires_grad=known.needs[1],
                **_with_low_rank(ctx.constants | {"options": known}, *low, ctx.low_needs),
            )[4:]  # fmt: skip
        d_low, d_low_weight = low or (None, None)
        if d_low is not None:
            d_low = d_low.view(*ctx.shape[:-1], -1)
        d_input = None if d_input is None else d_input.view(ctx.shape)
        return d_input, d_weight, None, d_bias, *[None] * 15, d_low, d_low_weight


def _with_low_rank(constants, inputs, weight, needs) -> dict:
    """The constants with a low-rank term in their options; the Function itself keeps tensors apart from those."""
    if inputs is None:
        return constants
    return constants | {
        "options": dataclasses.replace(constants["options"], low_rank=head.LowRank(inputs, weight, needs))
    }


def flat(options, target):
    weight = options.token_weight
    return options if weight is None else dataclasses.replace(options, token_weight=weight.reshape(-1))


# Functional


def liger_fused_linear_cross_entropy(
    input: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    ce_weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    softcap: float | None = None,
    return_z_loss: bool = False,
    accum_dtype: torch.dtype | None = None,
    use_token_scaling: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
    chunk_mem_const: int = _CHUNK_MEM_CONST,
    *,
    logit_scale: float | torch.Tensor = 1.0,
    temperature: float | torch.Tensor = 1.0,
    token_weight: torch.Tensor | None = None,
    normalizer: float | torch.Tensor | None = None,
    workspace_bytes: int | None = None,
    return_entropy: bool = False,
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None,
    vocab_slice: tuple[int, int] | None = None,
) -> torch.Tensor | CrossEntropyOutput:
    """Cross entropy of input (..., H) x weight (V, H)^T + bias (V,) against target (...), logits never kept whole.

    The logits are multiplied by logit_scale, capped by softcap, divided by temperature; the first and the last may be
    tensors of one element, which take no gradient. token_weight (...) and, with
    use_token_scaling, the label's detached probability multiply each token's loss. normalizer, a number or a 0-d
    tensor, divides the sum (in place of the count of tokens that reduction="mean" takes). accum_dtype: that of dW's
    sum over the chunks, default fp32; torch.bfloat16 is the lean mode. workspace_bytes: memory of a chunk of logits
    (default LIGER_KERNEL_WORKSPACE_MB, else chosen for the device). chunk_mem_const has no effect. return_entropy adds
    the entropy (...) of each token's distribution, 0 where it is ignored. low_rank = (u (..., r), B (V, r)) adds
    u B^T to the logits, an adapter's share (LoRA: u = s x A^T; Hu et al. 2021, arXiv:2106.09685), trained with it.
    vocab_slice (a, b): the classes are the rows a ... b - 1 of weight, and target and ce_weight count from a.
    input and weight: any float dtypes; the product is in autocast's dtype, else input's. The loss is fp32. A
    CrossEntropyOutput where a return_* is set; only its loss is differentiable, and once.
    A DTensor input on a mesh of one dimension: see vocab_parallel_loss; a weight split by rows stays split.
    Raises ValueError for shapes, dtypes, devices or options that do not fit and, on a CPU or under
    LIGER_KERNEL_DEBUG=1, for a label outside [0, V); on a GPU such a row's loss and gradient are NaN.
    """
    if is_dtensor(input):
        return _of_dtensors(
            input, weight, target, bias, ce_weight=ce_weight, ignore_index=ignore_index,
            lse_square_scale=lse_square_scale, label_smoothing=label_smoothing, reduction=reduction, softcap=softcap,
            return_z_loss=return_z_loss, accum_dtype=accum_dtype, use_token_scaling=use_token_scaling,
            return_token_accuracy=return_token_accuracy, return_predicted_tokens=return_predicted_tokens,
            logit_scale=logit_scale, temperature=temperature, token_weight=token_weight, normalizer=normalizer,
            workspace_bytes=workspace_bytes, return_entropy=return_entropy, low_rank=low_rank, vocab_slice=vocab_slice,
        )  # fmt: skip
    options = HeadOptions(
        logit_scale, temperature, token_weight, normalizer, workspace_bytes, return_entropy=return_entropy,
        vocab=vocab_slice,
    )  # fmt: skip
    asked = return_z_loss, return_token_accuracy, return_predicted_tokens, return_entropy
    arguments = (
        input, weight, target, bias, ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction, softcap,
        return_z_loss, accum_dtype, use_token_scaling, return_token_accuracy, return_predicted_tokens,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        from liger_kernel.ops.head_compile import traced

        results = traced(*arguments, options, *(low_rank or ()))
    elif _is_small(input, weight, options) and not (lse_square_scale or use_token_scaling or low_rank or any(asked)):
        check(input, weight, target, bias, ce_weight, reduction, ignore_index, accum_dtype, options)
        return _plain(
            input, weight, target, bias, ce_weight, ignore_index, label_smoothing, reduction, softcap, options
        )
    else:
        results = LigerFusedLinearCrossEntropyFunction.apply(
            *arguments, None, None, chunk_mem_const, options, *(low_rank or ())
        )
    return CrossEntropyOutput(*results) if any(asked) else results[0]


def _of_dtensors(input, weight, target, bias, **options):
    from liger_kernel.ops.vocab_parallel_loss import cross_entropy_of_dtensors

    results = cross_entropy_of_dtensors(liger_fused_linear_cross_entropy, input, weight, target, bias, **options)
    return CrossEntropyOutput(*results) if any(v for k, v in options.items() if k.startswith("return_")) else results[0]


def _is_small(input, weight, options) -> bool:
    """Whether plain torch is faster. Not where a budget says otherwise, nor where somebody replaced the helpers."""
    most = device_of(input.device).small_head if SMALL is None else SMALL
    return (
        input.numel() * weight.shape[0] <= most * input.shape[-1]
        and (options.workspace_bytes, options.token_weight) == (None, None)
        and head_chunks.environment_bytes() is None
        and (fused_linear_cross_entropy_forward, fused_linear_cross_entropy_backward) == _OWN
    )


_OWN = fused_linear_cross_entropy_forward, fused_linear_cross_entropy_backward


def _plain(input, weight, target, bias, ce_weight, ignore_index, label_smoothing, reduction, softcap, options):
    """The loss by way of its logits."""
    loss = RowLoss(ignore_index, label_smoothing, 0.0, softcap, options.logit_scale, options.temperature)
    dtype = options.dtype or head.product_dtype(input)
    w, b = head_chunks.classes_of(weight, bias, dtype, options.vocab)
    z = logits_of(torch.nn.functional.linear(input.to(dtype), w, b).flatten(0, -2), loss)
    given = prepare(target.reshape(-1), loss, z, ce_weight, reduction, normalizer=options.normalizer)
    mode = torch.nn._reduction.get_enum("none" if reduction == "none" else "sum")
    total = torch._C._nn.cross_entropy_loss(  # not F.cross_entropy, which may be ours
        z, given.target.long(), given.weight, mode, ignore_index, label_smoothing
    )
    if reduction == "none":
        return total.view(target.shape)
    return total if given.norm is None else total * given.norm[0]


def check(hidden, weight, target, bias, ce_weight, reduction, ignore_index, accum_dtype, options) -> None:
    """ValueError for what cannot be honoured, by name."""
    head.check(hidden, weight, bias, NAME)
    if target.shape != hidden.shape[:-1]:
        raise ValueError(f"{NAME}: target of shape {tuple(target.shape)}, expected {tuple(hidden.shape[:-1])}")
    labels, n_classes = target.reshape(-1), weight.shape[0]
    if options.vocab is not None:
        low, high = options.vocab
        if not 0 <= low < high <= weight.shape[0]:
            raise ValueError(
                f"{NAME}: vocab_slice must be a range of the {weight.shape[0]} rows, got {options.vocab!r}"
            )
        n_classes = high - low
    check_target(labels.shape[0], n_classes, labels, hidden.device, RowLoss(ignore_index), NAME)
    check_class_weight(ce_weight, n_classes, hidden.device, NAME)
    check_options(hidden, target, reduction, accum_dtype, options)


def check_options(hidden, target, reduction, accum_dtype, options) -> None:
    """ValueError for those that have nothing to do with the weight."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {sorted(REDUCTIONS)}, got {reduction!r}")
    if options.normalizer is not None and reduction == "none":
        raise ValueError(f"{NAME}: normalizer goes with reduction 'mean' or 'sum', not with 'none'")
    if isinstance(options.normalizer, torch.Tensor) and options.normalizer.numel() != 1:
        raise ValueError(f"{NAME}: normalizer must have one element, got shape {tuple(options.normalizer.shape)}")
    if options.token_weight is not None and options.token_weight.shape != target.shape:
        raise ValueError(
            f"{NAME}: token_weight of shape {tuple(options.token_weight.shape)}, expected {tuple(target.shape)}"
        )
    if options.token_weight is not None and options.token_weight.device != hidden.device:
        raise ValueError(f"{NAME}: hidden is on {hidden.device} and token_weight on {options.token_weight.device}")
    head.check_scales(options.logit_scale, options.temperature, hidden, NAME)
    if accum_dtype not in (None, torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"{NAME}: accum_dtype must be a float dtype or None, got {accum_dtype!r}")
    if options.workspace_bytes is not None and options.workspace_bytes <= 0:
        raise ValueError(f"{NAME}: workspace_bytes must be positive, got {options.workspace_bytes!r}")


# Contract


def _case(rows, width, n_classes, dtype, device, bias=False, ignored=0.25, rank=0, **options):
    x = torch.randn(rows, width, dtype=dtype, device=device)
    weight = torch.randn(n_classes, width, dtype=dtype, device=device) / max(width, 1) ** 0.5
    target = torch.randint(0, n_classes, (rows,), device=device)
    target = target.where(torch.rand(rows, device=device) >= ignored, -100)
    bias = torch.randn(n_classes, dtype=dtype, device=device) if bias else None
    low = [torch.randn(n, rank, dtype=dtype, device=device) for n in (rows, n_classes)] if rank else []
    return Case((x, weight, bias, *low), {"target": target, **options})


def _cases(dtype, device):
    extras = dict(lse_square_scale=1e-3, label_smoothing=0.1, softcap=8.0, logit_scale=0.5, temperature=0.7,
                  use_token_scaling=True, return_z_loss=True, return_token_accuracy=True)  # fmt: skip
    shapes = ((9, 16, 41), (1, 1, 1), (5, 8, 3), (0, 8, 7), (33, 8, 300))
    # One row to a chunk, and all in one.
    budgets = (1, 1 << 30)
    cases = [
        _case(*shape, dtype, device, reduction=r, bias=bool(more), workspace_bytes=budget, **more)
        for shape in shapes
        for r in REDUCTIONS
        for budget, more in zip(budgets, ({}, extras))
    ]
    more = [_case(7, 4, 33, dtype, device, ignored=1.0, rank=rank) for rank in (0, 2)]
    adapted = [
        _case(9, 16, 41, dtype, device, rank=3, reduction=r, bias=True, workspace_bytes=b)
        for r in REDUCTIONS
        for b in budgets
    ]
    return [*cases, *more, *adapted]


def _timed(dtype, device):
    shapes = ((4096, 4096, 128256), (8192, 4096, 128256), (32768, 4096, 128256), (16384, 2048, 128256),
              (16384, 1024, 151936), (16384, 4096, 32000))  # fmt: skip
    return {"x".join(map(str, s)): _case(*s, dtype, device, ignored=0.0) for s in shapes}


def _call(x, weight, bias=None, *low_rank, target=None, **options):
    result = liger_fused_linear_cross_entropy(x, weight, target, bias, low_rank=low_rank or None, **options)
    if isinstance(result, torch.Tensor):
        return result
    return result.loss, result.z_loss, result.token_accuracy, result.predicted_tokens


def _truth(x, weight, bias=None, *low_rank, **options):
    return reference(x, weight, bias, low_rank=low_rank or None, **options)


CONTRACT = Contract(
    call=_call,
    reference=_truth,
    cases=_cases,
    timed=_timed,
    bytes_moved=lambda x, weight, *args, **options: 2 * (x.numel() + weight.numel()) * x.element_size(),
    flops=lambda x, weight, *args, **options: 6 * x.numel() * weight.shape[0],
)
