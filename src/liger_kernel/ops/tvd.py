"""Total variation distance of a student's probabilities P from a teacher's Q.

    each = |p - q| / 2        dp = sign(p - q) / 2 * dy / n
    loss = sum(each) / n      n: batchmean, the rows that count; mean, their elements; sum, 1; none: each as it is

Shapes    P, Q, dP: (T, V); shift_labels: (T,) integers, whose ignore_index rows do not count.
Numerics  fp32 (fp64 for fp64 P), one cast at the store; dp = 0 where p = q. Q takes no gradient.
Memory    keeps P and Q.
"""

from __future__ import annotations

import torch

from liger_kernel.ops.compat import tv_distance_forward_triton, tvd_backward_triton  # noqa: F401  upstream's helpers
from liger_kernel.ops.core import Case, Contract, Kernels, kernels, outputs, upcast, wide

REDUCTIONS = ("batchmean", "mean", "none", "sum")

# Reference


def reference(p, q, shift_labels=None, reduction="batchmean", ignore_index=-100):
    """The same mathematics in plain torch, differentiable: the oracle of the tests."""
    each = (upcast(p) - upcast(q)).abs() / 2
    live = torch.ones_like(p[:, 0] if p.shape[1] else p.sum(1), dtype=torch.bool)
    live = live if shift_labels is None else shift_labels != ignore_index
    each = each * live[:, None]
    if reduction == "none":
        return each.to(p.dtype)
    rows = live.sum().clamp(min=1)
    n = {"sum": 1, "batchmean": rows, "mean": rows * max(p.shape[1], 1)}[reduction]
    return (each.sum() / n).to(p.dtype)


# Torch pair

_TILE = 1 << 18  # elements of a tile: the few it holds at once stay in the caches of a CPU core


def _tiles(x):
    step = max(1, x.shape[0] if torch.compiler.is_compiling() else _TILE // max(x.shape[1], 1))
    return [(i, min(i + step, x.shape[0])) for i in range(0, x.shape[0], step)]


def _forward(p, q, live, dtype):
    """Each half distance in dtype, or where dtype is None their sum in each row; 0 where not live."""
    out = torch.empty_like(p, dtype=dtype) if dtype else torch.zeros(p.shape[0], dtype=wide(p.dtype), device=p.device)
    for i, j in _tiles(p):
        each = (upcast(p[i:j]) - upcast(q[i:j])).abs_().mul_(0.5)
        if live is not None:
            each.masked_fill_(~live[i:j, None], 0.0)
        out[i:j] = each if dtype else each.sum(1)
    return out


def _backward(dy, p, q, live):
    dp = torch.empty_like(p)
    for i, j in _tiles(p):
        slope = (upcast(p[i:j]) - upcast(q[i:j])).sign_().mul_(0.5)
        slope.mul_(dy[i:j].to(slope.dtype) if dy.dim() else dy.to(slope.dtype))
        if live is not None:
            slope.masked_fill_(~live[i:j, None], 0.0)
        dp[i:j] = slope
    return dp


TORCH = Kernels(_forward, _backward)


# Autograd


class LigerTVDLossFunction(torch.autograd.Function):
    """apply(p, q, shift_labels=None, reduction="batchmean", ignore_index=-100) -> loss; q takes no gradient."""

    @staticmethod
    def forward(ctx, p, q, shift_labels=None, reduction="batchmean", ignore_index=-100):
        check(p, q, shift_labels, reduction)
        p, q = p.contiguous(), q.contiguous()
        live = None if shift_labels is None else shift_labels != ignore_index
        out = kernels("tvd", p).forward(p, q, live, p.dtype if reduction == "none" else None)
        rows = p.new_full((), max(p.shape[0], 1), dtype=wide(p.dtype)) if live is None else live.sum().clamp(min=1)
        n = {"sum": 1, "batchmean": rows, "mean": rows * max(p.shape[1], 1), "none": 1}[reduction]
        ctx.save_for_backward(p, q, live, n if isinstance(n, torch.Tensor) else None)
        return outputs(out if reduction == "none" else (out.sum() / n).to(p.dtype))

    @staticmethod
    def backward(ctx, d_loss):
        p, q, live, n = ctx.saved_tensors
        dy = d_loss.contiguous() if n is None else upcast(d_loss) / n
        return kernels("tvd", p).backward(dy, p, q, live), None, None, None, None


# Functional


def liger_tvd(
    input: torch.Tensor,
    target: torch.Tensor,
    shift_labels: torch.Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> torch.Tensor:
    """Total variation distance, half the sum of |input - target|, of probabilities (T, V).

    input takes a gradient, target none; any float dtypes. reduction: "batchmean" (over the rows that count), "mean"
    (over their elements), "sum", or "none" for each half distance (T, V). shift_labels: (T,) integers; rows of
    ignore_index count neither in the sum nor in the mean. The loss has input's dtype.
    Raises ValueError for shapes, dtypes, devices or options that do not fit.
    """
    return LigerTVDLossFunction.apply(input, target, shift_labels, reduction, ignore_index)


def check(p, q, shift_labels, reduction) -> None:
    """ValueError for what cannot be honoured, by name."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {sorted(REDUCTIONS)}, got {reduction!r}")
    if p.dim() != 2 or p.shape != q.shape or not p.is_floating_point() or not q.is_floating_point():
        raise ValueError(
            f"tvd: expected two float (T, V), got {p.dtype} {tuple(p.shape)} and {q.dtype} {tuple(q.shape)}"
        )
    if shift_labels is not None and shift_labels.shape != p.shape[:1]:
        raise ValueError(f"tvd: shift_labels of shape {tuple(shift_labels.shape)}, expected ({p.shape[0]},)")
    for name, tensor in (("target", q), ("shift_labels", shift_labels)):
        if tensor is not None and tensor.device != p.device:
            raise ValueError(f"tvd: the input is on {p.device} and {name} on {tensor.device}")


# Contract


def _case(rows, n_classes, dtype, device, ignored=None, **options):
    p, q = (torch.randn(rows, n_classes, device=device).mul_(2).softmax(-1).to(dtype) for _ in range(2))
    if ignored is not None:
        options["shift_labels"] = torch.where(torch.rand(rows, device=device) < ignored, -100, 1)
    return Case((p,), {"q": q, **options})


def _cases(dtype, device):
    shapes = ((9, 41), (1, 1), (5, 3), (0, 8))
    cases = [
        _case(*s, dtype, device, ignored, reduction=r) for s in shapes for r in REDUCTIONS for ignored in (None, 0.4)
    ]
    return [*cases, _case(2, 40000, dtype, device, reduction="none"), _case(2, 40000, dtype, device)]  # the column loop


CONTRACT = Contract(
    call=lambda p, q, shift_labels=None, reduction="batchmean", ignore_index=-100: LigerTVDLossFunction.apply(
        p, q, shift_labels, reduction, ignore_index
    ),
    reference=reference,
    cases=_cases,
    timed=lambda dtype, device: {"4096x128256": _case(4096, 128256, dtype, device)},
    bytes_moved=lambda p, **options: 5 * p.numel() * p.element_size(),
)
