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

_handles: dict[int, dict[tuple, tuple]] = {}  # id of a kernel -> key -> (compiled kernel, constexpr arguments)


def launch(kernel, programs: int, device: torch.device, *args, **meta) -> None:
    """Run `programs` programs of a kernel on `device`, whatever device is current.

    args are the kernel's parameters up to the first constexpr; meta its constexprs and num_warps.
    """
    backend = device_of(device)
    if not backend.threads:
        meta.pop("num_warps", None)
    if backend.stream is None or not _KEEPS_HANDLES or torch.compiler.is_compiling():
        with backend.guard(device):
            kernel[(programs,)](*args, **meta, **backend.launch)
        return
    kept = _handles.get(id(kernel))
    if kept is None:
        kept = _handles[id(kernel)] = {}
    key = _key(kernel.params, device, args, meta)
    found = kept.get(key)
    with backend.guard(device):
        if found is None:
            compiled = kernel[(programs,)](*args, **meta, **backend.launch)
            kept[key] = compiled, tuple(meta[p.name] for p in kernel.params[len(args) :])
        else:
            compiled, constants = found
            compiled[(programs, 1, 1)](*args, *constants, stream=backend.stream(device))


def _key(params, device, args, meta) -> tuple:
    parts = [device.index, *meta.values()]
    for param, value in zip(params, args):
        if isinstance(value, torch.Tensor):
            parts.append((value.dtype, value.data_ptr() % 16 == 0))
        elif isinstance(value, int) and param.do_not_specialize:
            parts.append(-(2**31) <= value < 2**31)
        else:
            parts.append(value)
    return tuple(parts)
