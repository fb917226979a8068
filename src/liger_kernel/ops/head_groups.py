"""Losses over a language model's head in which a row's gradient needs the log-probabilities of other rows.

    for each group of units (a unit: sequences that need each other, such as a pair):
        logits = h W^T + b;  log p of each row's target                                       2 T H V
        d log p = the loss's own derivative, by autograd on these few numbers
        dlogits = d log p * ([j = y] - softmax) over the logits;  dh, dW, db as in ops.head   4 T H V
    where a unit's logits exceed the budget: log p of all rows, then a backward that recomputes each chunk, 8 T H V

Shapes    hidden: (B, L, H), of any strides; target: (B, L); unit k: the sequences k, k + B / U, ..., U of them.
Numerics  as liger_kernel.ops.head; log p in fp32 (fp64 for fp64 hidden), 0 where the target is ignored.
Memory    a group's logits, dh, dW.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from liger_kernel.ops import head
from liger_kernel.ops.core import kernels, wide
from liger_kernel.ops.head_chunks import MIB, chunk_rows, empty_chunk, environment_bytes, even, pitch, project
from liger_kernel.ops.live_rows import counts_for_free
from liger_kernel.ops.row_loss import FIELDS, RECOMPUTED, Given, RowLoss, Stats, empty_stats, is_early
from liger_kernel.ops.weight_sum import WeightSum

# Bytes of a group's logits at most: on a GPU those of a pair of 2048 tokens over 128k classes in 16 bits.
GROUP = {"cpu": 256 * MIB, "gpu": 1024 * MIB}

# (log_prob (n, U, L), **sides) -> (what n of the N units add to the loss, anything)
Objective = Callable[..., tuple[torch.Tensor, object]]


@dataclass(frozen=True)
class Batch:
    """What a head is run on. hidden (B, L, H) x weight (V, H)^T + bias (V,), then what loss does to the logits."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    target: torch.Tensor  # (B, L)
    loss: RowLoss
    dtype: torch.dtype  # of the products
    per_unit: int = 1

    def units(self, tensor: torch.Tensor) -> torch.Tensor:
        """A view of (B, ...) as (units, sequences of a unit, ...)."""
        return tensor.unflatten(0, (self.per_unit, tensor.shape[0] // self.per_unit)).transpose(0, 1)

    def parameters(self):
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return self.weight.to(self.dtype).contiguous(), bias


@dataclass
class Outcome:
    """What run() found: the loss, what the objective returned beside it, and what the backward needs."""

    loss: torch.Tensor
    aux: object
    log_prob: torch.Tensor  # (units, sequences of a unit, L)
    mean: torch.Tensor | None  # of the logits, likewise
    grads: tuple[torch.Tensor | None, ...] | None = None  # of hidden, weight and bias
    d_log_prob: torch.Tensor | None = None  # (B, L), where those are left to the backward
    stats: Stats | None = None  # of the rows, which it needs then


@torch.no_grad()
def run(
    batch: Batch,
    objective: Objective,
    sides: Mapping[str, torch.Tensor | None],
    needs: tuple[bool, bool, bool] = (False, False, False),
    late: bool = False,
    fields: tuple[str, ...] = (),
    workspace_bytes: int | None = None,
) -> Outcome:
    """The loss and the gradients of (hidden, weight, bias) that `needs` asks for, or what backward() needs for them.

    sides: tensors with an entry per unit, of which the objective gets the same units as of log_prob. late: leave the
    gradients to backward(): where the objective needs all units at once, and where memory counts more than a quarter of
    the time, as no sum of V x H is kept in fp32 then. fields: ("mean",) for the mean logits.
    """
    found = empty_stats(batch.target.numel(), batch.target.device, wide(batch.dtype), fields)
    each = group_units(batch, workspace_bytes)
    grads = d_log_prob = None
    if any(needs) and is_early("mean", batch.dtype) and not late and each > 0:
        grads = _grouped(batch, objective, sides, needs, found, each)
    else:
        found = row_stats(batch, (*fields, *RECOMPUTED) if any(needs) else fields, workspace_bytes)
    log_prob = batch.units(found.loss.neg().view(batch.target.shape))
    mean = None if found.mean is None else batch.units(found.mean.view(batch.target.shape))
    if any(needs) and grads is None:
        loss, aux, d_log_prob = derived(objective, log_prob, sides)
        d_log_prob = d_log_prob.transpose(0, 1).reshape(batch.target.shape)
    else:
        loss, aux = objective(log_prob, **sides)
    return Outcome(loss, aux, log_prob, mean, grads, d_log_prob, found)


def row_stats(batch: Batch, fields: tuple[str, ...] = (), workspace_bytes: int | None = None) -> Stats:
    """The Stats of each row (B L): loss is minus the log-probability. Without gradients."""
    hidden, target = batch.hidden.reshape(-1, batch.hidden.shape[-1]), batch.target.reshape(-1).contiguous()
    return head.run(
        hidden, batch.weight, batch.bias, Given(target), batch.loss, fields, dtype=batch.dtype,
        workspace_bytes=workspace_bytes,
    )[0]  # fmt: skip


def backward(batch: Batch, d_log_prob: torch.Tensor, stats: Stats, needs, workspace_bytes: int | None = None):
    """The gradients of (hidden, weight, bias) for the gradient (B, L) that arrives at each log-probability."""
    hidden = batch.hidden.reshape(-1, batch.hidden.shape[-1])
    given = Given(batch.target.reshape(-1).contiguous(), factor=d_log_prob.reshape(-1).neg())
    d_hidden, *rest = kernels("head_slabs", hidden).forward(
        hidden, batch.weight, batch.bias, given, batch.loss, stats=stats, needs=needs, dtype=batch.dtype,
        workspace_bytes=workspace_bytes,
    )  # fmt: skip
    return None if d_hidden is None else d_hidden.view(batch.hidden.shape), *rest


def group_units(batch: Batch, workspace_bytes: int | None) -> int:
    """Units whose logits fit a group: the same number in each, 0 where one exceeds the budget."""
    n_seqs, length = batch.target.shape
    n_units, rows = n_seqs // batch.per_unit, batch.per_unit * length
    if rows == 1:
        return chunk_rows(n_units, batch.weight.shape[0], batch.dtype, batch.hidden.device, True, workspace_bytes)
    most = budget(batch, workspace_bytes) // max(1, rows * pitch(batch.weight.shape[0]) * batch.dtype.itemsize)
    if most == 0 or n_units <= most:
        return min(most, max(n_units, 1))
    return even(n_units, most, 1)


def budget(batch: Batch, workspace_bytes: int | None = None) -> int:
    """Bytes of a group's logits at most."""
    limit = workspace_bytes if workspace_bytes is not None else environment_bytes()
    return limit if limit is not None else GROUP["cpu" if batch.hidden.device.type == "cpu" else "gpu"]


def _grouped(batch, objective, sides, needs, found, each):
    (w, b), n_classes = batch.parameters(), batch.weight.shape[0]
    hidden, target = batch.units(batch.hidden), batch.units(batch.target)
    found = {k: v if v is None else batch.units(v.view(batch.target.shape)) for k, v in vars(found).items()}
    (n_units, *unit, width), device = hidden.shape, hidden.device
    d_hidden = d_weight = d_bias = None
    if needs[0]:
        d_hidden = torch.zeros(batch.hidden.shape, dtype=batch.hidden.dtype, device=device)
    if needs[1]:
        single = n_units <= each
        sum_dtype = torch.promote_types(batch.weight.dtype if single else wide(batch.dtype), batch.dtype)
        d_weight = WeightSum(n_classes, width, sum_dtype, batch.weight.dtype, device)
    if needs[2]:
        d_bias = torch.zeros(n_classes, dtype=wide(batch.dtype), device=device)
    room = empty_chunk(min(each, n_units) * unit[0] * unit[1], n_classes, batch.dtype, device)
    pair, slabs = kernels("cross_entropy", batch.hidden), kernels("head_slabs", batch.hidden)
    wanted = [f for f in FIELDS[1:] if found[f] is not None]
    for i in range(0, n_units, each):
        j = min(i + each, n_units)
        h, y = hidden[i:j].reshape(-1, width).to(batch.dtype).contiguous(), target[i:j].reshape(-1)
        kept = live_rows(y, batch.loss)
        if kept is not None:
            h, y = h[kept], y[kept]
        logits, stats = room[: h.shape[0]], empty_stats(h.shape[0], device, wide(batch.dtype), (*wanted, *RECOMPUTED))
        project(h, w, b, logits)
        pair.forward(logits, Given(y), batch.loss, stats, None)
        for name in ("loss", *wanted):
            found[name][i:j] = spread(getattr(stats, name), kept, target[i:j])
        part = {name: side if side is None else side[i:j] for name, side in sides.items()}
        d = derived(objective, -found["loss"][i:j], part)[2].reshape(-1)
        given = Given(y, factor=(d if kept is None else d[kept]).neg())
        slabs.backward(logits, given, batch.loss, stats, 0, n_classes)
        if d_hidden is not None:
            batch.units(d_hidden)[i:j] = spread(torch.mm(logits, w), kept, hidden[i:j])
        if d_weight is not None:
            d_weight.add(logits.t(), h)
        if d_bias is not None:
            d_bias += logits.sum(0, dtype=d_bias.dtype)
    del room
    return (
        d_hidden,
        None if d_weight is None else d_weight.finish(),
        None if d_bias is None else d_bias.to(batch.bias.dtype),
    )


def derived(objective, log_prob, sides):
    """(loss, aux, d loss / d log_prob) of an objective."""
    with torch.enable_grad():
        leaf = log_prob.clone().requires_grad_()
        loss, aux = objective(leaf, **sides)
    (d,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), aux, d


def live_rows(target, loss):
    """Indices of the rows that count where the host may ask for them, else None: all."""
    if not counts_for_free(target):
        return None
    live = target != loss.ignore_index
    return None if live.all() else live.nonzero().squeeze(1)


def spread(rows, kept, like):
    """rows at their places among those of `like`, 0 elsewhere."""
    if kept is None:
        return rows.view(like.shape)
    return rows.new_zeros(like.shape[:3].numel(), *rows.shape[1:]).index_copy_(0, kept, rows).view(like.shape)
