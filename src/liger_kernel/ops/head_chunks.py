"""How a language model's head is cut so that its logits fit a budget: rows of a chunk, their memory, the product."""

from __future__ import annotations

import os

import torch

from liger_kernel.ops import live_rows

MIB = 1 << 20
WORKSPACE_ENV = "LIGER_KERNEL_WORKSPACE_MB"
NO_ROWS = 1 << 30  # no limit
# (bytes, rows) at most of a default chunk. H100, bf16, sweep 2026-11-22: 4096 rows would take 0 to 6 % less time than
# 2048, for twice the memory. On a CPU 32 MiB stay in its cache, but in 16 bits a further chunk means a sum in fp32 that
# torch's products lack there. 1024x1024x128256 in bf16: 2.7 s in chunks of 32 MiB, 1.3 of 256, 1.3 unfused.
CHUNK = {"gradients": (560 * MIB, 3584), "forward": (300 * MIB, 4096), "cpu": (32 * MIB, 1 << 20),
         "cpu, gradients in 16 bits": (256 * MIB, 1 << 20)}  # fmt: skip


def vocab_of(weight, vocab: tuple[int, int] | None) -> tuple[int, int]:
    return vocab if vocab is not None else (0, weight.shape[0])


def classes_of(weight, bias, dtype, vocab):
    """The rows of weight and bias that are the classes, in the dtype of the products."""
    if vocab is not None:
        weight, bias = weight[slice(*vocab)], None if bias is None else bias[slice(*vocab)]
    return weight.to(dtype).contiguous(), None if bias is None else bias.to(dtype)


def chunk_rows(
    n_rows, n_classes, dtype, device, gradients: bool, workspace_bytes: int | None = None, sum_bytes: int = 0
) -> int:
    """Rows of a chunk whose logits fit workspace_bytes (default: LIGER_KERNEL_WORKSPACE_MB, else the device's).

    By default a single chunk may also have the sum_bytes that only several chunks need for the sum of dW.
    """
    limit, most = chunk_bytes(device, dtype, gradients, workspace_bytes)
    if most < NO_ROWS and n_rows * pitch(n_classes) * dtype.itemsize <= limit + sum_bytes:
        return max(n_rows, 1)
    rows = max(1, min(limit // (pitch(n_classes) * dtype.itemsize), most, n_rows))
    if rows >= n_rows:
        return max(n_rows, 1)
    if rows < 128:
        return rows
    # Full tiles of a GEMM. H100, bf16, 16384x1024x151936, sweep 2026-11-22: rows 1024 28.6 ms, 1664 29.7, 2048 27.7. Of
    # so many classes 2048 rows pass the limit by 6 %; H200, 2026-11-29, dW in bf16 / fp32: 1536 rows 26.9 ms / 28.6 in
    # 774 MiB / 1071, 2048 rows 26.5 / 27.7 in 923 / 1220.
    return even(n_rows, rows, 512 if rows >= 1024 else 128)


def even(n: int, most: int, unit: int) -> int:
    """The size of the parts of n, a multiple of unit: as few parts as `most` >= unit allows, of one size."""
    n_parts = -(-n // (most // unit * unit))
    return -(-n // (n_parts * unit)) * unit


def chunk_bytes(device, dtype, gradients: bool, workspace_bytes: int | None = None) -> tuple[int, int]:
    """(bytes, rows) at most of a chunk: as asked for, as the environment says, or the device's default."""
    asked = workspace_bytes if workspace_bytes is not None else environment_bytes()
    if asked is not None:
        return asked, NO_ROWS
    if device.type == "cpu":
        return CHUNK["cpu, gradients in 16 bits" if gradients and dtype.itemsize == 2 else "cpu"]
    return CHUNK["gradients" if gradients else "forward"]


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


def project(h, w, b, out, live: live_rows.LiveRows | None = None) -> bool:
    """out = h w^T + b; False and not the whole of it where live, if it answers later, says that rows are ignored."""
    if live is not None and live.event is not None:
        ahead = live_rows.ahead(w.shape[0])
        project(h[:ahead], w, b, out[:ahead])
        if live.some_ignored():
            return False
        h, out = h[ahead:], out[ahead:]
    if not h.shape[0]:
        return True
    if b is None:
        torch.mm(h, w.t(), out=out)
    else:
        torch.addmm(b, h, w.t(), out=out)
    return True
