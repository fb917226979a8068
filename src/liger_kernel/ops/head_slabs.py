"""Gradients of a language model's head from what its forward kept of each row, a range of classes at a time.

    p = exp((z - top) - log_sum);  a = (1 - eps) w_y f / N;  s = eps f / (V N);  d_p = d_lse + 2 c f / T lse + s sum(w)
    dz_j = p_j (d_p + a - d_entropy (entropy + z_j - lse)) - s w_j
    dz_y = p_y d_p - a (1 - p_y) - d_entropy p_y (entropy - nll) - s w_y           1 - p_y = 1 - exp(-nll)
    for each slab of classes:  x = h W_s^T + b_s;  x <- dz;  dW_s = x^T h;  dh += x W_s;  db_s = sum of x

Symbols as in liger_kernel.ops.cross_entropy.

Shapes    hidden: (T, H); weight: (V, H); the Stats: RECOMPUTED, with d_entropy also entropy; a slab: (T, classes).
Numerics  see liger_kernel.ops.head; dh is summed in fp32, each row of dW is one product, or a sum in
          accum_dtype (default fp32) where a slab is some of the rows. lse is not used: where all
          logits are large it has lost the digits of p.
Memory    one slab, dW, dh; with several slabs dh in fp32 until the last. Nothing of V H in fp32: where the rows are
          many a slab is some of them, in turn, and beside it is its classes' part of dW in fp32.
Flops     6 T H V.
"""

from __future__ import annotations

import math

import torch

from liger_kernel.ops import live_rows
from liger_kernel.ops.core import Kernels, kernels, wide
from liger_kernel.ops.head import product_dtype, run
from liger_kernel.ops.head_chunks import chunk_bytes, classes_of, empty_chunk, even, pitch, project, vocab_of
from liger_kernel.ops.row_loss import TILE, factors, logits_of
from liger_kernel.ops.weight_sum import WeightSum, add_product, zero_outside

NAME = "head_slabs"
TILE_ROWS = 512  # a slab of some rows has a multiple of them: full tiles of a GEMM


@torch.no_grad()
def gradients(
    hidden, weight, bias, given, loss, stats, needs, dtype=None, accum_dtype=None, workspace_bytes=None,
    low_rank=None, vocab=None,
):  # fmt: skip
    """The gradients that head.run would give, where its Stats of the same rows are known.

    Row chunks, as there, for a low-rank term, a budget that holds no slab, and T > V: dh is more to sum than dW then.
    """
    dtype = dtype or product_dtype(hidden)
    n_rows, (low, high) = hidden.shape[0], vocab_of(weight, vocab)
    fits = slab_of(n_rows, high - low, dtype, hidden.device, workspace_bytes)[1] > 0
    if low_rank is not None or n_rows > high - low or not fits:
        sizes = dtype, accum_dtype, workspace_bytes, low_rank, vocab
        return run(hidden, weight, bias, given, loss, (), needs, *sizes)[1:]
    live = live_rows.ask(hidden, weight.shape[0], given.target, loss.ignore_index)
    found = None
    if live is None or live.event is not None or not live.some_ignored():
        found = _gradients(
            hidden, weight, bias, given, loss, stats, needs, dtype, accum_dtype, workspace_bytes, vocab, live
        )
    if found is not None:
        return found
    assert live is not None
    kept = live.indices()
    sizes = needs, dtype, accum_dtype, workspace_bytes, vocab
    part, *others = _gradients(hidden[kept], weight, bias, given.take(kept), loss, stats.take(kept), *sizes)
    return live_rows.spread(part, kept, hidden), *others


