"""What every op room is made of: a Kernels pair behind one autograd Function, and a Contract the test suite reads.

A device replaces the pair (tensors in, tensors out), never the Function, so a public signature is written once.
Three sources of a pair, in this order: the backend's override, the op's Triton kernels, the room's torch pair.
`LIGER_KERNEL_IMPL` or `set_impl` forces one.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from liger_kernel import backends, verdicts


@dataclass(frozen=True)
class Kernels:
    """The unit a device may replace. Both halves move together: what forward saves, backward reads."""

    forward: Callable
    backward: Callable


@dataclass(frozen=True)
class Case:
    """One call of an op."""

    args: tuple
    kwargs: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Contract:
    """How to call an op, what it must equal, and what it must move. Read by the tests and by the benchmark.

    call(*args, **kwargs) and reference(*args, **kwargs) return a tensor or a tuple of tensors and Nones, in one order.
    reference is differentiable and keeps fp64; every floating tensor of args takes a gradient.
    timed(dtype, device) gives the named calls that are benchmarked and compiled offline.
    bytes_moved(*args, **kwargs) counts forward and backward, each input read once and each output written once.
    flops(*args, **kwargs) counts the matrix products of both, of which the forward is a third; None: it has none.
    """

    call: Callable
    reference: Callable
    cases: Callable[[torch.dtype, torch.device], list[Case]]
    timed: Callable[[torch.dtype, torch.device], dict[str, Case]]
    bytes_moved: Callable[..., int]
    flops: Callable[..., int] | None = None


@dataclass(frozen=True)
class Resolution:
    """Which pair runs an op on a device, and why."""

    kernels: Kernels
    source: str
    why: str


# Names other projects set that mean "the default" here: they choose among kernel languages we do not need.
_ELSEWHERE = {"cutile", "cutedsl", "cute"}
_DEFAULT = ("", "auto", "default")

_forced: str | None = os.environ.get("LIGER_KERNEL_IMPL") or None
_resolved: dict[tuple[str, ...], Kernels] = {}
_FP64 = "float64"


def kernels(op: str, x: torch.Tensor, impl: str | None = None) -> Kernels:
    """The pair that runs `op` on a tensor like `x`; resolved once per device type, a dict lookup afterwards.

    impl names one for this call alone (see known_impl); RuntimeError where it cannot run.
    """
    # The kernels compute in fp32, so fp64 keeps its precision in the torch pair.
    device_type = x.device.type if x.dtype is not torch.float64 else _FP64
    key = (op, device_type) if impl is None else (op, device_type, impl)
    if torch.compiler.is_compiling():
        _resolve_all(x.device.type) if impl is None else _resolve_named(key)
    found = _resolved.get(key)
    return found if found is not None else _resolve(*key)


def _resolve(op: str, device_type: str, impl: str | None = None) -> Kernels:
    pair = _torch_pair(op) if device_type == _FP64 else resolve(op, device_type, impl).kernels
    _resolved[(op, device_type) if impl is None else (op, device_type, impl)] = pair
    return pair


@backends.while_tracing
def _resolve_named(key: tuple[str, str, str]) -> bool:
    backends.device_of(torch.device(key[1] if key[1] != _FP64 else "cpu"))
    if key not in _resolved:
        _resolve(*key)
    return True


@backends.while_tracing
def _resolve_all(device_type: str) -> bool:
    """Run while tracing, so that a traced program only reads the dicts that dispatch looks into."""
    from liger_kernel.ops import EXPORTS, PARTS

    backends.device_of(torch.device(device_type))
    for op in (*EXPORTS, *PARTS):
        for kind in (device_type, _FP64):
            if (op, kind) not in _resolved:
                _resolve(op, kind)
    return True


def resolve(op: str, device_type: str, impl: str | None = None) -> Resolution:
    """Find the pair and say why it is this one. Raises ValueError or RuntimeError for a forced one that cannot run."""
    backend = backends.device_of(torch.device(device_type))
    wanted = _wanted() if impl is None else known_impl(impl)
    if wanted == "torch":
        return Resolution(_torch_pair(op), "torch", "asked for")
    if wanted == "triton":
        return _triton(op, backend, "asked for", forced=True)
    if wanted is not None:
        return _of_backend(op, device_type, backends.all_backends()[wanted])
    if error := verdicts.failure(op, device_type):
        warnings.warn(
            f"{op} failed `liger-kernel selftest` on {device_type} and runs in plain torch until it passes: {error}",
            stacklevel=2,
        )
        return Resolution(_torch_pair(op), "torch", f"it failed the self-test: {error}")
    if op in backend.overrides:
        return Resolution(_load(backend.overrides[op]), backend.name, "the backend's own kernels")
    return _triton(op, backend, "the device runs Triton", forced=False)


def _triton(op: str, backend: backends.Backend, why: str, forced: bool) -> Resolution:
    reason = backend.why_no_triton()
    if reason is None and not _has_triton_pair(op):
        reason = "the op has no Triton kernels"
    if reason is None and not forced and backend.name == "cpu":
        reason = "on a CPU the torch pair is faster than Triton's interpreter"
    if reason is None:
        return Resolution(_load(f"liger_kernel.ops.kernels.{op}"), "triton", why)
    if forced:
        raise RuntimeError(f"LIGER_KERNEL_IMPL='triton' cannot run {op} on {backend.device_type}: {reason}")
    return Resolution(_torch_pair(op), "torch", reason)


def _of_backend(op: str, device_type: str, backend: backends.Backend) -> Resolution:
    if backend.device_type != device_type:
        raise RuntimeError(
            f"LIGER_KERNEL_IMPL={backend.name!r} runs on {backend.device_type!r} devices and cannot run {op} on "
            f"{device_type!r}"
        )
    if not backend.is_available():
        raise RuntimeError(f"LIGER_KERNEL_IMPL={backend.name!r} cannot run {op}: no such device is available here")
    if op in backend.overrides:
        return Resolution(_load(backend.overrides[op]), backend.name, "asked for")
    return _triton(op, backend, f"backend {backend.name!r} was asked for and has no kernel of its own", forced=False)


def _wanted() -> str | None:
    """The implementation forced for this process: None for the default. Raises ValueError for an unknown name."""
    global _forced
    if _forced in _ELSEWHERE:
        known_impl(_forced)
        _forced = None
    return known_impl(_forced)


def forced() -> bool:
    """Whether an implementation was asked for, for every op."""
    return _forced is not None and _forced not in _DEFAULT and _forced not in _ELSEWHERE


def known_impl(name: str | None, asked: str = "LIGER_KERNEL_IMPL") -> str | None:
    """`name` if it is an implementation, None where it means the default. Raises ValueError for any other name."""
    if name is None or name in _DEFAULT:
        return None
    if name in _ELSEWHERE:
        warnings.warn(f"{asked}={name!r} is not needed here; the default kernels are used", stacklevel=4)
        return None
    known = ["torch", "triton", *backends.all_backends()]
    if name not in known:
        raise ValueError(f"{asked}={name!r} is not one of {sorted(known)}")
    return name


def _torch_pair(op: str) -> Kernels:
    return importlib.import_module(f"liger_kernel.ops.{op}").TORCH


def _load(module: str) -> Kernels:
    return importlib.import_module(module).KERNELS


def _has_triton_pair(op: str) -> bool:
    return importlib.util.find_spec(f"liger_kernel.ops.kernels.{op}") is not None


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype the mathematics is done in: fp32, or fp64 for fp64."""
    return dtype if dtype is torch.float64 else torch.float32


