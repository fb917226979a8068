"""A device made of host memory, under any name: so that code for devices that are not here runs.

torch calls such a device PrivateUse1; one process has one, with two indices. Its operators are those of the CPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sysconfig
import types
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy
import torch
from packaging.version import Version

SOURCE = Path(__file__).with_name("device.cpp")
BUILT = Path(__file__).parents[2] / ".deps"  # kept between runs: building takes half a minute


def cannot_build() -> str | None:
    """Why the device cannot be had here, or None."""
    if not shutil.which("g++"):
        return "building the fake device needs g++"
    try:
        interpreter = Version(version("triton"))
    except PackageNotFoundError:
        return None
    if interpreter < Version("3.7") and Version(numpy.__version__) >= Version("2.4"):
        return "the interpreter of Triton 3.6 turns arrays of one element into ints, which NumPy 2.4 refuses"
    return None


def build() -> Path:
    """The shared library of device.cpp for this torch."""
    from torch.utils import cpp_extension

    what = SOURCE.read_text() + torch.__version__
    library = BUILT / f"fake_device_{hashlib.sha256(what.encode()).hexdigest()[:16]}.so"
    if not library.exists():
        BUILT.mkdir(exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}")
        folders = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
        subprocess.run(
            ["g++", "-O0", "-std=c++20", "-shared", "-fPIC", SOURCE, "-o", partial, *(f"-I{f}" for f in folders),
             *(f"-L{f}" for f in cpp_extension.library_paths()), "-ltorch_cpu", "-lc10"], check=True,
        )  # fmt: skip
        os.replace(partial, library)
    return library


def install(name: str, **facts) -> types.ModuleType:
    """Make torch.device(name) exist in this process, and return torch.<name>; facts are its device properties."""
    library = ctypes.CDLL(str(build()))
    library.bytes_allocated.restype = library.bytes_at_most.restype = ctypes.c_int64
    torch.utils.rename_privateuse1_backend(name)
    library.register_hooks()
    module = types.ModuleType(f"torch.{name}")
    index = lambda device: (device if isinstance(device, int) else torch.device(device).index) or 0  # noqa: E731

    class Device:
        """The context manager torch.<name>.device."""

        def __init__(self, device):
            self.index = index(device)

        def __enter__(self):
            self.before = library.get_device()
            library.set_device(self.index)

        def __exit__(self, *error):
            library.set_device(self.before)

    properties = types.SimpleNamespace(**{"name": f"fake {name}", "total_memory": 64 << 30} | facts)
    for method, value in {
        "is_available": True,
        "is_initialized": True,
        "_is_in_bad_fork": False,
        "_lazy_init": None,
        "synchronize": None,
        "empty_cache": None,
        "manual_seed": None,
        "manual_seed_all": None,
        "device_count": 2,
        "get_device_name": properties.name,
        "get_device_properties": properties,
        "get_amp_supported_dtype": [torch.bfloat16, torch.float16],
        "is_bf16_supported": True,
    }.items():
        setattr(module, method, lambda *args, _value=value, **kwargs: _value)
    module.device = Device
    module.current_device = library.get_device
    module.set_device = lambda device: library.set_device(index(device))
    module.get_rng_state = lambda device=None: torch.get_rng_state()
    module.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    module.memory_allocated = lambda device=None: library.bytes_allocated()
    module.max_memory_allocated = lambda device=None: library.bytes_at_most()
    module.reset_peak_memory_stats = lambda device=None: library.forget_peak()
    torch._register_device_module(name, module)
    torch.autograd.set_multithreading_enabled(False)  # a thread per device may start after the process has ended
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    return module
