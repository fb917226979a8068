"""What a language model's head finds of each row where no gradient is formed, in tiles of rows and classes.

    for each tile:  z = h W_t^T + b_t;  of each row: nll_t, top_t, lse_t - top_t, entropy_t, predicted_t
    of each row:    top = max of top_t;  lse, nll and entropy as liger_kernel.ops.vocab_parallel puts parts together

Shapes    hidden: (T, H); weight: (V, H); bias: (V,); a tile: (rows, classes) in the dtype of the product.
Numerics  see liger_kernel.ops.head; lse_t is taken relative to top, so that large logits cost no digits.
Memory    one tile and, of `lot` rows, what was found in each of their tiles: together the budget of a chunk.
Traffic   the weight is read once for each tile's rows; a chunk of whole rows in the same memory has a fourth of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from liger_kernel.ops.core import kernels, wide
from liger_kernel.ops.head_chunks import chunk_bytes, empty_chunk, even, pitch, project
from liger_kernel.ops.row_loss import Given, RowLoss, Stats, empty_stats, factors
from liger_kernel.ops.vocab_parallel import first_of_largest, of_part, put_together

# Rows of a tile. H200, bf16, sweep 2026-11-29, 300 MiB: of 2048, 4096 and 8192 rows the fastest or within 1 % of it at
# the four shapes where they cut differently. Whole rows, 1024 of them, took 1 to 3 % longer at these, and 4 % less for
# 4096 x 128256 logits, where the same tile varied by as much.
TALL = 4096
LEAST = 1 << 17  # logits of a tile; below it chunks of whole rows, of a single one maybe
PART = 96  # bytes of a row and tile while its parts are put together: 50 to 70 counted


@dataclass(frozen=True)
class Tile:
    """rows x classes of logits at once; `lot` rows are put together at once."""

    rows: int
    classes: int
    lot: int

    @classmethod
    def choose(cls, n_rows: int, n_classes: int, dtype, device, workspace_bytes: int | None = None) -> Tile | None:
        """A tile within the budget of a chunk, an eighth of which its parts may take; None: chunks of whole rows.

        The classes do not depend on the rows, so that no number of them compiles a kernel of its own.
        """
        limit, size = chunk_bytes(device, dtype, False, workspace_bytes)[0], dtype.itemsize
        most = limit * 7 // (8 * size)
        if most < LEAST or n_rows * pitch(n_classes) * size <= limit:
            return None
        # As high as leaves room for the parts of n_classes / (most / rows) tiles of each row.
        rows = min(TALL, math.isqrt(most), int(limit * (7 / (64 * PART * size * n_classes)) ** 0.5))
        rows = rows // 128 * 128 or max(rows, 1)  # full tiles of a GEMM
        classes = most // rows
        if classes >= n_classes:
            return None
        classes = even(n_classes, max(classes, 16), 256 if classes >= 1024 else 16)  # and rows at 16 bytes
        lot = limit // (8 * PART * -(-n_classes // classes)) // rows * rows
        height = rows if rows < 128 else even(n_rows, rows, 128)
        return cls(min(height, n_rows), classes, max(lot, rows))


def can(loss: RowLoss, fields) -> bool:
    """Whether these outputs of a row follow from those of its tiles."""
    return not loss.label_smoothing and "mean" not in fields


def outputs(h, w, b, given: Given, loss: RowLoss, fields, tile: Tile, live=None) -> Stats | None:
    """The Stats that head.run would give, RECOMPUTED and others; None where live says that rows are ignored.

    A row's kernel is told what it would be told of a whole row, so that both are the same compiled one: its loss, which
    is that of another label maybe, is not read.
    """
    stats = empty_stats(h.shape[0], h.device, wide(h.dtype), fields)
    room = empty_chunk(tile.rows, tile.classes, h.dtype, h.device)
    for i in range(0, h.shape[0], tile.lot):
        j = min(i + tile.lot, h.shape[0])
        rows = given.rows(i, j)
        parts = _parts(h[i:j], w, b, rows, loss, fields, room, live if i == 0 else None)
        if parts is None:
            return None
        _finish(parts, rows, loss, w.shape[0], tile.classes, stats.rows(i, j))
    return stats


def _parts(h, w, b, given, loss, fields, room, live) -> Stats | None:
    """Of each slab of classes and each row, (slabs, rows): what was found in that tile alone."""
    (step, width), (n_rows, n_classes) = room.shape, (h.shape[0], w.shape[0])
    starts = range(0, n_classes, width)
    room_of = pitch(n_rows)  # so that all slabs' numbers are aligned alike: each alignment compiles a kernel of its own
    found = empty_stats(len(starts) * room_of, h.device, wide(h.dtype), fields)
    own = _labels(given.target, loss, starts, width, n_classes)
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
            rows = replace(given.rows(i, j), target=own[slab, i:j])
            pair.forward(z, rows, of_part(loss), found.rows(at + i, at + j), None)
    return Stats(**{f: v.view(len(starts), room_of)[:, :n_rows] for f, v in vars(found).items() if v is not None})


def _labels(target, loss, starts, width, n_classes):
    """(slabs, rows): the labels within each slab, 0 where they are in another one, or ignored as of_part has it."""
    first = torch.arange(0, n_classes, width, device=target.device, dtype=target.dtype)[:, None]
    own = target.new_empty(len(first), pitch(len(target)))[:, : len(target)]
    torch.sub(target, first, out=own)
    own.masked_fill_((own < 0) | (own >= width), 0)
    return own.masked_fill_(target == loss.ignore_index, of_part(loss).ignore_index)


def _finish(parts: Stats, given: Given, loss: RowLoss, n_classes: int, width: int, out: Stats) -> None:
    live, inside = given.target != loss.ignore_index, (given.target >= 0) & (given.target < n_classes)
    owner = given.target // width == torch.arange(parts.loss.shape[0], device=live.device)[:, None]
    assert parts.top is not None and parts.log_sum is not None and parts.nll is not None
    top = parts.top.amax(0)
    nll, log_sum, entropy = put_together(parts.top - top + parts.log_sum, parts.nll, parts.entropy, owner)
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
