"""Every kernel launch of every op's timed shapes compiles to machine code for GPUs that are not here."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from liger_kernel.bench import shapes
from liger_kernel.ops import EXPORTS, core

FULL = ("sm_80", "sm_86", "sm_89", "sm_100", "sm_120", "gfx90a", "gfx950", "gfx1100")
# Bytes of shared memory that a program may take: of an AMD compute unit, and of the NVIDIA ones with the least (8.6).
SHARED = {"gfx": 65536, "sm_": 101376}
# Bytes of stack (registers on AMD) at most, where a tile is held in registers but for these, and read once in return;
# on one target, where it is named.
SPILLS = {
    "softmax 8192x32768 _backward_kernel": 56,
    "dyt 16384x4096 _backward_kernel": 8,
    "dyt 65536x1024 _backward_kernel": 8,
    "dyt 2048x65536 _backward_kernel": 8,
    "sparsemax 8192x32768 _forward_kernel": 8,
    "sparsemax 4096x131072 _forward_kernel": 8,
    "rope 4x4096x(128+1)x64 deinterleaved _rope_kernel": 8,
    "fused_add_rms_norm 16384x4096 _backward_kernel": 8,
    "fused_add_rms_norm 8192x8192 _backward_kernel": 16,
    "modulated_rms_norm 2048x32768 for all _backward_kernel": 8,
    "rms_norm 1048576x128 _forward_kernel": 8,
    "mhc_coeffs 8192x4x4096 _project_kernel": 16,
    "mhc_coeffs 4096x4x7168 _project_kernel": 16,
    "mhc_coeffs 16384x2x2048 _project_kernel": 8,
    "mhc_coeffs 16384x2x2048 _project_backward_kernel": 8,
    # Its products of fp32, without matrix units for them, take more registers than a lane of 32 has.
    "gfx1100 mhc_coeffs 8192x4x4096 _project_backward_kernel": 197,
    "gfx1100 mhc_coeffs 4096x4x7168 _project_backward_kernel": 197,
}
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def offline(*arguments):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).with_name("offline.py"), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


def assert_fits(target, *arguments):
    """Shared memory and threads are within a program's limits, and no launch of a benchmarked shape spills."""
    pattern = re.compile(r"^(.*): \d+ registers, (\d+) spilled, (\d+) B shared, \{'num_warps': (\d+)", re.MULTILINE)
    launches = pattern.findall(offline("--target", target, *arguments))
    assert len(launches) > 40
    width = 64 if target.startswith("gfx9") else 32
    for name, spilled, shared, warps in launches:
        assert int(shared) <= SHARED[target[:3]], name
        assert int(warps) * width <= 1024, f"{name}: {warps} warps of {width}"
        most = SPILLS.get(name, SPILLS.get(name.split(maxsplit=1)[1], 0))
        assert " case " in name or int(spilled) <= most, f"{name} spills {spilled}"


@needs_triton
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_compiles_for(target):
    assert_fits(target)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942", *FULL])
def test_every_option_compiles_for(target):
    assert_fits(target, "--cases")


@needs_triton
def test_triton_launches_trace_into_one_graph():
    """What torch.compile sees on a GPU; test_contract.py compiles the torch pairs where there is none."""
    rooms = {op: importlib.import_module(f"liger_kernel.ops.{op}") for op in EXPORTS if core._has_triton_pair(op)}
    ops = [op for op, room in rooms.items() if hasattr(room, "CONTRACT")]
    traced = re.findall(r"^(\w+): traced into one graph$", offline("--trace", "--ops", ",".join(ops)), re.MULTILINE)
    assert set(traced) == set(ops)


@needs_triton
def test_random_batches_and_lengths_compile_nothing_after_two():
    found = re.findall(r"^(\w+): (\d+) of (\d+) compiled after", offline("--random-steps", "200"), re.MULTILINE)
    assert {op for op, *_ in found} == set(shapes.CALLS)
    for op, new, total in found:
        assert int(new) == 0 and int(total) >= 2, op
