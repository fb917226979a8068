"""Cross entropy of rows of logits, with everything a language model's head asks of it.

    z = softcap * tanh(scale * x / softcap) / temperature          (no softcap: z = scale * x / temperature)
    lse = log(sum(exp(z)))        nll = lse - z_y
    ce = (1 - eps) * w_y * nll + eps / V * sum_j w_j * (lse - z_j)           z-loss = c * lse^2
    loss = f * (ce / N + z-loss / T)                N, T by the reduction; f: per-token factor, detached
    dz_j = p_j * (dloss/dlse) - [j = y] * f * (1 - eps) * w_y / N - f * eps / V * w_j / N
    entropy = lse - sum_j p_j * z_j         dz_j = -p_j * (z_j - lse + entropy)

Label smoothing: Szegedy et al. 2016, arXiv:1512.00567. z-loss: de Brebisson & Vincent 2016, arXiv:1604.08859.

Shapes    x, dx: (R, V), rows any distance apart; target: (R,) integers; everything per row: (R,) in fp32.
Numerics  fp32 (fp64 for fp64 x), one cast at the store. p_y - 1 is formed as -(the sum of the others) / sum.
Memory    mean and sum: the gradient, formed in the forward. none, and fp16: nothing but the inputs; x is read again.
Needs     the last dim contiguous.
"""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import dataclass

import torch

from liger_kernel.ops.compat import cross_entropy_backward, cross_entropy_forward
from liger_kernel.ops.core import Case, Contract, kernels, outputs, upcast, wide
from liger_kernel.ops.row_loss import (
    RECOMPUTES,
    REDUCTIONS,
    TORCH,
    GradAware,
    RowLoss,
    autocast_dtype,
    check_class_weight,
    check_target,
    compute,
    finish,
    is_early,
    logits_of,
    prepare,
    rows_of,
    taken,
    token_accuracy,
    wanted,
)  # fmt: skip

__all__ = ["TORCH", "CrossEntropyOutput", "LigerCrossEntropyFunction", "cross_entropy_backward",
           "cross_entropy_forward", "liger_cross_entropy", "reference"]  # fmt: skip


@dataclass
class CrossEntropyOutput:
    """The loss, and what was asked for beside it."""

    loss: torch.Tensor
    z_loss: torch.Tensor | None = None
    token_accuracy: torch.Tensor | None = None
    predicted_tokens: torch.Tensor | None = None
    entropy: torch.Tensor | None = None  # of each token's distribution; from the fused head


# Reference


def reference(
    x, target, weight=None, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0, reduction="mean",
    softcap=None, return_z_loss=False, return_token_accuracy=False, return_predicted_tokens=False, *, scale=1.0,
    temperature=1.0, token_scaling=False, token_weight=None, out_dtype=None,
):  # fmt: skip
    """The same mathematics in plain torch, differentiable: the oracle of the tests. x: (R, V)."""
    z = logits_of(x, RowLoss(softcap=softcap, scale=scale, temperature=temperature))
    live = target != ignore_index
    y = target.where(live, 0)[:, None]
    log_p = z.log_softmax(-1)
    w = z.new_ones(z.shape[1]) if weight is None else weight.to(z.dtype)
    nll = -log_p.gather(1, y).squeeze(1)
    smooth = -(log_p * w).sum(-1) / max(z.shape[1], 1)
    ce = (1 - label_smoothing) * w[y.squeeze(1)] * nll + (label_smoothing * smooth if label_smoothing else 0.0)
    z_loss = lse_square_scale * z.logsumexp(-1).pow(2)
    f = live.to(z.dtype) if token_weight is None else live * token_weight.to(z.dtype)
    if token_scaling:
        f = f * (-nll).exp().detach()
    ce, z_loss = (v.masked_fill(~live, 0.0) * f for v in (ce, z_loss))
    if reduction == "mean":
        ce, z_loss = ce / _or_1((w[y.squeeze(1)] * live).sum()), z_loss / _or_1(live.sum())
    ce = ce + z_loss
    if reduction != "none":
        ce, z_loss = ce.sum(), z_loss.sum()
    out_dtype = out_dtype or x.dtype
    predicted = z.argmax(-1).where(live, -1) if return_token_accuracy or return_predicted_tokens else None
    return (
        ce.to(out_dtype),
        z_loss.detach().to(out_dtype) if return_z_loss else None,
        token_accuracy(predicted, target, ignore_index) if return_token_accuracy else None,
        predicted if return_predicted_tokens else None,
    )


