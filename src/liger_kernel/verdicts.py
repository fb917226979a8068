"""What `liger-kernel selftest` found on this device with these versions, kept in the user's cache."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
from pathlib import Path

import torch

from liger_kernel import backends
from liger_kernel._version import __version__

_ignored = 0  # > 0 while the self-test runs, which tries the kernels whatever it said of them before


def cache_file() -> Path:
    """Where the verdicts of this user are."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "liger_kernel", "selftest.json")


def key_of(device_type: str) -> str:
    """Everything a verdict depends on: the device, its driver, the versions."""
    device = torch.device(device_type, 0)
    backend = backends.device_of(device)
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    parts = (backend.name, backend.arch(device), f"driver {backend.driver(device)}", f"torch {torch.__version__}")
    return ", ".join((*parts, f"triton {triton}", f"liger_kernel {__version__}"))


def all_verdicts() -> dict[str, dict[str, str | None]]:
    """key -> op -> the error, or None where it passed. A file that cannot be read holds none."""
    try:
        return json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}


def failure(op: str, device_type: str) -> str | None:
    """Why `op` failed the self-test on this process's device, or None."""
    if _ignored or not (found := all_verdicts()):
        return None
    return found.get(key_of(device_type), {}).get(op)


def keep(device_type: str, verdicts: dict[str, str | None]) -> Path:
    """Add verdicts to those of this device; returns the file."""
    file, found = cache_file(), all_verdicts()
    found.setdefault(key_of(device_type), {}).update(verdicts)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(found, indent=1))
    partial.replace(file)
    return file


@contextlib.contextmanager
def ignored():
    """Within it no verdict changes what runs."""
    global _ignored
    _ignored += 1
    try:
        yield
    finally:
        _ignored -= 1