def upcast(x: torch.Tensor) -> torch.Tensor:
    """x in the dtype the mathematics is done in."""
    return x.to(wide(x.dtype))


def sum_rows(x: torch.Tensor) -> torch.Tensor:
    """x of (..., N) summed to (N,)."""
    return x.flatten(0, -2).sum(0) if x.dim() > 1 else x


def debug_enabled() -> bool:
    """Whether LIGER_KERNEL_DEBUG asks for checks that make the host wait for the device."""
    return os.environ.get("LIGER_KERNEL_DEBUG", "") not in ("", "0")


def outputs(y):
    """What a Function's forward returns, a tensor or a tuple with Nones, as torch.compile can differentiate it.

    Dynamo of torch 2.11 drops the gradient of an output that was itself written in place; a view of it is none.
    """
    if not torch.compiler.is_compiling():
        return y
    if isinstance(y, torch.Tensor):
        return y.view_as(y)
    return tuple([part if part is None else part.view_as(part) for part in y])


# Public: which implementation runs


def set_impl(name: str | None) -> None:
    """Force an implementation for every op of this process: "torch", "triton", a backend's name, None for the default.

    Raises ValueError for an unknown name. Call it between training steps, not between a forward and its backward.
    """
    global _forced
    before, _forced = _forced, name
    try:
        _wanted()
    except ValueError:
        _forced = before
        raise
    forget()


def forget() -> None:
    """Find every pair anew at its next call."""
    _resolved.clear()


def get_impl() -> str | None:
    """The forced implementation, or None where each op uses the default of its device."""
    return _forced


def available_impls(op: str, device: torch.device | str | None = None) -> list[str]:
    """Names that `set_impl` would accept for `op` on `device` (default: this process's accelerator, else the CPU)."""
    backend = backends.device_of(torch.device(device)) if device is not None else backends.current()
    names = [backend.name] if op in backend.overrides else []
    if backend.why_no_triton() is None and _has_triton_pair(op):
        names.append("triton")
    return [*names, "torch"]
