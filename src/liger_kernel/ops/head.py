"""A language model's head, hidden x weight, in row chunks: the logits never exist whole.

    for each chunk of rows:  logits = h W^T + b;  per row: statistics, and dlogits over the logits
                             dh = dlogits W;  dW += dlogits^T h;  db += sum of dlogits

Shapes    hidden: (T, H); weight: (V, H); bias: (V,); the chunk: (rows, V) in the dtype of the product.
Low rank  logits += u B^T for u: (T, r) and B: (V, r), an adapter's: neither its sum with W nor that sum's gradient is.
Numerics  products in the dtype torch would give them (autocast's, else hidden's); dW is summed in fp32 whatever the
          number of chunks, or in accum_dtype; one chunk needs no sum. Same bits each time.
Ignored   rows cost no product where the host knows them, which is on a CPU.
Memory    one chunk, dh, dW; with several chunks dW in fp32 until the last, then its 16 bits in half of that memory.
Flops     2 T H V for the statistics, 6 T H V with both gradients.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, replace

import torch

from liger_kernel.ops.core import kernels, wide
from liger_kernel.ops.row_loss import Given, RowLoss, autocast_dtype, empty_stats

MIB = 1 << 20
WORKSPACE_ENV = "LIGER_KERNEL_WORKSPACE_MB"
# (bytes, rows) at most of a default chunk. H100, bf16: cuBLAS gains nothing from more rows.
CHUNK = {"cpu": (32 * MIB, 1 << 20), "gradients": (512 * MIB, 3584), "forward": (256 * MIB, 3584)}
SLAB = 32 * MIB  # temporaries of a product that is widened by hand


@dataclass(frozen=True)
class LowRank:
    """A further term of the logits, inputs (T, r) x weight (V, r)^T, and which of the two take a gradient."""

    inputs: torch.Tensor
    weight: torch.Tensor
    needs: tuple[bool, bool] = (False, False)


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
) -> tuple:
    """The Stats of every row of hidden (T, H), and the gradients of (hidden, weight, bias) that `needs` asks for.

    With low_rank, those of its inputs and weight follow. dtype is that of the products, see product_dtype; each
    gradient has the dtype of what it belongs to.
    """
    dtype = dtype or product_dtype(hidden)
    if counts_for_free(hidden) and not (live := given.target != loss.ignore_index).all():
        kept = live.nonzero().squeeze(1)
        remaining = hidden[kept], weight, bias, given.take(kept)
        term = None if low_rank is None else replace(low_rank, inputs=low_rank.inputs[kept])
        part = list(run(*remaining, loss, fields, needs, dtype, accum_dtype, workspace_bytes, term))
        for at, like in ((1, hidden),) if low_rank is None else ((1, hidden), (4, low_rank.inputs)):
            if part[at] is not None:
                part[at] = torch.zeros_like(like).index_copy_(0, kept, part[at])
        return part[0].spread(kept, hidden.shape[0]), *part[1:]
    h_all, w = hidden.to(dtype).contiguous(), weight.to(dtype).contiguous()
    b = None if bias is None else bias.to(dtype)
    (n_rows, width), n_classes = h_all.shape, w.shape[0]
    device = hidden.device
    stats = empty_stats(n_rows, device, wide(dtype), fields)
    low = None if low_rank is None else _LowRankTerm(low_rank, dtype)
    grads = any(needs) or (low_rank is not None and any(low_rank.needs))
    rows = chunk_rows(n_rows, n_classes, dtype, device, grads, workspace_bytes)
    n_chunks = -(-n_rows // rows)
    d_hidden = torch.empty_like(h_all) if needs[0] else None
    d_weight = d_bias = None
    if needs[1]:
        sum_dtype = torch.promote_types(weight.dtype if n_chunks <= 1 else accum_dtype or wide(dtype), dtype)
        d_weight = WeightSum(n_classes, width, sum_dtype, weight.dtype, device)
    if needs[2]:
        d_bias = torch.zeros(n_classes, dtype=stats.loss.dtype, device=device)
    pair = kernels("cross_entropy", h_all)
    chunk = empty_chunk(rows, n_classes, dtype, device)
    for i in range(0, n_rows, rows):
        j = min(i + rows, n_rows)
        h, logits = h_all[i:j], chunk[: j - i]
        project(h, w, b, logits)
        if low is not None:
            low.add_logits(logits, i, j)
        pair.forward(logits, given.rows(i, j), loss, stats.rows(i, j), logits if grads else None)
        if d_hidden is not None:
            torch.mm(logits, w, out=d_hidden[i:j])
        if d_weight is not None:
            d_weight.add(logits.t(), h)
        if d_bias is not None:
            d_bias += logits.sum(0, dtype=d_bias.dtype)
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

    def __init__(self, term: LowRank, dtype: torch.dtype):
        self.given, device = term, term.inputs.device
        self.inputs, self.weight = term.inputs.to(dtype).contiguous(), term.weight.to(dtype).contiguous()
        self.d_inputs = torch.empty_like(self.inputs) if term.needs[0] else None
        self.d_weight = None
        if term.needs[1]:
            n_classes, rank = term.weight.shape
            self.d_weight = WeightSum(n_classes, rank, wide(dtype), wide(dtype), device)

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


def counts_for_free(hidden: torch.Tensor) -> bool:
    """Whether the host may ask how many rows are left without the ignored ones: no device has to be waited for."""
    return hidden.device.type == "cpu" and not torch.compiler.is_compiling()


def product_dtype(hidden: torch.Tensor) -> torch.dtype:
    """The dtype of hidden x weight: autocast's where it is on, as F.linear has it, else hidden's."""
    if hidden.dtype is torch.float64:
        return hidden.dtype
    return autocast_dtype(hidden.device) or hidden.dtype


def chunk_rows(n_rows, n_classes, dtype, device, gradients: bool, workspace_bytes: int | None = None) -> int:
    """Rows of a chunk whose logits fit workspace_bytes (default: LIGER_KERNEL_WORKSPACE_MB, else the device's)."""
    limit, most = CHUNK["cpu" if device.type == "cpu" else "gradients" if gradients else "forward"]
    asked = workspace_bytes if workspace_bytes is not None else environment_bytes()
    if asked is not None:
        limit, most = asked, 1 << 30
    rows = max(1, min(limit // (pitch(n_classes) * dtype.itemsize), most, n_rows))
    if rows >= n_rows:
        return max(n_rows, 1)
    if rows < 128:
        return rows
    whole = rows // 128 * 128  # full tiles of a GEMM
    share = -(-n_rows // -(-n_rows // whole))  # chunks of one size
    return min(whole, -(-share // 128) * 128)


def environment_bytes() -> int | None:
    value = os.environ.get(WORKSPACE_ENV)
    if not value:
        return None
    try:
        return max(1, int(float(value) * MIB))
    except ValueError:
        raise ValueError(f"{WORKSPACE_ENV}={value!r} is not a number of MiB") from None


def pitch(n_classes: int) -> int:
    """Elements from row to row of a chunk: rows begin at 16-byte boundaries, as wide loads and GEMMs like them."""
    return -(-n_classes // 16) * 16


def empty_chunk(rows, n_classes, dtype, device):
    if torch.compiler.is_compiling():  # Dynamo takes no strided `out`
        return torch.empty(rows, n_classes, dtype=dtype, device=device)
    return torch.empty(rows, pitch(n_classes), dtype=dtype, device=device)[:, :n_classes]


def project(h, w, b, out) -> None:
    """out = h w^T + b."""
    if b is None:
        torch.mm(h, w.t(), out=out)
    else:
        torch.addmm(b, h, w.t(), out=out)


class WeightSum:
    """A sum of products (V, H), kept in sum_dtype, that ends in dtype without both existing at once.

    Each of two allocations holds half of the rows. Where dtype is half as wide, the first becomes the memory of the
    whole result: it is narrowed in place, and the second follows into the room that leaves.
    """

    def __init__(self, n_rows: int, width: int, sum_dtype: torch.dtype, dtype: torch.dtype, device: torch.device):
        self.shape, self.dtype, self.empty = (n_rows, width), dtype, True
        self.halves = sum_dtype.itemsize == 2 * dtype.itemsize
        cut = -(-n_rows // 2) if self.halves else n_rows
        sizes = (cut, n_rows - cut) if self.halves else (cut,)
        self.parts = [torch.empty(size, width, dtype=sum_dtype, device=device) for size in sizes]

    def add(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Add a b, for a of shape (V, rows) and b (rows, H)."""
        start = 0
        for part in self.parts:
            add_product(part, a[start : start + part.shape[0]], b, first=self.empty)
            start += part.shape[0]
        self.empty = False

    def finish(self) -> torch.Tensor:
        """The sum in dtype. Nothing may be added afterwards."""
        if self.empty:
            return torch.zeros(self.shape, dtype=self.dtype, device=self.parts[0].device)
        if not self.halves:
            return self.parts[0].to(self.dtype)
        top, bottom = (part.view(-1) for part in self.parts)
        self.parts.clear()
        narrow, size = top.view(self.dtype), top.numel()
        done = min(size, 1 << 16)
        narrow[:done] = top[:done].to(self.dtype)  # by way of a copy: these bytes overlap
        while done < size:  # each step writes where the steps before it have read
            more = min(done, size - done)
            narrow[done : done + more].copy_(top[done : done + more])
            done += more
        narrow[size : size + bottom.numel()].copy_(bottom)
        whole = torch.empty(0, dtype=self.dtype, device=top.device)
        return whole.set_(top.untyped_storage(), 0, self.shape)  # type: ignore[call-overload]


def add_product(total, a, b, first: bool) -> None:
    """total = (0 if first else total) + a b, the sum in total's dtype, which may be wider than a's."""
    if total.dtype == a.dtype:
        torch.mm(a, b, out=total) if first else total.addmm_(a, b)
    elif widens(a.device.type, a.dtype, total.dtype):
        if first:
            torch.mm(a, b, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        b = b.to(total.dtype)
        step = max(1, SLAB // max(1, a.shape[1] * total.element_size()))
        for i in range(0, a.shape[0], step):
            part, rows = a[i : i + step].to(total.dtype), total[i : i + step]
            torch.mm(part, b, out=rows) if first else rows.addmm_(part, b)


@functools.cache
def widens(device_type: str, narrow: torch.dtype, wide: torch.dtype) -> bool:
    """Whether this torch multiplies narrow matrices into a wide result on this kind of device."""
    a = torch.zeros(16, 16, dtype=narrow, device=device_type)
    total = torch.zeros(16, 16, dtype=wide, device=device_type)
    try:
        torch.mm(a, a, out_dtype=wide, out=total)
        torch.addmm(total, a, a, out_dtype=wide, out=total)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return True


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


def check(hidden, weight, bias, op: str) -> None:
    """ValueError for a hidden, a weight and a bias that do not go together."""
    if not hidden.is_floating_point() or hidden.dim() < 1:
        raise ValueError(f"{op}: hidden must be floats of shape (..., H), got {hidden.dtype} {tuple(hidden.shape)}")
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
