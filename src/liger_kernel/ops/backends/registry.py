"""Implementations registered in upstream's way. None of ours is: which kernels run is decided in ops.core."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

LIGER_KERNEL_IMPL_ENV = "LIGER_KERNEL_IMPL"


@dataclass(frozen=True)
class ImplInfo:
    """An implementation: the device types it runs on, and on which of them unasked. module_path: where it lives."""

    name: str
    devices: tuple[str, ...]
    default_devices: tuple[str, ...] = ()
    module_path: str = ""


IMPL_REGISTRY: dict[str, ImplInfo] = {}


def register_impl(info: ImplInfo) -> None:
    """Enter `info` in the table. Warns, because entering it changes no kernel: see liger_kernel.backends for that."""
    warnings.warn(
        f"{info.name!r} is registered but runs no op: add a backend with the entry point group "
        "`liger_kernel.backends` instead",
        stacklevel=2,
    )
    IMPL_REGISTRY[info.name] = info


def select_impl(device: str, explicit: str | None = None) -> ImplInfo | None:
    """The registered implementation named `explicit`, else the default one of a device type, else None.

    Raises ValueError where the named one is unknown or does not run on `device`.
    """
    if explicit is None:
        return next((info for info in IMPL_REGISTRY.values() if device in info.default_devices), None)
    info = IMPL_REGISTRY.get(explicit)
    if info is None:
        raise ValueError(f"no implementation {explicit!r} is registered; known: {sorted(IMPL_REGISTRY)}")
    if device not in info.devices:
        raise ValueError(f"{explicit!r} runs on {', '.join(info.devices)}, not on {device!r}")
    return info
