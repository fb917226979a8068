"""Peak memory: of the allocator on an accelerator, of the process (resident set) on a CPU."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import torch


class Meter:
    """Bytes at the highest point since reset(), above what was in use when the Meter was made or last rebased."""

    def __init__(self, device: torch.device):
        self.device = device
        self.module = torch.get_device_module(device)
        self.allocator = hasattr(self.module, "max_memory_allocated")
        self.rebase()

    @property
    def kind(self) -> str:
        return "allocated" if self.allocator else "of the process"

    def rebase(self) -> None:
        """Count from what is in use now."""
        self.reset()
        self.base = self._peak()

    def reset(self) -> None:
        """Forget earlier peaks."""
        gc.collect()
        if self.allocator:
            self.module.reset_peak_memory_stats(self.device)
            return
        _return_free_memory()
        if sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak of the resident set starts anew

    def peak(self) -> int:
        return self._peak() - self.base

    def _peak(self) -> int:
        return self.module.max_memory_allocated(self.device) if self.allocator else _process_peak()


def _process_peak() -> int:
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _return_free_memory() -> None:
    """Give freed heap back to the system, so that a later use of it counts."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):  # another C library: its cached heap then hides a little of the next peak
        return
