"""Kullback-Leibler divergence of torch.nn.KLDivLoss: x are log-probabilities, t probabilities or their logs.

    each = t * (log(max(t, eps)) - x)                 log_target: exp(t) * (t - x)
    loss = sum(each) / n          n: mean, numel; batchmean, x.shape[0]; sum, 1; none: each as it is
    dx = -t * dy / n                                  log_target: -exp(t) * dy / n
    dt = (log(max(t, eps)) + [t >= eps] - x) * dy / n           log_target: exp(t) * (t - x + 1) * dy / n

Shapes    x, t, dx, dt: any, of one shape; dy: that of the loss.
Numerics  fp32 (fp64 for fp64 x), one cast at the store. A probability of 0 adds 0 and has dt = 0 or finite, whatever x
          is; what x holds for impossible (-inf) and t does not is infinite.
Memory    keeps t, and x where t takes a gradient.
"""

from __future__ import annotations

import torch

from liger_kernel.ops.compat import kldiv_backward_triton, kldiv_forward_triton
from liger_kernel.ops.core import Case, Contract, Kernels, kernels, outputs, upcast, wide
from liger_kernel.ops.row_loss import autocast_dtype

__all__ = ["CONTRACT", "REDUCTIONS", "TORCH", "LigerKLDivLossFunction", "kldiv_backward_triton",
           "kldiv_forward_triton", "liger_kl_div", "reference"]  # fmt: skip

REDUCTIONS = ("batchmean", "mean", "none", "sum")

# Reference


def reference(x, target, reduction="batchmean", log_target=False, eps=1e-10):
    """The same mathematics in plain torch, differentiable: the oracle of the tests."""
    log_q, t = upcast(x), upcast(target)
    each = t.exp() * (t - log_q) if log_target else t * (t.clamp(min=eps).log() - log_q)
    loss = each if reduction == "none" else each.sum() / count(x, reduction)
    return loss.to(torch.promote_types(x.dtype, target.dtype))


def count(x, reduction) -> int:
    """What the sum is divided by; no rows at all have a loss of 0."""
    return max({"mean": x.numel(), "batchmean": x.shape[0]}.get(reduction, 1), 1)


# Torch pair

_TILE = 1 << 18  # elements of a tile: the few it holds at once stay in the caches of a CPU core


def _tiles(n_elements):
    step = max(n_elements, 1) if torch.compiler.is_compiling() else _TILE
    return [(i, min(i + step, n_elements)) for i in range(0, n_elements, step)]


def _log(t, eps):
    return t.clamp(min=eps).log_()


def _forward(x, t, log_target, eps, n, dtype):
    dtype = dtype or wide(x.dtype)
    tiles = _tiles(x.numel())
    loss = torch.empty_like(x, dtype=dtype) if n is None else torch.zeros(len(tiles), dtype=dtype, device=x.device)
    flat_x, flat_t, out = x.view(-1), t.view(-1), loss.view(-1)
    for tile, (i, j) in enumerate(tiles):
        tile_x = upcast(flat_x[i:j])
        tile_t = flat_t[i:j].to(tile_x.dtype)
        p = tile_t.exp() if log_target else tile_t
        each = (tile_t if log_target else _log(tile_t, eps)) - tile_x
        each = each.masked_fill_(p == 0, 0.0).mul_(p)
        if n is None:
            out[i:j] = each
        else:
            out[tile] = each.sum() / n
    return loss


def _backward(dy, x, t, log_target, eps, n, dx_dtype):
    dx = None if dx_dtype is None else torch.empty_like(t, dtype=dx_dtype)
    dt = None if x is None else torch.empty_like(t)
    dtype = wide(t.dtype if dx_dtype is None else dx_dtype)
    flat_t, flat_x = t.view(-1), None if x is None else x.view(-1)
    scale = dy.to(dtype).reshape(-1) / n
    for i, j in _tiles(t.numel()):
        tile_t = flat_t[i:j].to(dtype)
        tile_dy = scale[i:j] if dy.dim() else scale
        p = tile_t.exp() if log_target else tile_t
        if dx is not None:
            dx.view(-1)[i:j] = -p * tile_dy
        if dt is not None:
            tile_x = flat_x[i:j].to(dtype)
            if log_target:
                slope = (tile_t - tile_x).add_(1).masked_fill_(p == 0, 0.0).mul_(p)
            else:
                slope = (_log(tile_t, eps) - tile_x).add_(tile_t >= eps)
            dt.view(-1)[i:j] = slope.mul_(tile_dy)
    return dx, dt


