"""Compile every kernel launch of an op for a GPU that is not here, and read the registers and spills it would use.

The op's contract is called on meta tensors, forward and backward, while Triton's launch is replaced by its compiler.
So what is compiled is what a user's step would launch, at the configs the launch tables choose.

    python test/offline.py --target sm_90 [--ops rms_norm,rope] [--cases]     # run without TRITON_INTERPRET
"""

from __future__ import annotations

import argparse
import importlib
import random
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import torch._dynamo
import torch.utils._triton
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from liger_kernel import backends
from liger_kernel.bench import shapes
from liger_kernel.ops import EXPORTS, core

AMD_CORES = {"gfx90a": 104, "gfx942": 304, "gfx950": 256, "gfx1100": 96}
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64",
            torch.int32: "*i32", torch.bool: "*i1", torch.uint8: "*u8"}  # fmt: skip


def target_of(name: str) -> GPUTarget:
    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name[3:]), 32)
    return GPUTarget("hip", name, 32 if name.startswith("gfx1") else 64)


def pretend(name: str) -> None:
    """Give the meta device the facts of the target, so that the launch tables choose as they would there."""
    target = target_of(name)
    warps = 16 if target.warp_size == 64 else 32
    backends._BY_TYPE["meta"] = backends.Backend(
        name="meta", device_type="meta", is_available=lambda: True, why_no_triton=lambda: None,
        cores=lambda device: AMD_CORES.get(name, 132), warp_width=target.warp_size, max_warps=warps,
    )  # fmt: skip


class Compiler:
    """Stands where JITFunction.run is: compiles each distinct launch once and keeps what it needs."""

    def __init__(self, name: str):
        self.name, self.target, self.seen = name, target_of(name), {}

    def __call__(self, kernel, *args, grid, warmup, **meta):
        signature, constants, attributes, options = specialised(kernel, args, meta)
        key = (kernel.__name__, str(signature), str(constants), str(attributes), str(options))
        if key not in self.seen:
            self.seen[key] = self.built(kernel, signature, constants, attributes, options)

    def built(self, kernel, signature, constants, attributes, options):
        source = ASTSource(kernel, signature, constants, attributes)
        return Launch(self.name, triton.compile(source, target=self.target, options=options), options)


class Counter(Compiler):
    """Keeps what would be compiled, and compiles nothing."""

    def built(self, kernel, *specialisation):
        return specialisation


def specialised(kernel, args, meta) -> tuple[dict, dict, dict, dict]:
    """(signature, constants, attributes, options): all that Triton compiles a launch for."""
    options = {k: meta.pop(k) for k in ("num_warps", "num_stages") if k in meta}
    bound = dict(zip([p.name for p in kernel.params], args)) | meta
    signature, constants, attributes = {}, {}, {}
    for i, param in enumerate(kernel.params):
        value = bound[param.name]
        if param.is_constexpr or value is None:
            signature[param.name] = "constexpr"
            constants[(i,)] = value
        elif isinstance(value, torch.Tensor):
            signature[param.name] = POINTERS[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif value == 1 and not param.do_not_specialize:
            signature[param.name] = "constexpr"
            constants[(i,)] = 1
        else:
            signature[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not param.do_not_specialize:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes, options


class Launch:
    def __init__(self, target: str, compiled, options):
        self.name, self.shared, self.options = compiled.metadata.name, compiled.metadata.shared, options
        self.registers, self.spilled = nvidia(compiled) if target.startswith("sm_") else amd(compiled)


def nvidia(compiled) -> tuple[int, int]:
    """(registers per thread, bytes of stack) from the machine code."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        text = subprocess.run([tool, "--dump-resource-usage", f.name], capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return int(registers), int(stack)


def amd(compiled) -> tuple[int, int]:
    """(vector registers per lane, spilled registers) from the assembly's metadata."""
    text = compiled.asm["amdgcn"]
    return int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1]), int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1])


def leaves_of(case) -> list:
    return [a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in case.args]


def call_on_meta(contract, case) -> None:
    outputs = contract.call(*leaves_of(case), **case.kwargs)
    grown = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o is not None and o.requires_grad]
    torch.autograd.backward(grown, [torch.empty_like(o) for o in grown])


def trace(op: str, contract) -> None:
    """Trace the Triton launches of the first small cases into one graph, forward and backward."""
    torch.utils._triton.has_triton = lambda: True  # Dynamo looks for a GPU before it knows what a kernel is
    torch._dynamo.reset()
    compiled = torch.compile(contract.call, fullgraph=True, backend="eager")
    for case in contract.cases(torch.float32, torch.device("meta"))[:2]:
        compiled(*leaves_of(case), **case.kwargs)
        print(f"{op}: traced into one graph")


def count_random_steps(op: str, contract, target: str, steps: int) -> None:
    """Call the op as a model does at `steps` random batches and lengths; print what is compiled after the first two."""
    counter, draw = Counter(target), shapes.Draw(torch.bfloat16, torch.device("meta"))
    JITFunction.run = lambda kernel, *a, **k: counter(kernel, *a, **k)
    random.seed(0)
    for step in range(2 + steps):
        model = replace(shapes.MODELS["llama3.2-1b"], batch=random.randint(1, 16), seq=random.randint(1, 4096))
        call_on_meta(contract, shapes.CALLS[op](draw, model))
        if step == 1:
            warm = set(counter.seen)
    new = sorted({name for name, *_ in set(counter.seen) - warm})
    print(f"{op}: {len(new)} of {len(warm) + len(new)} compiled after two warm-ups: {', '.join(new) or '-'}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="sm_90")
    parser.add_argument("--ops", default=",".join(EXPORTS))
    parser.add_argument("--cases", action="store_true", help="the small test cases too, not only the timed shapes")
    parser.add_argument("--trace", action="store_true", help="trace with torch.compile in place of compiling")
    parser.add_argument("--random-steps", type=int, help="count what so many random batches and lengths would compile")
    args = parser.parse_args()
    pretend(args.target)
    core.set_impl("triton")
    total = 0
    for op in args.ops.split(","):
        room = importlib.import_module(f"liger_kernel.ops.{op}")
        if not hasattr(room, "CONTRACT") or not core._has_triton_pair(op):
            continue
        if args.trace:
            trace(op, room.CONTRACT)
            continue
        if args.random_steps:
            if op in shapes.CALLS:
                count_random_steps(op, room.CONTRACT, args.target, args.random_steps)
            continue
        meta, cases = torch.device("meta"), {}
        if args.cases:
            cases = {f"case {i}": case for i, case in enumerate(room.CONTRACT.cases(torch.bfloat16, meta))}
        for label, case in {**room.CONTRACT.timed(torch.bfloat16, meta), **cases}.items():
            compiler = Compiler(args.target)
            JITFunction.run = lambda kernel, *a, _compiler=compiler, **k: _compiler(kernel, *a, **k)
            call_on_meta(room.CONTRACT, case)
            for launch in compiler.seen.values():
                total += 1
                print(f"{args.target} {op} {label} {launch.name}: {launch.registers} registers, "
                      f"{launch.spilled} spilled, {launch.shared} B shared, {launch.options}")  # fmt: skip
    if total:
        print(f"{total} launches compiled for {args.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
