"""An Ascend NPU without one: triton-ascend lowers a kernel, Huawei's compiler checks it, the host's processor runs it.

What is real: triton-ascend's front end and its lowering to linalg, and bishengir-compile up to the last, closed step,
with its planning of the Unified Buffer. What is not: the machine code, its rounding, and programs that run at once.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

ARCH = "Ascend910B2"
CORES = 48  # vector cores of a 910B2, as bishengir's description of it has them

MLIR = Path("/usr/lib/llvm-19/bin")  # Debian's mlir-19-tools and llvm-19
PASSES = [
    "convert-elementwise-to-linalg",
    "linalg-fuse-elementwise-ops",
    "eliminate-empty-tensors",
    "empty-tensor-to-alloc-tensor",
    "one-shot-bufferize=allow-return-allocs-from-loops=true",
    "convert-linalg-to-loops",
    "lower-affine",
    "expand-strided-metadata",
    "lower-affine",
    "convert-scf-to-cf",
    "convert-math-to-llvm",
    "convert-math-to-libm",
    "arith-expand=include-bf16=true",
    "convert-arith-to-llvm",
    "convert-complex-to-llvm",
    "convert-vector-to-llvm",
    "convert-index-to-llvm",
    "finalize-memref-to-llvm",
    "convert-func-to-llvm",  # branches too, and the tensors they carry, which convert-cf-to-llvm would not
    "convert-arith-to-llvm",
    "reconcile-unrealized-casts",
]


def cannot_lower() -> str | None:
    """Why kernels cannot be lowered and checked here, or None."""
    return None if importlib.util.find_spec("ascendnpuir") else "triton-ascend and ascendnpu-ir: `make test-npu`"


def cannot_run() -> str | None:
    """Why lowered kernels cannot run here, or None."""
    missing = [tool for tool in ("mlir-opt", "mlir-translate", "llc") if not (MLIR / tool).exists()]
    missing += [tool for tool in ("gcc",) if not shutil.which(tool)]
    return f"{', '.join(missing)}: Debian's mlir-19-tools, llvm-19 and gcc" if missing else None


class DoesNotFit(RuntimeError):
    """Huawei's compiler rejects a kernel, most often because its tiles do not fit the Unified Buffer."""


# Checking and building


@functools.cache
def steady(tool: Path) -> Path:
    """A script that runs a compiler at the same addresses each time, and once more if it dies all the same.

    triton-adapter-opt reads memory it does not own: at random addresses a signal ends about 1 run in 400 of the same
    kernel, at fixed ones none of 5600 did. What it says of a kernel, it says with an exit status, which is kept.
    """
    may = subprocess.run("setarch -R true", shell=True, stderr=subprocess.DEVNULL).returncode == 0
    script = Path(tempfile.mkdtemp(), tool.name)
    fixed = f"setarch -R {tool}" if may else tool
    script.write_text(f'#!/bin/sh\n{fixed} "$@"\nstatus=$?\n[ $status -lt 128 ] && exit $status\nexec {tool} "$@"\n')
    script.chmod(0o755)
    return script


@functools.cache
def last_compiler() -> Path:
    """A folder with stand-ins for the one step that is not public: they take what they are given."""
    folder = Path(tempfile.mkdtemp())
    for name in ("hivmc", "hivmc-a5"):
        (folder / name).write_text("#!/bin/sh\nexit 0\n")
        (folder / name).chmod(0o755)
    return folder


def check(linalg: str, arch: str) -> str | None:
    """What bishengir-compile has against a kernel for `arch`, or None."""
    tools = Path(importlib.util.find_spec("ascendnpuir").origin).parent / "bin"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.mlir")
        source.write_text(re.sub(r', mix_mode\s*=\s*"[^"]*"', "", linalg))
        done = subprocess.run(
            [steady(tools / "bishengir-compile"), source, f"--target={arch}", "--enable-auto-multi-buffer=True",
             "--enable-auto-bind-sub-block=True", "--enable-hfusion-compile=true", "--enable-hivm-compile=true",
             "--enable-triton-kernel-compile=true", "-o", Path(folder, "kernel")],
            capture_output=True, text=True, cwd=folder,
            env=os.environ | {"PATH": f"{last_compiler()}:{tools}:{os.environ['PATH']}"},
        )  # fmt: skip
    if done.returncode == 0:
        return None
    return "\n".join(line for line in done.stderr.splitlines() if "error" in line)[:2000] or done.stderr[:2000]


def run_tool(*command) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name}: {done.stderr[:2000]}")


@functools.cache
def runtime_object() -> Path:
    """runtime.c, compiled once for this process."""
    target = Path(tempfile.mkdtemp(), "runtime.o")
    run_tool("gcc", "-O2", "-fPIC", "-c", Path(__file__).with_name("runtime.c"), "-o", target)
    return target


