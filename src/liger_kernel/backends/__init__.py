"""One file (or folder) per backend, found by looking in this folder; nothing outside it names a vendor.

A backend is facts about a kind of device, launch numbers, and the few kernels that must differ there. A third party
adds one through the entry point group `liger_kernel.backends`, whose value is a module with a BACKEND.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

ENTRY_POINT_GROUP = "liger_kernel.backends"


def no_triton_here() -> str | None:
    return "this device runs no Triton"


def triton_missing() -> str | None:
    """Why Triton cannot be imported, or None where it can."""
    return None if importlib.util.find_spec("triton") else "the package `triton` is not installed"


def triton_for(target: str) -> Callable[[], str | None]:
    """why_no_triton of a device whose vendor ships a Triton of its own, which calls its devices `target`."""

    def why() -> str | None:
        if (missing := triton_missing()) or os.environ.get("TRITON_INTERPRET") == "1":
            return missing
        from triton.runtime import driver

        try:
            found = driver.active.get_current_target().backend
        except Exception as error:  # each vendor's driver fails in its own way
            return f"the installed triton finds no device of its own: {error}"
        return None if found == target else f"the installed triton is for {found!r} devices; the vendor's is needed"

    return why


def torch_has(device_type: str) -> Callable[[], bool]:
    """is_available of a device whose functions are those of torch.<device_type>, once its package is imported."""

    def available() -> bool:
        module = getattr(torch, device_type, None)
        return module is not None and module.is_available()

    return available


def guard_of(device_type: str) -> Callable[[torch.device], contextlib.AbstractContextManager]:
    """guard of such a device."""
    return lambda device: getattr(torch, device_type).device(device)


@dataclass(frozen=True)
class Backend:
    """Everything the rest of the library may ask about a kind of device."""

    name: str
    device_type: str
    is_available: Callable[[], bool]
    why_no_triton: Callable[[], str | None] = no_triton_here  # None: Triton kernels run on this device
    cores: Callable[[torch.device], int] = lambda device: 1  # units that each run programs: SMs, CUs, vector cores
    persistent: bool = False  # True: never launch more programs than cores
    max_programs: int = 2**31 - 1  # largest 1-D grid
    threads: bool = True  # False: a program is one vector unit, which wants long tiles and knows no warps
    warp_width: int = 32
    max_warps: int = 32
    tile_bytes: int = 256 * 1024  # what the fp32 tiles of one program may take together
    guard: Callable[[torch.device], contextlib.AbstractContextManager] = lambda device: contextlib.nullcontext()
    is_current: Callable[[torch.device], bool] = lambda device: True  # whether guard() would change nothing
    stream: Callable[[torch.device], int] | None = None  # the current stream's handle: enables the fast launch
    # Whether the host may wait for the device now: not while a graph is captured, nor where waiting is an error.
    may_wait: Callable[[], bool] = lambda: False
    answers_later: bool = False  # pinned memory and events tell the host a number while other work is queued
    small_head: int = 0  # T V of a head up to which plain torch is faster; 0: not measured
    arch: Callable[[torch.device], str] = lambda device: device.type
    driver: Callable[[torch.device], str] = lambda device: "unknown"  # its version: a self-test holds for one
    comm: str = "gloo"
    launch: Mapping[str, object] = field(default_factory=dict)  # extra keywords of every kernel launch
    default: bool = True  # False: only where LIGER_KERNEL_IMPL names it
    overrides: Mapping[str, str] = field(default_factory=dict)  # op -> module that defines KERNELS

    def max_block(self, live: int) -> int:
        """Largest power of two of elements per row block when `live` fp32 tiles of that size exist at once."""
        return 1 << ((self.tile_bytes // (4 * live)).bit_length() - 1)


def while_tracing(fact: Callable) -> Callable:
    """Mark a function of constants that torch.compile shall call while it traces, not trace."""
    fact._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler's decorator imports Dynamo
    return fact


failures: dict[str, str] = {}  # backend module -> why it could not be loaded


@functools.cache
def all_backends() -> dict[str, Backend]:
    """Every known backend by name: the files of this folder, then the entry points, which go before them."""
    modules = [f"{__name__}.{m.name}" for m in pkgutil.iter_modules(__path__) if m.name != "dispatch"]
    modules += [e.value for e in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)]
    found = {}
    for module in modules:
        try:
            backend = importlib.import_module(module).BACKEND
        except Exception as error:  # a broken plug-in must not break the library, nor pass unseen
            failures[module] = f"{type(error).__name__}: {error}"
        else:
            found[backend.name] = backend
    return found


_BY_TYPE: dict[str, Backend] = {}


def device_of(device: torch.device) -> Backend:
    """The backend of a device; for a kind nobody has described, one that runs the plain-torch pairs."""
    backend = _BY_TYPE.get(device.type)
    return backend if backend is not None else _find(device.type)


def _find(device_type: str) -> Backend:
    candidates = [b for b in all_backends().values() if b.device_type == device_type and b.default]
    usable = [b for b in candidates if b.is_available()] or candidates
    backend = usable[-1] if usable else Backend(name=device_type, device_type=device_type, is_available=lambda: True)
    _BY_TYPE[device_type] = backend
    return backend


def __getattr__(name: str):
    if name in ("available_impls", "get_impl", "set_impl"):  # where upstream has them too
        return getattr(importlib.import_module("liger_kernel.ops.core"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def current() -> Backend:
    """The backend of the accelerator of this process, or the CPU's where there is none."""
    order = [b for b in all_backends().values() if b.default and b.device_type != "cpu" and b.is_available()]
    return device_of(torch.device(order[0].device_type if order else "cpu"))
