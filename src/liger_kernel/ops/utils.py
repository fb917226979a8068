"""What other projects' kernels import from `liger_kernel.ops.utils`. Ours use none of it."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from packaging.version import Version

from liger_kernel import backends

_MAX_BLOCK = 65536  # elements; one program of a row kernel holds no more
_WARPS = ((2048, 4), (8192, 8), (32768, 16))  # below this many elements, this many warps


def is_hip() -> bool:
    """Whether torch was built for AMD GPUs."""
    return torch.version.hip is not None


def device_context(device: torch.device) -> contextlib.AbstractContextManager:
    """Make `device` current for a launch."""
    return backends.device_of(device).guard(device)


def ensure_contiguous(fn: Callable) -> Callable:
    """Decorate fn(ctx, *args, **kwargs) to receive every tensor contiguous."""

    def contiguous(value):
        return value.contiguous() if isinstance(value, torch.Tensor) else value

    @functools.wraps(fn)
    def wrapper(ctx, *args, **kwargs):
        return fn(ctx, *map(contiguous, args), **{name: contiguous(value) for name, value in kwargs.items()})

    return wrapper


def calculate_settings(n: int) -> tuple[int, int]:
    """(BLOCK_SIZE, num_warps) for a program that holds a whole row of n elements.

    Raises RuntimeError where n is more than one block can hold.
    """
    block = 1 << max(n - 1, 0).bit_length()
    if block > _MAX_BLOCK:
        raise RuntimeError(f"a row of {n} elements exceeds the largest block, {_MAX_BLOCK}")
    most = backends.current().max_warps
    return block, min(next((warps for limit, warps in _WARPS if block < limit), 32), most)


def compare_version(package: str, operator: Callable[[Version, Version], bool], target: str) -> bool:
    """operator(version of the package, target); False where the package cannot be imported."""
    try:
        found = importlib.import_module(package)
    except ImportError:
        return False
    return operator(Version(found.__version__), Version(target))


def get_amp_custom_fwd_bwd() -> tuple[Callable, Callable]:
    """torch.amp's custom_fwd and custom_bwd for this machine's accelerator."""
    device_type = backends.current().device_type
    return (
        functools.partial(torch.amp.custom_fwd, device_type=device_type),
        functools.partial(torch.amp.custom_bwd, device_type=device_type),
    )


def get_npu_core_count(default: int = 20) -> int:
    """Vector cores of the Ascend device here, or `default`."""
    backend = backends.current()
    return backend.cores(torch.device(backend.device_type, 0)) if backend.name == "ascend" else default


def set_large_grf_mode(kernel_args: dict) -> None:
    """Ask, in a kernel's launch keywords, for the large register file of Intel GPUs."""
    kernel_args["grf_mode"] = "large"


def __getattr__(name: str) -> Any:
    """The names that need a device's backend or triton, at first use."""
    if name in ("amp_custom_fwd", "amp_custom_bwd"):
        return get_amp_custom_fwd_bwd()[name == "amp_custom_bwd"]
    if name == "element_mul_kernel":
        return importlib.import_module("liger_kernel.ops.kernels.element_mul").element_mul_kernel
    if name == "torch_to_triton_dtype":
        tl = importlib.import_module("triton.language")
        return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