def _or_1(count):
    return torch.where(count == 0, torch.ones_like(count), count)


# Autograd


class LigerCrossEntropyFunction(GradAware):
    """apply(_input, target, weight, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0, reduction="mean",
    softcap=None, return_z_loss=False, return_token_accuracy=False, return_predicted_tokens=False)
    -> (loss, z_loss, token_accuracy, predicted_tokens), None for what was not asked.
    """

    @staticmethod
    def forward(
        ctx, _input, target, weight, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0, reduction="mean",
        softcap=None, return_z_loss=False, return_token_accuracy=False, return_predicted_tokens=False,
    ):  # fmt: skip
        loss = RowLoss(ignore_index, label_smoothing, lse_square_scale, softcap)
        check(_input, target, weight, reduction, loss)
        x = rows_of(_input)
        given = prepare(target, loss, x, weight, reduction)
        early = ctx.needs_input_grad[0] and is_early(reduction, x.dtype)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if early else None
        stats = compute(x, given, loss, wanted(return_z_loss, return_token_accuracy, return_predicted_tokens), dx)
        ctx.early, ctx.grads = early, dx
        if ctx.needs_input_grad[0] and not early:
            ctx.save_for_backward(x, target, weight)
            ctx.loss, ctx.reduction = loss, reduction
        dtype = wide(x.dtype) if autocast_dtype(x.device) else x.dtype
        results = finish(
            stats, target, ignore_index, reduction, dtype, return_z_loss, return_token_accuracy, return_predicted_tokens
        )
        results = (outputs(results[0]), *results[1:])
        if beside := [r for r in results[1:] if r is not None]:  # Dynamo of torch 2.11 takes () to mean every output
            ctx.mark_non_differentiable(*beside)
        return results

    @staticmethod
    def backward(ctx, d_loss, *_):
        if ctx.early:
            dx = taken(ctx, "cross entropy", RECOMPUTES)
            return kernels("cross_entropy", dx).backward(dx, d_loss), *[None] * 10
        x, target, weight = ctx.saved_tensors
        d_loss = upcast(d_loss).expand(x.shape[0]).contiguous()
        given = dataclasses.replace(prepare(target, ctx.loss, x, weight, ctx.reduction), factor=d_loss)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        compute(x, given, ctx.loss, (), dx)
        return dx, *[None] * 10


# Functional


def liger_cross_entropy(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    lse_square_scale: float = 0.0,
    softcap: float | None = None,
    return_z_loss: bool = False,
    return_token_accuracy: bool = False,
    return_predicted_tokens: bool = False,
) -> torch.Tensor | CrossEntropyOutput:
    """torch.nn.functional.cross_entropy, and its options, in one pass over the logits.

    input: (N, V), (V,) or (N, V, d1, ...) of any float dtype; target: the integer labels without the V, or
    probabilities shaped like input, which are left to torch. weight: (V,) class weights. The loss has input's dtype
    (fp32 under autocast); no valid label at all gives 0.0. A CrossEntropyOutput where a return_* is set.
    Raises ValueError for shapes, dtypes, devices or options that do not fit and, on a CPU or under
    LIGER_KERNEL_DEBUG=1, for a label outside [0, V); on a GPU such a row's loss and gradient are NaN.
    """
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    asked = return_z_loss, return_token_accuracy, return_predicted_tokens
    if target.is_floating_point():
        if lse_square_scale or softcap is not None or any(asked):
            raise ValueError("cross_entropy: probabilities as target go with none of z-loss, softcap and return_*")
        mode = torch.nn._reduction.get_enum(reduction)
        loss = torch._C._nn.cross_entropy_loss  # not F.cross_entropy, which may be this very function
        return loss(input, target, weight, mode, ignore_index, label_smoothing)  # type: ignore[arg-type]
    shape = target.shape
    if input.dim() == 1:
        input, target = input[None], target.reshape(-1)
    elif input.dim() > 2:
        input = input.movedim(1, -1)
        if input.shape[:-1] != shape:
            raise ValueError(f"cross_entropy: target of shape {tuple(shape)}, expected {tuple(input.shape[:-1])}")
        input, target = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    loss, z_loss, accuracy, predicted = LigerCrossEntropyFunction.apply(
        input, target, weight, ignore_index, lse_square_scale, label_smoothing, reduction, softcap, *asked
    )
    if reduction == "none":
        loss, z_loss = loss.view(shape), None if z_loss is None else z_loss.view(shape)
    if not any(asked):
        return loss
    return CrossEntropyOutput(loss, z_loss, accuracy, None if predicted is None else predicted.view(shape))


