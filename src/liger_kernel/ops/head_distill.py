"""Divergence of a student's head from a teacher's, both hidden x weight in row chunks: no logits exist whole.

    for each chunk of rows:  x = h W^T + b of the student;  y = h' W'^T + b' of the teacher;  loss and dx over x
                             dh = dx W;  dW += dx^T h;  db += sum of dx

Shapes    hidden: (T, H), (T, H'); weight: (V, H), (V, H'); bias: (V,).
Numerics  as liger_kernel.ops.head. The teacher takes no gradient.
Ignored   rows cost no product where the host knows them, which is on a CPU.
Memory    two chunks of logits, dh, dW.      Flops    2 T (H + H') V, and 4 T H V with both gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from liger_kernel.ops import head
from liger_kernel.ops.core import wide
from liger_kernel.ops.head_chunks import chunk_rows, empty_chunk, project
from liger_kernel.ops.live_rows import counts_for_free
from liger_kernel.ops.weight_sum import WeightSum


@dataclass(frozen=True)
class Linear:
    """hidden (T, H) x weight (V, H)^T + bias (V,)."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None = None

    def to(self, dtype: torch.dtype) -> Linear:
        bias = None if self.bias is None else self.bias.to(dtype)
        return Linear(self.hidden.to(dtype).contiguous(), self.weight.to(dtype).contiguous(), bias)

    def project(self, i: int, j: int, out: torch.Tensor) -> torch.Tensor:
        project(self.hidden[i:j], self.weight, self.bias, out)
        return out


@dataclass(frozen=True)
class Whole:
    """A teacher whose rows (T, V) are given as they are."""

    hidden: torch.Tensor

    def to(self, dtype: torch.dtype) -> Whole:
        return self

    def project(self, i: int, j: int, out: torch.Tensor | None) -> torch.Tensor:
        return self.hidden[i:j]


# (x, y, slice of the rows, whether dx is wanted over x) -> sums of losses (k,)
Rows = Callable[[torch.Tensor, torch.Tensor, object, bool], torch.Tensor]


@torch.no_grad()
def run(
    student: Linear,
    teacher: Linear | Whole,
    live: torch.Tensor | None,
    rows: Rows,
    n_losses: int,
    needs=(False, False, False),
    dtype: torch.dtype | None = None,
    accum_dtype: torch.dtype | None = None,
    workspace_bytes: int | None = None,
    share: int = 1,
):
    """((n_losses,) sums over the live rows, gradients of the student's hidden, weight and bias).

    rows must leave 0 in the sums and in dx where live is False. share: chunks are so many times smaller.
    """
    dtype = dtype or head.product_dtype(student.hidden)
    given, device, n_rows = student, student.hidden.device, student.hidden.shape[0]
    index = torch.arange(n_rows, device=device)
    if live is not None and counts_for_free(student.hidden) and not live.all():
        index = live.nonzero().squeeze(1)
        student = replace(student, hidden=student.hidden[index])
        teacher = replace(teacher, hidden=teacher.hidden[index])
    kept, every = index.shape[0], index.shape[0] == n_rows
    student, teacher = student.to(dtype), teacher.to(dtype)
    (n_classes, width), sum_dtype = student.weight.shape, wide(dtype)
    most = chunk_rows(kept, n_classes, dtype, device, any(needs), workspace_bytes)
    step = max(1, most // share if most < kept or share > 1 else most)
    totals = torch.zeros(n_losses, dtype=sum_dtype, device=device)
    d_hidden = torch.empty_like(student.hidden) if needs[0] else None
    d_weight = d_bias = None
    if needs[1]:
        own = given.weight.dtype if kept <= step else accum_dtype or sum_dtype
        d_weight = WeightSum(n_classes, width, torch.promote_types(own, dtype), given.weight.dtype, device)
    if needs[2]:
        d_bias = torch.zeros(n_classes, dtype=sum_dtype, device=device)
    x_room = empty_chunk(min(step, max(kept, 1)), n_classes, dtype, device)
    y_room = empty_chunk(x_room.shape[0], n_classes, dtype, device) if isinstance(teacher, Linear) else x_room
    for i in range(0, kept, step):
        j = min(i + step, kept)
        x, y = student.project(i, j, x_room[: j - i]), teacher.project(i, j, y_room[: j - i])
        totals += rows(x, y, slice(i, j) if every else index[i:j], any(needs))
        if d_hidden is not None:
            torch.mm(x, student.weight, out=d_hidden[i:j])
        if d_weight is not None:
            d_weight.add(x.t(), student.hidden[i:j])
        if d_bias is not None:
            d_bias += x.sum(0, dtype=sum_dtype)
    del x_room, y_room
    if d_hidden is not None:
        d_hidden = d_hidden.to(given.hidden.dtype)
        if not every:
            d_hidden = torch.zeros_like(given.hidden).index_copy_(0, index, d_hidden)
    return (
        totals,
        d_hidden,
        None if d_weight is None else d_weight.finish(),
        None if d_bias is None or given.bias is None else d_bias.to(given.bias.dtype),
    )