TORCH = Kernels(_forward, _backward)


# Autograd


class LigerKLDivLossFunction(torch.autograd.Function):
    """apply(y_pred, y_true, reduction="batchmean", log_target=False, eps=1e-10) -> loss."""

    @staticmethod
    def forward(ctx, y_pred, y_true, reduction="batchmean", log_target=False, eps=1e-10):
        check(y_pred, y_true, reduction, eps)
        x, t = y_pred.contiguous(), y_true.contiguous()
        dtype = torch.promote_types(x.dtype, t.dtype)
        dtype = wide(dtype) if autocast_dtype(x.device) else dtype
        n = None if reduction == "none" else count(x, reduction)
        loss = kernels("kl_div", x).forward(x, t, log_target, eps, n, dtype if n is None else None)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, t)
        ctx.options = log_target, eps, n or 1, x.dtype if ctx.needs_input_grad[0] else None
        return outputs(loss if n is None else loss.sum().to(dtype))

    @staticmethod
    def backward(ctx, d_loss):
        x, t = ctx.saved_tensors
        dx, dt = kernels("kl_div", d_loss).backward(d_loss.contiguous(), x, t, *ctx.options)
        return dx, dt, None, None, None


# Functional


def liger_kl_div(
    input: torch.Tensor,
    target: torch.Tensor,
    size_average: bool | None = True,
    reduce: bool | None = True,
    reduction: str = "mean",
    log_target: bool = False,
    eps: float = 1e-10,
) -> torch.Tensor:
    """torch.nn.functional.kl_div in one pass: Kullback-Leibler divergence of target from the model's input.

    input: log-probabilities of any shape and float dtype; target: probabilities of the same shape, logs of them with
    log_target=True. reduction: "mean" (over elements), "batchmean" (over input.shape[0]), "sum" or "none". eps: lower
    bound of what the log of a target is taken of. size_average=False or reduce=False, deprecated in torch, override
    reduction as they do there; True, the default here, leaves it alone. The loss has the wider dtype of the two (fp32
    under autocast) and no elements at all give 0.0. Both tensors take gradients.
    Raises ValueError for shapes (nothing is broadcast), dtypes, devices or options that do not fit.
    """
    if reduce is False or size_average is False:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    return LigerKLDivLossFunction.apply(input, target, reduction, log_target, eps)


def check(x, target, reduction, eps) -> None:
    """ValueError for what cannot be honoured, by name."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {sorted(REDUCTIONS)}, got {reduction!r}")
    if not eps >= 0.0:
        raise ValueError(f"kl_div: eps must not be negative, got {eps!r}")
    for name, value in (("input", x), ("target", target)):
        if not value.is_floating_point() or not value.dim():
            raise ValueError(f"kl_div: {name} must be a float tensor with a dimension, got {value.dtype} of shape "
                             f"{tuple(value.shape)}")  # fmt: skip
    if target.shape != x.shape:
        raise ValueError(f"kl_div: target of shape {tuple(target.shape)}, expected {tuple(x.shape)} as the input's")
    if target.device != x.device:
        raise ValueError(f"kl_div: the input is on {x.device} and the target on {target.device}")


# Contract


def _case(shape, dtype, device, taught=False, **options):
    x = torch.randn(shape, dtype=dtype, device=device).log_softmax(-1)
    target = torch.randn(shape, dtype=dtype, device=device).mul_(2).log_softmax(-1)
    target = target if options.get("log_target") else target.exp()
    return Case((x, target), options) if taught else Case((x,), {"target": target, **options})


def _cases(dtype, device):
    shapes = ((9, 41), (2, 3, 5), (1, 1), (0, 8), (3, 40000))  # the last needs the column loop
    both = [
        _case(shape, dtype, device, taught=shape[0] != 9, reduction=reduction, log_target=log_target)
        for shape in shapes
        for reduction in REDUCTIONS
        for log_target in (False, True)
    ]
    return [*both[8:16], *both, _case((5, 7), dtype, device, eps=0.1), _case((7,), dtype, device)]


def _timed(dtype, device):
    return {f"{rows}x{cols}": _case((rows, cols), dtype, device) for rows, cols in ((4096, 128256), (8192, 32000))}


def _call(x, target, reduction="batchmean", log_target=False, eps=1e-10):
    return LigerKLDivLossFunction.apply(x, target, reduction, log_target, eps)


CONTRACT = Contract(
    call=_call,
    reference=reference,
    cases=_cases,
    timed=_timed,
    bytes_moved=lambda x, target, **options: 4 * x.numel() * x.element_size(),
)
