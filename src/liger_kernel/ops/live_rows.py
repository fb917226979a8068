"""Rows that are not ignored, asked of the device without keeping it idle while the host waits for the answer.

live = ask(...)                      mask and number of rows are queued, the number on its way to the host
project(h[:ahead(V)], ...)           work that is of use where no row is ignored
live.some_ignored()                  the host waits; the device computes the above meanwhile
"""

from __future__ import annotations

import os

import torch

from liger_kernel.backends import device_of

SYNC_ENV = "LIGER_KERNEL_HOST_SYNC"
WORTH_WAITING = 1 << 34  # T H V: below it the three products take less time than the host needs to go on
# Logits that are computed while the host waits, 512 rows of 128k classes: 0.2 to 0.8 ms of an H200's time, of 8192
# rows with 75 % ignored 2 % more work than without.
AHEAD = 1 << 26


class LiveRows:
    """The rows that are not ignored, and whether there are others."""

    def __init__(self, target: torch.Tensor, ignore_index: int, later: bool):
        self.mask, self.event = target != ignore_index, None
        if not later:
            self.kept = self.mask.nonzero().squeeze(1)  # the host waits here, once
            return
        module = torch.get_device_module(target.device)
        self.count = torch.empty((), dtype=torch.int64, device="cpu", pin_memory=target.device.type != "cpu")
        self.count.copy_(self.mask.sum(), non_blocking=True)
        self.event = module.Event()
        self.event.record(module.current_stream(target.device))

    def some_ignored(self) -> bool:
        """The host waits for the answer, and for nothing that was queued after ask()."""
        if self.event is None:
            return self.kept.shape[0] < self.mask.shape[0]
        self.event.synchronize()
        return int(self.count) < self.mask.shape[0]

    def indices(self) -> torch.Tensor:
        """Of the rows, in order; after some_ignored()."""
        if self.event is None:
            return self.kept
        # nonzero() would wait for all that is queued
        return self.mask.argsort(descending=True, stable=True)[: int(self.count)]


def ask(hidden: torch.Tensor, n_classes: int, target: torch.Tensor, ignore_index: int) -> LiveRows | None:
    """None where the host shall not wait for the answer, or it is not worth it."""
    device, backend = hidden.device, device_of(hidden.device)
    if torch.compiler.is_compiling() or os.environ.get(SYNC_ENV) == "0" or not backend.may_wait():
        return None
    if device.type != "cpu" and hidden.numel() * n_classes < WORTH_WAITING:
        return None
    return LiveRows(target, ignore_index, backend.answers_later)


def ahead(n_classes: int) -> int:
    """Rows of so many classes whose logits are computed while the host waits; full tiles of a GEMM."""
    rows = AHEAD // n_classes
    return rows // 128 * 128 or max(rows, 1)


def counts_for_free(hidden: torch.Tensor) -> bool:
    """Whether the host may ask how many rows are left without the ignored ones: no device has to be waited for."""
    return hidden.device.type == "cpu" and not torch.compiler.is_compiling()


def spread(part: torch.Tensor | None, kept: torch.Tensor, like: torch.Tensor) -> torch.Tensor | None:
    """The rows of part at their places in a tensor like `like`, the others 0."""
    return None if part is None else torch.zeros_like(like).index_copy_(0, kept, part)
