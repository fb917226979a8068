"""Cross entropy of a student's logits and their total variation distance from a teacher's, in one pass.

    q = softmax(x);  p = softmax(y);  ce = -log q_target;  tvd = sum(|q - p|) / 2;  both averages over n rows that count
    dx = dce * (q - [j = target]) / n + dtvd * q * (s - sigma) / (2 n)       s = sign(q - p), sigma = sum(s * q)

Shapes    x, y: (T, V); target: (T,) integers, whose ignore_index rows do not count; lse, sigma: (T,).
Numerics  fp32 (fp64 for fp64 logits), one cast at the store. The teacher takes no gradient.
Memory    keeps both logits.
"""

from __future__ import annotations

import torch

from liger_kernel.ops.core import Case, Contract, Kernels, kernels, outputs, upcast, wide
from liger_kernel.ops.row_loss import RowLoss, check_target, inverse

NAME = "fused_ce_tvd"

# Reference


def reference(x, teacher_logits, target, ignore_index=-100):
    """The same mathematics in plain torch, differentiable: the oracle of the tests."""
    live = target != ignore_index
    log_q, p = upcast(x).log_softmax(-1), upcast(teacher_logits).softmax(-1)
    ce = -log_q.gather(1, target.where(live, 0)[:, None]).squeeze(1)
    tvd = (log_q.exp() - p).abs().sum(1) / 2
    n = live.sum().clamp(min=1)
    return tuple((rows.where(live, 0.0).sum() / n).to(wide(x.dtype)) for rows in (ce, tvd))


# Torch pair

_TILE = 1 << 18  # elements of a tile: the few it holds at once stay in the caches of a CPU core


def _tiles(x):
    step = max(1, x.shape[0] if torch.compiler.is_compiling() else _TILE // max(x.shape[1], 1))
    return [(i, min(i + step, x.shape[0])) for i in range(0, x.shape[0], step)]


def _forward(x, y, target, live):
    """(ce, tvd, student_lse, teacher_lse, sigma), each (T,), the first two 0 where not live."""
    found = [torch.zeros(x.shape[0], dtype=wide(x.dtype), device=x.device) for _ in range(5)]
    for i, j in _tiles(x):
        z, z_p = upcast(x[i:j]), upcast(y[i:j])
        lse, lse_p = z.logsumexp(1), z_p.logsumexp(1)
        q = (z - lse[:, None]).exp_()
        gap = q - (z_p - lse_p[:, None]).exp_()
        ce = lse - z.gather(1, target[i:j].where(live[i:j], 0).long()[:, None]).squeeze(1)
        rows = (
            ce.where(live[i:j], 0.0),
            (gap.abs().sum(1) / 2).where(live[i:j], 0.0),
            lse,
            lse_p,
            (gap.sign() * q).sum(1),
        )
        for room, value in zip(found, rows):
            room[i:j] = value
    return found


def _backward(d_ce, d_tvd, x, y, target, live, student_lse, teacher_lse, sigma):
    """d_ce, d_tvd: 0-d, what arrives at each row's ce and tvd -> dx."""
    dx = torch.empty_like(x)
    for i, j in _tiles(x):
        q = (upcast(x[i:j]) - student_lse[i:j, None]).exp_()
        sign = (q - (upcast(y[i:j]) - teacher_lse[i:j, None]).exp_()).sign_()
        slope = q * (d_ce + (d_tvd / 2) * sign.sub_(sigma[i:j, None]))
        at = target[i:j].where(live[i:j], 0).long()[:, None]
        slope.scatter_add_(1, at, -d_ce.to(slope.dtype).expand_as(at))
        dx[i:j] = slope.masked_fill_(~live[i:j, None], 0.0)
    return dx


TORCH = Kernels(_forward, _backward)


# Autograd


def fused_ce_tvd_forward(student_logits, teacher_logits, target, ignore_index):
    """-> (ce, tvd, student_lse, teacher_lse, sigma)."""
    x, y, live = student_logits.contiguous(), teacher_logits.contiguous(), target != ignore_index
    ce, tvd, *kept = kernels(NAME, x).forward(x, y, target.contiguous(), live)
    share = inverse(live.sum(dtype=ce.dtype))
    return ce.sum() * share, tvd.sum() * share, *kept


def fused_ce_tvd_backward(
    grad_ce, grad_tvd, student_logits, teacher_logits, target, student_lse, teacher_lse, sigma, ignore_index
):
    """-> grad_student."""
    x, y, live = student_logits.contiguous(), teacher_logits.contiguous(), target != ignore_index
    share = inverse(live.sum(dtype=student_lse.dtype))
    return kernels(NAME, x).backward(
        grad_ce * share, grad_tvd * share, x, y, target.contiguous(), live, student_lse, teacher_lse, sigma
    )


class LigerFusedCETVDFunction(torch.autograd.Function):
    """apply(student_logits, teacher_logits, target, ignore_index=-100) -> (ce, tvd), both differentiable, fp32."""

    @staticmethod
    def forward(ctx, student_logits, teacher_logits, target, ignore_index=-100):
        check(student_logits, teacher_logits, target, ignore_index)
        ce, tvd, *kept = fused_ce_tvd_forward(student_logits, teacher_logits, target, ignore_index)
        ctx.save_for_backward(student_logits, teacher_logits, target, *kept)
        ctx.ignore_index = ignore_index
        return outputs((ce, tvd))

    @staticmethod
    def backward(ctx, d_ce, d_tvd):
        dx = fused_ce_tvd_backward(d_ce, d_tvd, *ctx.saved_tensors, ctx.ignore_index)
        return dx, None, None, None


def check(x, y, target, ignore_index) -> None:
    """ValueError for what cannot be honoured, by name."""
    if x.dim() != 2 or x.shape != y.shape or not x.is_floating_point() or not y.is_floating_point():
        found = f"{x.dtype} {tuple(x.shape)} and {y.dtype} {tuple(y.shape)}"
        raise ValueError(f"{NAME}: expected logits of one shape (T, V), got {found}")
    if y.device != x.device:
        raise ValueError(f"{NAME}: the student's logits are on {x.device} and the teacher's on {y.device}")
    check_target(x.shape[0], x.shape[1], target, x.device, RowLoss(ignore_index), NAME)


# Contract


def _case(rows, n_classes, dtype, device, ignored=0.3, **options):
    x, y = (torch.randn(rows, n_classes, dtype=dtype, device=device) * 2 for _ in range(2))
    target = torch.randint(0, n_classes, (rows,), device=device)
    target = target.where(torch.rand(rows, device=device) >= ignored, options.get("ignore_index", -100))
    return Case((x,), {"teacher_logits": y, "target": target, **options})


CONTRACT = Contract(
    call=lambda x, teacher_logits, target, ignore_index=-100: LigerFusedCETVDFunction.apply(
        x, teacher_logits, target, ignore_index
    ),
    reference=reference,
    cases=lambda dtype, device: [
        *(_case(*s, dtype, device) for s in ((9, 41), (1, 1), (5, 3), (0, 8), (2, 40000))),  # the last: the column loop
        _case(7, 33, dtype, device, 1.0), _case(7, 33, dtype, device, ignore_index=5),
    ],
    timed=lambda dtype, device: {"4096x128256": _case(4096, 128256, dtype, device)},
    bytes_moved=lambda x, **options: 5 * x.numel() * x.element_size(),
)  # fmt: skip
