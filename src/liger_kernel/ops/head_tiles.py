"""What a language model's head finds of each row where no gradient is formed, in tiles of rows and classes.

    for each tile:  z = h W_t^T + b_t;  of each row: nll_t, top_t, lse_t - top_t, entropy_t, predicted_t
    of each row:    top = max of top_t;  lse, nll and entropy as liger_kernel.ops.vocab_parallel puts parts together

Shapes    hidden: (T, H); weight: (V, H); bias: (V,); a tile: (rows, classes) in the dtype of the product.
Numerics  see liger_kernel.ops.head; lse_t is taken relative to top, so that large logits cost no digits.
Memory    one tile, and four to six numbers of each row and tile for LOT rows.
Traffic   a tile of whole rows within the same memory is short, and reads all of the weight for each: see TALL.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from liger_kernel.ops.core import kernels, wide
from liger_kernel.ops.head_chunks import chunk_bytes, empty_chunk, pitch, project
from liger_kernel.ops.row_loss import Given, RowLoss, Stats, empty_stats, factors
from liger_kernel.ops.vocab_parallel import NO_LABEL, first_of_largest, of_part, put_together

TALL = 4096  # rows of a tile
LEAST = 1 << 17  # logits of a tile; below it chunks of whole rows, of a single one maybe
LOT = 4 * TALL  # rows put together at once


def tile_of(n_rows: int, n_classes: int, dtype, device, workspace_bytes: int | None = None) -> tuple[int, int]:
    """(rows, classes) of a tile whose logits fit the budget of a chunk: near to a square where that is small.

    The classes do not depend on the rows, so that no number of them compiles a kernel of its own.
    """
    most = chunk_bytes(device, False, workspace_bytes)[0] // dtype.itemsize
    if most < LEAST or n_rows * pitch(n_classes) <= most:
        return max(n_rows, 1), n_classes
    rows = min(TALL, math.isqrt(most))
    rows = rows // 128 * 128 or rows  # full tiles of a GEMM
    classes = most // rows
    if classes >= pitch(n_classes):
        return rows, n_classes
    unit = 256 if classes >= 1024 else 16  # and rows at 16 bytes
    classes = max(classes // unit, 1) * unit
    share = -(-n_classes // -(-n_classes // classes))  # slabs of one size
    share = min(classes, -(-share // unit) * unit)
    n_tiles = -(-n_rows // rows)
    return min(rows, -(-n_rows // (n_tiles * 128)) * 128, n_rows), share


def can(loss: RowLoss, fields) -> bool:
    """Whether these outputs of a row follow from those of its tiles."""
    return not loss.label_smoothing and "mean" not in fields


def outputs(h, w, b, given: Given, loss: RowLoss, fields, tile: tuple[int, int], live=None) -> Stats | None:
    """The Stats that head.run would give; None where live, if it answers later, says that rows are ignored."""
    stats = empty_stats(h.shape[0], h.device, wide(h.dtype), fields)
    room = empty_chunk(*tile, h.dtype, h.device)
    for i in range(0, h.shape[0], LOT):
        j = min(i + LOT, h.shape[0])
        rows = given.rows(i, j)
        parts = _parts(h[i:j], w, b, rows.target, loss, fields, room, live if i == 0 else None)
        if parts is None:
            return None
        _finish(parts, rows, loss, w.shape[0], tile[1], stats.rows(i, j))
    return stats


def _parts(h, w, b, target, loss, fields, room, live) -> Stats | None:
    """Of each slab of classes and each row, (slabs, rows): what was found in that tile alone."""
    (step, width), (n_rows, n_classes) = room.shape, (h.shape[0], w.shape[0])
    kept = [f for f in ("entropy", "predicted") if f in fields]
    starts = range(0, n_classes, width)
    room_of = pitch(n_rows)  # so that all slabs' numbers are aligned alike: each alignment compiles a kernel of its own
    found = empty_stats(len(starts) * room_of, h.device, wide(h.dtype), ("top", "log_sum", *kept))
    alone = of_part(replace(loss, lse_square_scale=0.0, token_scaling=False))
    own = _labels(target, loss, starts, width, n_classes)
    pair = kernels("cross_entropy", h)
    for i in range(0, n_rows, step):
        j = min(i + step, n_rows)
        for slab, first in enumerate(starts):
            last = min(first + width, n_classes)
            z = room[: j - i, : last - first]
            if not project(h[i:j], w[first:last], None if b is None else b[first:last], z, live):
                return None
            live = None
            at = slab * room_of
            pair.forward(z, Given(own[slab, i:j]), alone, found.rows(at + i, at + j), None)
    return Stats(**{f: v.view(len(starts), room_of)[:, :n_rows] for f, v in vars(found).items() if v is not None})


def _labels(target, loss, starts, width, n_classes):
    """(slabs, rows): the labels within each slab, 0 where they are in another one, NO_LABEL where ignored."""
    first = torch.arange(0, n_classes, width, device=target.device, dtype=target.dtype)[:, None]
    here = (target >= first) & (target < first + width)
    own = target.new_empty(len(first), pitch(len(target)))[:, : len(target)]
    return own.copy_((target - first).where(here, 0).masked_fill_(target == loss.ignore_index, NO_LABEL))


def _finish(parts: Stats, given: Given, loss: RowLoss, n_classes: int, width: int, out: Stats) -> None:
    live, inside = given.target != loss.ignore_index, (given.target >= 0) & (given.target < n_classes)
    owner = given.target // width == torch.arange(parts.loss.shape[0], device=live.device)[:, None]
    assert parts.top is not None and parts.log_sum is not None
    top = parts.top.amax(0)
    nll, log_sum, entropy = put_together(parts.top - top + parts.log_sum, parts.loss, parts.entropy, owner)
    lse = top + log_sum
    keep, _, f_ce, f_z = factors(given, loss, nll, live, given.target.where(inside, 0), n_classes)
    z_loss = f_z * lse.square() * loss.lse_square_scale
    value = f_ce * keep * nll + (z_loss if loss.lse_square_scale else 0.0)
    out.loss.copy_(value.where(inside, float("nan")).where(live, 0.0))
    found = dict(z_loss=z_loss, lse=lse, nll=nll, top=top, log_sum=log_sum, entropy=entropy)
    for field, numbers in found.items():
        if (room := getattr(out, field)) is not None:
            room.copy_(numbers.where(live, 0.0))
    if out.predicted is not None and parts.predicted is not None:
        first = torch.arange(0, n_classes, width, device=live.device)[:, None]
        out.predicted.copy_(first_of_largest(parts.top, parts.predicted + first).where(live, -1))
