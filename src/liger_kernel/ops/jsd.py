"""Generalised Jensen-Shannon divergence of a student Q from a teacher P, both given as log-probabilities.

    M = beta * P + (1 - beta) * Q
    JSD = beta * sum(P * (log P - log M)) + (1 - beta) * sum(Q * (log Q - log M))       0 < beta < 1
    beta = 0: sum(P * (log P - log Q)), forward KL        beta = 1: sum(Q * (log Q - log P)), reverse KL
    dlog Q = (1 - beta) * Q * (log Q - log M)        beta = 0: -P        beta = 1: Q * (log Q - log P + 1)
    loss = sum over the rows whose label is not ignore_index / their number

Agarwal et al. 2023 (GKD), arXiv:2306.13649.

Shapes    log Q, log P, dlog Q: (T, V); shift_labels: (T,) integers.
Numerics  fp32 (fp64 for fp64 log Q), one cast at the store. A probability of 0 adds 0, its log being -inf, but what
          one side holds for impossible and the other does not makes a KL infinite (not a JSD).
Memory    the gradient, formed in the forward; in fp16 nothing but the inputs, which are read again.
"""

from __future__ import annotations

import math

import torch

from liger_kernel.ops.compat import jsd_backward, jsd_forward
from liger_kernel.ops.core import Case, Contract, Kernels, kernels, outputs, upcast, wide
from liger_kernel.ops.row_loss import TORCH as ROWS
from liger_kernel.ops.row_loss import GradAware, autocast_dtype, inverse, is_early, taken

__all__ = ["CONTRACT", "TORCH", "LigerJSDFunction", "jsd_backward", "jsd_forward", "liger_jsd", "reference"]

# Reference


def reference(x, target, shift_labels=None, beta=0.5, ignore_index=-100):
    """The same mathematics in plain torch, differentiable: the oracle of the tests."""
    log_q, log_p = upcast(x), upcast(target).detach()
    if beta == 0:
        rows = (log_p.exp() * (log_p - log_q)).sum(-1)
    elif beta == 1:
        rows = (log_q.exp() * (log_q - log_p)).sum(-1)
    else:
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
        to_p, to_q = ((log.exp() * (log - log_m)).sum(-1) for log in (log_p, log_q))
        rows = beta * to_p + (1 - beta) * to_q
    live = torch.ones_like(rows, dtype=torch.bool) if shift_labels is None else shift_labels != ignore_index
    return (rows.where(live, 0.0).sum() / live.sum().clamp(min=1)).to(x.dtype)


# Torch pair

_TILE = 1 << 18  # elements of a tile: the few it holds at once stay in the caches of a CPU core


def _forward(x, target, live, scale, beta, wants_dx):
    n_rows = x.shape[0]
    step = n_rows if torch.compiler.is_compiling() else _TILE // max(x.shape[1], 1)
    step = max(step, 1)
    scale = 1.0 / max(n_rows, 1) if scale is None else scale
    loss = torch.zeros(n_rows, dtype=wide(x.dtype), device=x.device)
    dx = torch.empty_like(x) if wants_dx else None
    for i in range(0, n_rows, step):
        j = min(i + step, n_rows)
        rows, slope = _rows(upcast(x[i:j]), target[i:j].to(loss.dtype), beta)
        if live is not None:
            rows, slope = rows.where(live[i:j], 0.0), slope.masked_fill_(~live[i:j, None], 0.0)
        loss[i:j] = rows * scale
        if dx is not None:
            dx[i:j] = slope.mul_(scale)
    return loss, dx


def _rows(log_q, log_p, beta):
    """(divergence of each row, its gradient)."""
    if beta == 0:
        p = log_p.exp()
        return _times(log_p - log_q, p).sum(1), p.neg_()
    q = log_q.exp()
    if beta == 1:
        to_q = _times(log_q - log_p, q)
        return to_q.sum(1), to_q.add_(q)
    p = log_p.exp()
    log_m = torch.lerp(q, p, beta).log_()
    to_p, to_q = _times(log_p - log_m, p), _times(log_q - log_m, q)
    return beta * to_p.sum(1) + (1 - beta) * to_q.sum(1), to_q.mul_(1 - beta)


def _times(log_ratio, p):
    """log_ratio * p, written over log_ratio: 0 where p is, whatever the ratio."""
    return log_ratio.masked_fill_(p == 0, 0.0).mul_(p)


TORCH = Kernels(_forward, ROWS.backward)


# Autograd


