"""What other projects ask of `liger_kernel.utils`; the facts are those of liger_kernel.backends."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
from packaging.version import Version

from liger_kernel import backends

PEFT_AVAILABLE = importlib.util.find_spec("peft") is not None


def is_peft_available() -> bool:
    """Whether the package peft can be imported here."""
    return PEFT_AVAILABLE


def infer_device() -> str:
    """The device type of this machine's accelerator, as torch names it, or "cpu"."""
    return backends.current().device_type


def infer_comm_backend() -> str:
    """The torch.distributed backend of this machine's accelerator, or that of the CPU."""
    return backends.current().comm


def infer_device_arch(device_id: int = 0) -> str:
    """The architecture of one accelerator, such as "sm_90" or "gfx942"; the device type where there is no such name."""
    backend = backends.current()
    return backend.arch(torch.device(backend.device_type, device_id))


def is_npu_available() -> bool:
    """Whether there is an Ascend device here."""
    return backends.current().name == "ascend"


def get_total_gpu_memory() -> int:
    """Whole GB (2^30 bytes) of memory of the first accelerator. Raises RuntimeError where there is none."""
    device_type = backends.current().device_type
    properties = getattr(torch.get_device_module(device_type), "get_device_properties", None)
    if properties is None:
        raise RuntimeError(f"no accelerator here to ask for its memory, only {device_type!r}")
    return properties(0).total_memory // 2**30


def transformers_version_dispatch(
    required_version: str,
    before_fn: Callable[..., Any],
    after_fn: Callable[..., Any],
    before_args: tuple = (),
    after_args: tuple = (),
    before_kwargs: Mapping[str, Any] | None = None,
    after_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Call after_fn where the installed transformers is at least `required_version`, else before_fn."""
    if Version(importlib.metadata.version("transformers")) >= Version(required_version):
        return after_fn(*after_args, **(after_kwargs or {}))
    return before_fn(*before_args, **(before_kwargs or {}))
