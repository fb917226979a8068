"""Which implementation runs an op, by upstream's names. The choice itself is made in liger_kernel.ops.core."""

from __future__ import annotations

import warnings

import torch

from liger_kernel.ops import core
from liger_kernel.ops.core import get_impl, set_impl

__all__ = ["all_impls", "available_impls", "clear_available_cache", "dispatch", "emit_fallback_warning", "get_impl",
           "resolve_impl", "set_impl"]  # fmt: skip


def available_impls(op_name: str, device: torch.device | str | None = None) -> list[str]:
    """Names that `set_impl` accepts for an op on a device; default: this process's accelerator, else the CPU."""
    return core.available_impls(op_name, device)


def all_impls(op_name: str) -> list[str]:
    """Names of all implementations of an op, whether or not they run here."""
    from liger_kernel.backends import all_backends

    own = [backend.name for backend in all_backends().values() if op_name in backend.overrides]
    return sorted({"torch", *own, *(["triton"] if core._has_triton_pair(op_name) else [])})


def clear_available_cache() -> None:
    """Find every op's implementation anew at its next call."""
    core.forget()


def resolve_impl(op_name: str, requested: str | None = None, device: torch.device | str | None = None) -> str:
    """The name of what runs an op on a device, `requested` where given.

    Raises ValueError for a name that is unknown and RuntimeError for one that cannot run there.
    """
    from liger_kernel.backends import current

    kind = torch.device(device).type if device is not None else current().device_type
    return core.resolve(op_name, kind, requested).source


def dispatch(op_name: str, *args, impl: str | None = None, backend: str | None = None, **kwargs):
    """What the function of that name in liger_kernel.functional returns. Raises ValueError for a name not there."""
    from liger_kernel import functional

    if op_name not in functional.__all__:
        raise ValueError(f"op_name must be one of {functional.__all__}, got {op_name!r}")
    return getattr(functional, op_name)(*args, impl=impl, backend=backend, **kwargs)


def emit_fallback_warning(op_name: str, requested: str, actual: str, reason: str) -> None:
    """Warn that an op runs on something else than was asked for."""
    warnings.warn(f"{op_name} runs on {actual!r} instead of {requested!r}: {reason}", stacklevel=2)