def _gradients(hidden, weight, bias, given, loss, stats, needs, dtype, accum_dtype, workspace_bytes, vocab, live=None):
    h, (w, b) = hidden.to(dtype).contiguous(), classes_of(weight, bias, dtype, vocab)
    low, high = vocab_of(weight, vocab)
    (n_rows, width), n_classes, device = h.shape, w.shape[0], hidden.device
    tall, step = slab_of(n_rows, n_classes, dtype, device, workspace_bytes)
    d_hidden = d_weight = d_bias = None
    if needs[0]:
        sum_dtype = torch.promote_types(hidden.dtype if step >= n_classes else wide(dtype), dtype)
        d_hidden = WeightSum(n_rows, width, sum_dtype, hidden.dtype, device)
    if needs[1]:
        make = torch.empty if n_rows else torch.zeros
        d_weight = make(weight.shape, dtype=torch.promote_types(weight.dtype, dtype), device=device)
        total_dtype = torch.promote_types(accum_dtype or wide(dtype), dtype)
    if needs[2] and bias is not None:
        d_bias = torch.zeros(weight.shape[0], dtype=wide(dtype), device=device)
    pair = kernels(NAME, h)
    slab = empty_chunk(tall, step, dtype, device)
    for i in range(0, n_classes, step):
        j = min(i + step, n_classes)
        classes = slice(low + i, low + j)
        total = None
        if d_weight is not None and tall < n_rows:
            total = WeightSum(j - i, width, total_dtype, d_weight.dtype, device)
        for top in range(0, n_rows, tall):
            rows = slice(top, min(top + tall, n_rows))
            x = slab[: rows.stop - top, : j - i]
            if not project(h[rows], w[i:j], None if b is None else b[i:j], x, live):
                return None
            live = None
            pair.backward(x, given.take(rows), loss, stats.take(rows), i, n_classes)
            if d_hidden is not None:
                d_hidden.add(x, w[i:j], rows, first=i == 0)
            if total is not None:
                total.add(x.t(), h[rows])
            elif d_weight is not None:
                add_product([d_weight[classes]], x.t(), h, first=True)
            if d_bias is not None:
                d_bias[classes] += x.sum(0, dtype=d_bias.dtype)
        if total is not None:
            d_weight[classes] = total.finish()
    del slab
    return (
        None if d_hidden is None else d_hidden.finish(),
        None if d_weight is None else zero_outside(d_weight, (low, high)).to(weight.dtype),
        None if d_bias is None or bias is None else d_bias.to(bias.dtype),
    )


def slab_of(n_rows, n_classes, dtype, device, workspace_bytes=None) -> tuple[int, int]:
    """(rows, classes) of a slab whose logits fit the budget of a chunk; no classes where fewer than 16 would.

    All rows, until that leaves less than half the classes of a square: dh is read and written once for each slab.
    """
    most = chunk_bytes(device, dtype, True, workspace_bytes)[0] // dtype.itemsize
    tall, side = max(n_rows, 1), math.isqrt(most)
    if side >= TILE_ROWS and (n_rows > 2 * side or most // tall < 16):
        tall = even(n_rows, side, TILE_ROWS)
    most //= tall
    if most >= pitch(n_classes):
        return tall, max(n_classes, 1)
    if most < 16:
        return tall, 0
    return tall, even(n_classes, most, 256 if most >= 4096 else 16)  # full tiles of a GEMM


# Torch pair


def _gradient(x, given, loss, stats, first, n_classes):
    step = max(1, TILE // max(x.shape[1], 1))
    for i in range(0, x.shape[0], step):
        _rows(x[i : i + step], given.rows(i, i + step), loss, stats.rows(i, i + step), first, n_classes)


def _rows(x, given, loss, stats, first, n_classes):
    live = given.target != loss.ignore_index
    inside = (given.target >= 0) & (given.target < n_classes)
    here = (given.target >= first) & (given.target < first + x.shape[1]) & live
    at_y = (given.target - first).where(here, 0)[:, None]
    z, nll = logits_of(x, loss), stats.nll
    slope = None if loss.softcap is None else 1 - (z * (loss.temperature / loss.softcap)).square_()
    keep, class_sum, f_ce, f_z = factors(given, loss, nll, live, given.target.where(inside, 0), n_classes)
    a, share = f_ce * keep, f_ce * (loss.label_smoothing / n_classes)
    d_p = f_z * (2.0 * loss.lse_square_scale) * (stats.top + stats.log_sum) + share * class_sum
    if given.d_lse is not None:
        d_p = d_p + given.d_lse
    p_y = (-nll).exp()
    d_y, d_all = p_y * d_p + a * torch.expm1(-nll), d_p + a
    shifted = (z.sub_(stats.top[:, None]) if z is not x else z - stats.top[:, None]).sub_(stats.log_sum[:, None])
    if given.d_entropy is not None:
        d_y = d_y - given.d_entropy * p_y * (stats.entropy - nll)
        d_all = d_all - given.d_entropy * stats.entropy
        moment = shifted.nan_to_num(neginf=0.0).mul_(given.d_entropy[:, None])  # 0 * -inf of a masked class
        dz = shifted.exp_().mul_(moment.neg_().add_(d_all[:, None]))
    else:
        dz = shifted.exp_().mul_(d_all[:, None])
    if loss.label_smoothing:
        columns = slice(first, first + x.shape[1])
        dz.sub_(share[:, None] if given.weight is None else share[:, None] * given.weight[columns].to(z.dtype))
        d_y = d_y - (share if given.weight is None else share * given.weight[given.target.where(inside, 0)].to(z.dtype))
    dz.scatter_(1, at_y, d_y.where(here, dz.gather(1, at_y).squeeze(1))[:, None])
    if slope is not None:
        dz.mul_(slope)
    if loss.rescales:
        dz.mul_(loss.scale / loss.temperature)
    x.copy_(dz.masked_fill_((live & ~inside)[:, None], float("nan")).masked_fill_(~live[:, None], 0.0))


TORCH = Kernels(gradients, _gradient)
