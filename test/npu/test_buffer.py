"""Every launch of every op, at the sizes of real models, fits a core's Unified Buffer: 192 KB (910B), 248 KB (950)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from liger_kernel.ops import core
from test_contract import OPS

ROOT = Path(__file__).parents[2]
TRITON = [op for op in OPS if core._has_triton_pair(op)]


@pytest.mark.parametrize("op", TRITON)
def test_every_launch_fits(op):
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT / "src"), str(ROOT / "test")])
    command = [sys.executable, Path(__file__).with_name("buffer.py"), "Ascend910B2", "Ascend950PR_9589", "--ops", op]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=900)
    checked = re.search(r"(\d+) kernels checked, 0 do not fit, 0 calls", done.stdout)
    wrong = [line for line in done.stdout.splitlines() if "overflow" in line or "int64 vectors of" in line]
    assert done.returncode == 0 and checked, "\n".join(wrong[:20]) or (done.stdout + done.stderr)[-3000:]
    assert int(checked[1]) >= 8, "two kernels, two dtypes, two devices: hardly any was lowered"
