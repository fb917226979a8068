"""Launching a kernel at a small host cost.

kernel[grid](...) binds, specialises and hashes its arguments at every call, which costs about twice as much as starting
the compiled kernel it finds. So the compiled kernel is kept here, under a key of all that Triton specialises on.
"""

from __future__ import annotations

import torch
import triton
from packaging.version import Version

from liger_kernel.backends import device_of

# From 3.4 on a compiled kernel takes its constexpr arguments too, in the order of its parameters.
_KEEPS_HANDLES = Version(triton.__version__) >= Version("3.4")
_INT32 = range(-(2**31), 2**31)

_handles: dict[tuple, tuple] = {}  # key -> (compiled kernel, its run, function, metadata, constexpr arguments)
_free: dict[int, tuple[bool, ...]] = {}  # id of a kernel -> which of its arguments Triton does not specialise on


def launch(kernel, programs: int, device: torch.device, *args, **meta) -> None:
    """Run `programs` programs of a kernel on `device`, whatever device is current.

    args are the kernel's parameters up to the first constexpr; meta its constexprs, num_warps and num_stages.
    """
    if torch.compiler.is_compiling():
        backend = device_of(device)
        with backend.guard(device):
            kernel[(programs,)](*args, **meta, **backend.launch)
        return
    try:
        _launch(kernel, programs, device, args, meta)
    except RuntimeError:  # a tensor that is still on its way between ranks has no address
        arrived = tuple([x.wait() if type(x).__name__ == "AsyncCollectiveTensor" else x for x in args])
        if all(x is y for x, y in zip(arrived, args)):
            raise
        _launch(kernel, programs, device, arrived, meta)


def _launch(kernel, programs, device, args, meta) -> None:
    backend = device_of(device)
    if backend.stream is None or not _KEEPS_HANDLES:
        for value in args:
            if isinstance(value, torch.Tensor):
                _address(value)
        with backend.guard(device):
            kernel[(programs,)](*args, **meta, **backend.launch)
        return
    free = _free.get(id(kernel))
    if free is None:
        free = _free[id(kernel)] = tuple([bool(p.do_not_specialize) for p in kernel.params])
    parts, addresses = [id(kernel), device.index, *meta.values()], 0
    for value, is_free in zip(args, free):
        if isinstance(value, torch.Tensor):
            addresses |= value.data_ptr() or _address(value)
            parts.append(value.dtype)
        else:
            parts.append(value in _INT32 if is_free else value)
    if addresses & 15:  # rare: which of them are not at a multiple of 16 bytes
        parts.extend([value.data_ptr() & 15 == 0 for value in args if isinstance(value, torch.Tensor)])
    key = tuple(parts)
    found = _handles.get(key)
    if found is not None and backend.is_current(device):
        _start(found, programs, backend.stream(device), args)
        return
    with backend.guard(device):
        if found is None:
            compiled = kernel[(programs,)](*args, **meta, **backend.launch)
            constants = tuple([meta[p.name] for p in kernel.params[len(args) :]])
            _handles[key] = compiled, compiled.run, compiled.function, compiled.packed_metadata, constants
        else:
            _start(found, programs, backend.stream(device), args)


def _address(tensor: torch.Tensor) -> int:
    """Where it lies; RuntimeError for one that lies nowhere, which says 0, and a kernel would read there."""
    address = tensor.data_ptr()
    if not address and tensor.numel() and tensor.device.type != "meta":  # that only compiles
        raise RuntimeError(f"a kernel cannot read a {type(tensor).__name__}, which has no memory of its own")
    return address


def _start(found, programs, stream, args) -> None:
    compiled, run, function, metadata, constants = found
    hook = triton.knobs.runtime.launch_enter_hook
    if hook is None or not getattr(hook, "calls", True):  # nobody, such as a profiler, asks what is launched
        run(programs, 1, 1, stream, function, metadata, None, None, None, *args, *constants)
    else:
        compiled[(programs, 1, 1)](*args, *constants, stream=stream)