class LigerJSDFunction(GradAware):
    """apply(_input, target, shift_labels=None, beta=0.5, ignore_index=-100, jsd_impl=None, jsd_mode=None) -> loss.

    _input: log Q, target: log P, which takes no gradient. jsd_impl names the implementation for this call (default: the
    process's); jsd_mode has no effect.
    """

    @staticmethod
    def forward(ctx, _input, target, shift_labels=None, beta=0.5, ignore_index=-100, jsd_impl=None, jsd_mode=None):
        check(_input, target, shift_labels, beta, ignore_index)
        x, target = _input.contiguous(), target.contiguous()
        early = ctx.needs_input_grad[0] and is_early("mean", x.dtype)
        live, scale = weigh(x, shift_labels, ignore_index)
        loss, dx = kernels("jsd", x, jsd_impl).forward(x, target, live, scale, beta, early)
        ctx.early, ctx.grads, ctx.impl = early, dx, jsd_impl
        if ctx.needs_input_grad[0] and not early:
            ctx.save_for_backward(x, target, live, scale)
            ctx.beta = beta
        return outputs(loss.sum().to(wide(x.dtype) if autocast_dtype(x.device) else x.dtype))

    @staticmethod
    def backward(ctx, d_loss):
        if ctx.early:
            dx = taken(ctx, "jsd")
            return kernels("jsd", dx, ctx.impl).backward(dx, d_loss), *[None] * 6
        x, target, live, scale = ctx.saved_tensors
        scale = upcast(d_loss) / max(x.shape[0], 1) if scale is None else upcast(d_loss) * scale
        return kernels("jsd", x, ctx.impl).forward(x, target, live, scale, ctx.beta, True)[1], *[None] * 6


def weigh(x, shift_labels, ignore_index):
    """(which rows count, one over their number) on the device; (None, None) where every row does."""
    if shift_labels is None:
        return None, None
    live = shift_labels != ignore_index
    return live, inverse(live.sum(dtype=wide(x.dtype)))


# Functional


def liger_jsd(
    input: torch.Tensor,
    target: torch.Tensor,
    shift_labels: torch.Tensor | None = None,
    beta: float = 0.5,
    ignore_index: int = -100,
) -> torch.Tensor:
    """Generalised Jensen-Shannon divergence of Agarwal et al. 2023, arXiv:2306.13649, averaged over rows.

    input: the student's log-probabilities (T, V), any float dtype; target: the teacher's, of the same shape, which take
    no gradient. beta in [0, 1]: 0 is KL(teacher || student), 1 is KL(student || teacher). shift_labels: (T,) integers;
    rows of ignore_index count neither in the sum nor in the mean, and no row at all gives 0.0. The loss has input's
    dtype (fp32 under autocast). The gradient is formed in the forward, so a second backward raises a RuntimeError
    (except in fp16). Raises ValueError for shapes, dtypes, devices or a beta that do not fit.
    """
    return LigerJSDFunction.apply(input, target, shift_labels, beta, ignore_index)


def check(x, target, shift_labels, beta, ignore_index) -> None:
    """ValueError for what cannot be honoured, by name."""
    check_options(beta, ignore_index)
    for name, value in (("input", x), ("target", target)):
        if value.dim() != 2 or not value.is_floating_point():
            raise ValueError(
                f"jsd: {name} must be float log-probabilities of shape (T, V), got {value.dtype} of shape "
                f"{tuple(value.shape)}"
            )
    if target.shape != x.shape:
        raise ValueError(f"jsd: target of shape {tuple(target.shape)}, expected {tuple(x.shape)} as the input's")
    if target.device != x.device:
        raise ValueError(f"jsd: the input is on {x.device} and the target on {target.device}")
    if shift_labels is None:
        return
    if shift_labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"jsd: shift_labels must be int64 or int32, got {shift_labels.dtype}")
    if shift_labels.shape != x.shape[:1]:
        raise ValueError(f"jsd: shift_labels of shape {tuple(shift_labels.shape)}, expected ({x.shape[0]},)")
    if shift_labels.device != x.device:
        raise ValueError(f"jsd: the input is on {x.device} and shift_labels on {shift_labels.device}")


def check_options(beta, ignore_index) -> None:
    """ValueError for what no call could honour."""
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"jsd: beta must be in [0, 1], got {beta!r}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise ValueError(f"jsd: ignore_index must be an int, got {ignore_index!r}")


# Contract


def _case(rows, n_classes, dtype, device, ignored=None, **options):
    x, target = (torch.randn(rows, n_classes, dtype=dtype, device=device).mul_(3).log_softmax(-1) for _ in range(2))
    if ignored is None:
        return Case((x, target), options)
    labels = torch.randint(0, max(n_classes, 1), (rows,), device=device)
    labels = labels.where(torch.rand(rows, device=device) >= ignored, options.get("ignore_index", -100))
    return Case((x, target, labels), options)


def _cases(dtype, device):
    shapes = ((9, 41), (1, 1), (5, 3), (0, 8), (3, 40000))  # the last needs the column loop
    plain = [_case(*shape, dtype, device, beta=beta) for shape in shapes for beta in (0.5, 0.0, 1.0, 0.1)]
    some = [_case(*shape, dtype, device, 0.4, beta=beta) for shape in shapes for beta in (0.3, 0.0, 1.0)]
    rest = [_case(7, 33, dtype, device, 1.0), _case(7, 33, dtype, device, 0.5, ignore_index=5)]
    return [plain[0], some[0], plain[1], plain[2], some[1], some[2], *plain[3:], *some[3:], *rest]


def _timed(dtype, device):
    return {f"{rows}x{cols}": _case(rows, cols, dtype, device) for rows, cols in ((4096, 128256), (8192, 32000))}


def _call(x, target, shift_labels=None, beta=0.5, ignore_index=-100):
    return LigerJSDFunction.apply(x, target, shift_labels, beta, ignore_index)


CONTRACT = Contract(
    call=_call,
    reference=reference,
    cases=_cases,
    timed=_timed,
    bytes_moved=lambda x, *args, **options: 3 * x.numel() * x.element_size(),
)