def build(linalg: str) -> bytes:
    """The lowered kernel as a shared library for this machine."""
    text = re.sub(r"\{hivm\.unlikely_condition\}|\{tt\.[^}]*\}", "", linalg)
    text = re.sub(r"^\s*gpu.barrier.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"attributes \{[^}]*\}", "attributes {llvm.emit_c_interface}", text, count=1)
    with tempfile.TemporaryDirectory() as folder:
        stages = [Path(folder, name) for name in ("kernel.mlir", "llvm.mlir", "kernel.ll", "kernel.o", "kernel.so")]
        stages[0].write_text(text)
        run_tool(MLIR / "mlir-opt", stages[0], *(f"--{p}" for p in PASSES), "-o", stages[1])
        run_tool(MLIR / "mlir-translate", stages[1], "--mlir-to-llvmir", "-o", stages[2])
        run_tool(MLIR / "llc", "-O1", "-relocation-model=pic", "-filetype=obj", stages[2], "-o", stages[3])
        run_tool("gcc", "-shared", "-o", stages[4], stages[3], runtime_object(), "-lm")
        return stages[4].read_bytes()


# The driver that Triton is given


class Memref(ctypes.Structure):
    _fields_ = [("allocated", ctypes.c_void_p), ("aligned", ctypes.c_void_p), ("offset", ctypes.c_int64),
                ("size", ctypes.c_int64), ("stride", ctypes.c_int64)]  # fmt: skip


NUMBERS = {"i1": ctypes.c_int8, "i8": ctypes.c_int8, "i16": ctypes.c_int16, "i32": ctypes.c_int32,
           "i64": ctypes.c_int64, "fp32": ctypes.c_float, "fp64": ctypes.c_double}  # fmt: skip


class Launcher:
    """Calls a built kernel once per program, one after the other."""

    def __init__(self, source, metadata):
        index = lambda key: source.fn.arg_names.index(key) if isinstance(key, str) else key  # noqa: E731
        constants = {index(key) for key in source.constants}
        self.kinds = [None if index(key) in constants else kind for key, kind in source.signature.items()]

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter, leave, *args):
        assert (y, z) == (1, 1) and x <= CORES, f"{x} x {y} x {z} programs for {CORES} cores"
        if function is None:
            return
        memrefs, passed = [Memref(), Memref()], []
        for kind, value in zip(self.kinds, args):
            if kind is None:
                continue
            if kind[0] == "*":
                pointer = value.data_ptr() if value is not None else None
                memrefs.append(Memref(pointer, pointer, 0, value.numel() if value is not None else 0, 1))
                passed.append(ctypes.byref(memrefs[-1]))
            else:
                passed.append(NUMBERS[kind](value))
        lead = [ctypes.byref(memref) for memref in memrefs[:2]]  # the locks and the workspace of a real launch
        grid = [ctypes.c_int32(n) for n in (x, y, z)]
        for program in range(x):
            function(*lead, *passed, *grid, ctypes.c_int32(program), ctypes.c_int32(0), ctypes.c_int32(0))


class Utils:
    """What Triton asks of a device's driver."""

    libraries: dict[str, ctypes.CDLL] = {}

    def load_binary(self, name, kernel, shared, device):
        if not kernel:
            return None, None, 0, 0
        key = hashlib.sha256(kernel).hexdigest()
        if key not in self.libraries:
            with tempfile.NamedTemporaryFile(suffix=".so") as file:
                file.write(kernel)
                file.flush()
                self.libraries[key] = ctypes.CDLL(file.name)
        function = getattr(self.libraries[key], f"_mlir_ciface_{name.split()[0]}")
        function.restype = None
        return self.libraries[key], function, 0, 0

    def get_device_properties(self, device):
        return {"max_shared_mem": 1, "num_aicore": CORES // 2, "num_vectorcore": CORES}

    def get_arch(self):
        return ARCH

    def get_aicore_num(self):
        return CORES // 2

    def get_aivector_core_num(self):
        return CORES


class Driver:
    launcher_cls = Launcher

    def __init__(self, arch: str):
        self.utils, self.arch = Utils(), arch

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("npu", self.arch, 0)

    def get_current_device(self):
        return 0

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device=None):
        return 0

    def get_device_interface(self):
        return torch.npu


def install(runs: bool = True, arch: str = ARCH, after=check) -> None:
    """Make this process's Triton lower for `arch`, check each kernel with after(linalg, arch), and run it if `runs`."""
    from triton.backends import backends
    from triton.runtime import driver

    stages = backends["ascend"].compiler.add_stages.__globals__  # the module is loaded under a name of its own

    def to_binary(linalg, metadata, options):
        linalg, metadata = stages["_parse_linalg_metadata"](linalg, metadata)
        if complaint := after(linalg, arch):
            raise DoesNotFit(f"{metadata['kernel_name']}: {complaint}")
        return build(linalg) if runs else b""

    adapter = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "ascend" / "triton-adapter-opt"
    stages["_get_triton_adapter_opt_path"] = lambda: str(steady(adapter))
    stages["linalg_to_bin_enable_npu_compile_A2_A3"] = to_binary
    driver.set_active(Driver(arch))


def watch_lowering(see) -> None:
    """Call see(ir) with Triton's IR of each kernel before it is lowered."""
    from triton.backends import backends

    stages = backends["ascend"].compiler.add_stages.__globals__
    lower = stages["ttir_to_linalg"]

    def watched(module, *args, **kwargs):
        see(str(module))
        return lower(module, *args, **kwargs)

    stages["ttir_to_linalg"] = watched