def check(x, target, weight, reduction, loss: RowLoss, op="cross_entropy") -> None:
    """ValueError for what cannot be honoured, by name."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {sorted(REDUCTIONS)}, got {reduction!r}")
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"{op}: expected float logits of shape (R, V), got {x.dtype} of shape {tuple(x.shape)}")
    check_target(x.shape[0], x.shape[1], target, x.device, loss, op)
    check_class_weight(weight, x.shape[1], x.device, op)


def __getattr__(name: str):
    if name == "liger_cross_entropy_kernel":  # other projects import the kernel from here
        return importlib.import_module("liger_kernel.ops.kernels.cross_entropy").liger_cross_entropy_kernel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# Contract


def _case(rows, n_classes, dtype, device, ignored=0.25, **options):
    x = torch.randn(rows, n_classes, dtype=dtype, device=device) * 3
    target = torch.randint(0, max(n_classes, 1), (rows,), device=device)
    target = target.where(torch.rand(rows, device=device) >= ignored, options.get("ignore_index", -100))
    return Case((x, target), options)


def _weighted(case, dtype, device):
    weight = torch.rand(case.args[0].shape[1], dtype=torch.float32, device=device) + 0.5
    return Case(case.args, {**case.kwargs, "weight": weight})


def _cases(dtype, device):
    everything = dict(lse_square_scale=1e-3, label_smoothing=0.1, softcap=8.0, return_z_loss=True,
                      return_token_accuracy=True, return_predicted_tokens=True)  # fmt: skip
    shapes = ((9, 41), (1, 1), (5, 3), (0, 8), (3, 40000))  # the last needs the column loop
    plain = [_case(*shape, dtype, device, reduction=r) for shape in shapes for r in REDUCTIONS]
    rich = [_case(*shape, dtype, device, reduction=r, **everything) for shape in shapes for r in REDUCTIONS]
    weighted = [_weighted(case, dtype, device) for case in (*plain[:6], *rich[:6])]
    return [plain[0], rich[0], weighted[0], weighted[6], plain[2], rich[2], *plain, *rich, *weighted,
            _case(7, 33, dtype, device, ignored=1.0), _case(7, 33, dtype, device, ignore_index=5)]  # fmt: skip


def _timed(dtype, device):
    return {"8192x128256": _case(8192, 128256, dtype, device, ignored=0.0)}


def _call(x, target, weight=None, *args, **options):
    return LigerCrossEntropyFunction.apply(x, target, weight, *(options.get(k, v) for k, v in _DEFAULTS.items()))


_DEFAULTS = dict(ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0, reduction="mean", softcap=None,
                 return_z_loss=False, return_token_accuracy=False, return_predicted_tokens=False)  # fmt: skip

CONTRACT = Contract(
    call=_call,
    reference=reference,
    cases=_cases,
    timed=_timed,
    bytes_moved=lambda x, *args, **options: 2 * x.numel() * x.element_size(),  # the gradient is made in the forward
)
