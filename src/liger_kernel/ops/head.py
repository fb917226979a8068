"""A language model's head, hidden x weight, in row chunks: the logits never exist whole.

    for each chunk of rows:  logits = h W^T + b;  per row: statistics, and dlogits over the logits
                             dh = dlogits W;  dW += dlogits^T h;  db += sum of dlogits

Shapes    hidden: (T, H); weight: (V, H); bias: (V,); the chunk: (rows, V) in the dtype of the product.
Low rank  logits += u B^T for u: (T, r) and B: (V, r), an adapter's: neither its sum with W nor that sum's gradient is.
Numerics  products in the dtype torch would give them (autocast's, else hidden's); dW is summed in fp32 whatever the
          number of chunks, or in accum_dtype; one chunk needs no sum. Same bits each time.
Ignored   rows cost no product where the host may wait for their number, see ops/live_rows.py.
Memory    one chunk, dh, dW; with several chunks dW in fp32 until the last, then its 16 bits in half of that memory.
Flops     2 T H V for the statistics, 6 T H V with both gradients.
Elsewhere statistics alone are found in tiles, head_tiles; gradients of rows whose statistics are known: head_slabs.
Split     among ranks, each with some of the classes: they meet once a chunk, see Split and vocab_parallel_head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from liger_kernel.ops import head_tiles, live_rows
from liger_kernel.ops.core import kernels, wide
from liger_kernel.ops.head_chunks import chunk_rows, classes_of, empty_chunk, project, vocab_of
from liger_kernel.ops.row_loss import RECOMPUTED, Given, RowLoss, Stats, autocast_dtype, empty_stats
from liger_kernel.ops.sharded import why_not_whole
from liger_kernel.ops.weight_sum import WeightSum


@dataclass(frozen=True)
class LowRank:
    """A further term of the logits, inputs (T, r) x weight (V, r)^T, and which of the two take a gradient."""

    inputs: torch.Tensor
    weight: torch.Tensor
    needs: tuple[bool, bool] = (False, False)


@dataclass(frozen=True)
class Split:
    """Gradients of rows whose classes are split among ranks, which have to meet before each chunk of them.

    n_classes: of a part, the same number on every rank, so that all cut the same chunks. settle: what the gradients
    of a chunk are given, from its Stats here, which hold RECOMPUTED, and its rows (a slice, or their indices).
    """

    n_classes: int
    settle: Callable[[Stats, slice | torch.Tensor], Given]


@torch.no_grad()
def run(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    given: Given,
    loss: RowLoss,
    fields=(),
    needs=(False, False, False),
    dtype: torch.dtype | None = None,
    accum_dtype: torch.dtype | None = None,
    workspace_bytes: int | None = None,
    low_rank: LowRank | None = None,
    vocab: tuple[int, int] | None = None,
    split: Split | None = None,
) -> tuple:
    """The Stats of every row of hidden (T, H), and the gradients of (hidden, weight, bias) that `needs` asks for.

    With low_rank, those of its inputs and weight follow. dtype is that of the products, see product_dtype; each
    gradient has the dtype of what it belongs to. vocab: the rows of the weights and bias that are the classes.
    """
    dtype = dtype or product_dtype(hidden)
    n_classes = weight.shape[0] if split is None else split.n_classes
    sizes = loss, fields, needs, dtype, accum_dtype, workspace_bytes
    live = live_rows.ask(hidden, n_classes, given.target, loss.ignore_index)
    found = None
    if live is None or live.event is not None or not live.some_ignored():
        found = _run(hidden, weight, bias, given, *sizes, low_rank, vocab, split, live)
    if found is not None:
        return found
    assert live is not None
    kept = live.indices()
    if split is not None:
        settle = split.settle
        split = replace(split, settle=lambda stats, rows: settle(stats, kept[rows]))
    low = None if low_rank is None else replace(low_rank, inputs=low_rank.inputs[kept])
    rows = hidden[kept], weight, bias, given.take(kept)
    part = list(_run(*rows, *sizes, low, vocab, split))
    part[0], part[1] = part[0].spread(kept, hidden.shape[0]), live_rows.spread(part[1], kept, hidden)
    if low_rank is not None:
        part[4] = live_rows.spread(part[4], kept, low_rank.inputs)
    return tuple(part)


def _run(
    hidden, weight, bias, given, loss, fields, needs, dtype, accum_dtype, workspace_bytes, low_rank, vocab, split,
    live=None,
):  # fmt: skip
    """run() of all rows; None where live, if it answers later, says that some are ignored."""
    h_all, (w, b) = hidden.to(dtype).contiguous(), classes_of(weight, bias, dtype, vocab)
    classes = slice(*vocab_of(weight, vocab))
    (n_rows, width), n_classes = h_all.shape, w.shape[0]
    device = hidden.device
    grads = any(needs) or (low_rank is not None and any(low_rank.needs))
    if not grads and low_rank is None and split is None and head_tiles.can(loss, fields):
        fields = (*fields, *(f for f in RECOMPUTED if f not in fields))
        tile = head_tiles.Tile.choose(n_rows, n_classes, dtype, device, workspace_bytes)
        if tile is not None:
            found = head_tiles.outputs(h_all, w, b, given, loss, fields, tile, live)
            return None if found is None else (found, None, None, None)
    stats = empty_stats(n_rows, device, wide(dtype), fields)
    low = None if low_rank is None else _LowRankTerm(low_rank, dtype, vocab)
    total = accum_dtype or wide(dtype)
    n_summed, n_wide = (weight.shape[0], n_classes) if split is None else (split.n_classes, split.n_classes)
    sum_bytes = n_summed * width * (total.itemsize - weight.dtype.itemsize) if needs[1] else 0
    rows = chunk_rows(n_rows, n_wide, dtype, device, grads, workspace_bytes, sum_bytes)
    n_chunks = -(-n_rows // rows)
    d_hidden = torch.empty_like(h_all) if needs[0] else None
    d_weight = d_bias = None
    if needs[1]:
        sum_dtype = torch.promote_types(weight.dtype if n_chunks <= 1 else total, dtype)
        d_weight = WeightSum(weight.shape[0], width, sum_dtype, weight.dtype, device, vocab)
    if needs[2]:
        d_bias = torch.zeros(weight.shape[0], dtype=stats.loss.dtype, device=device)
    pair = kernels("cross_entropy", h_all)
    chunk = empty_chunk(rows, n_classes, dtype, device)
    for i in range(0, n_rows, rows):
        j = min(i + rows, n_rows)
        h, logits = h_all[i:j], chunk[: j - i]
        if not project(h, w, b, logits, live if i == 0 else None):
            return None
        if low is not None:
            low.add_logits(logits, i, j)
        found = stats.rows(i, j)
        pair.forward(logits, given.rows(i, j), loss, found, logits if grads and split is None else None)
        if split is not None:
            settled = split.settle(found, slice(i, j))
            kernels("head_slabs", h_all).backward(logits, settled, loss, found, 0, n_classes)
        if d_hidden is not None:
            torch.mm(logits, w, out=d_hidden[i:j])
        if d_weight is not None:
            d_weight.add(logits.t(), h)
        if d_bias is not None:
            d_bias[classes] += logits.sum(0, dtype=d_bias.dtype)
        if low is not None:
            low.add_gradients(logits, i, j)
    del chunk
    return (
        stats,
        None if d_hidden is None else d_hidden.to(hidden.dtype),
        None if d_weight is None else d_weight.finish(),
        None if d_bias is None or bias is None else d_bias.to(bias.dtype),
        *(() if low is None else low.finish()),
    )


class _LowRankTerm:
    """u B^T of every chunk and its gradients; the sum for B is small, so it is always wide."""

    def __init__(self, term: LowRank, dtype: torch.dtype, vocab: tuple[int, int] | None):
        self.given, device = term, term.inputs.device
        self.inputs, self.weight = term.inputs.to(dtype).contiguous(), classes_of(term.weight, None, dtype, vocab)[0]
        self.d_inputs = torch.empty_like(self.inputs) if term.needs[0] else None
        self.d_weight = None
        if term.needs[1]:
            n_classes, rank = term.weight.shape
            self.d_weight = WeightSum(n_classes, rank, wide(dtype), wide(dtype), device, vocab)

    def add_logits(self, logits, i: int, j: int) -> None:
        logits.addmm_(self.inputs[i:j], self.weight.t())

    def add_gradients(self, d_logits, i: int, j: int) -> None:
        if self.d_inputs is not None:
            torch.mm(d_logits, self.weight, out=self.d_inputs[i:j])
        if self.d_weight is not None:
            self.d_weight.add(d_logits.t(), self.inputs[i:j])

    def finish(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return (
            None if self.d_inputs is None else self.d_inputs.to(self.given.inputs.dtype),
            None if self.d_weight is None else self.d_weight.finish().to(self.given.weight.dtype),
        )


def scaled(grads, factor: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Gradients times a 0-d factor, over their own memory; None stays None."""
    return tuple(None if g is None else kernels("cross_entropy", g).backward(g, factor) for g in grads)


def product_dtype(hidden: torch.Tensor) -> torch.dtype:
    """The dtype of hidden x weight: autocast's where it is on, as F.linear has it, else hidden's."""
    if hidden.dtype is torch.float64:
        return hidden.dtype
    return autocast_dtype(hidden.device) or hidden.dtype


def check_low_rank(inputs, low_weight, hidden, weight, op: str) -> None:
    """ValueError for a low-rank term that does not go with hidden (..., H) and weight (V, H)."""
    rank = low_weight.shape[-1]
    if inputs.shape != (*hidden.shape[:-1], rank) or low_weight.shape != (weight.shape[0], rank):
        lead = "".join(f"{n}, " for n in hidden.shape[:-1])
        raise ValueError(
            f"{op}: low_rank needs shapes ({lead}r) and ({weight.shape[0]}, r), got {tuple(inputs.shape)} and "
            f"{tuple(low_weight.shape)}"
        )
    for tensor in (inputs, low_weight):
        if tensor.device != hidden.device or not tensor.is_floating_point():
            raise ValueError(f"{op}: low_rank must be floats on {hidden.device}, got {tensor.dtype} on {tensor.device}")


def check_scales(logit_scale, temperature, hidden, op: str) -> None:
    """ValueError for a scale or a temperature that is a tensor and cannot be honoured."""
    for name, value in (("logit_scale", logit_scale), ("temperature", temperature)):
        if isinstance(value, torch.Tensor):
            if value.numel() != 1 or value.device != hidden.device:
                raise ValueError(
                    f"{op}: {name} as a tensor needs one element on {hidden.device}, got {tuple(value.shape)} on "
                    f"{value.device}"
                )
            if value.requires_grad and torch.is_grad_enabled():
                raise ValueError(f"{op}: {name} takes no gradient; pass {name}.detach()")


def check(hidden, weight, bias, op: str) -> None:
    """ValueError for a hidden, a weight and a bias that do not go together."""
    if not hidden.is_floating_point() or hidden.dim() < 1:
        raise ValueError(f"{op}: hidden must be floats of shape (..., H), got {hidden.dtype} {tuple(hidden.shape)}")
    if (reason := why_not_whole(weight)) is not None:
        raise ValueError(f"{op}: the weight {reason}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{op}: hidden has H = {hidden.shape[-1]} and needs a weight (V, H), got one of shape {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias of shape {tuple(bias.shape)}, expected ({weight.shape[0]},)")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{op}: hidden is on {hidden.device} and the {name} on {tensor.device}")
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{op}: the {name} must be of a float dtype, got {tensor.dtype}")
