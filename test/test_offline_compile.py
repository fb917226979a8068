"""Every kernel launch of every op's timed shapes compiles to machine code for GPUs that are not here."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FULL = ("sm_80", "sm_100", "gfx90a", "gfx950", "gfx1100")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("target", ["sm_90", "gfx942", *(pytest.param(t, marks=pytest.mark.slow) for t in FULL)])
def test_compiles_for(target):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("offline.py")
    result = subprocess.run(
        [sys.executable, script, "--target", target], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    shared = [int(n) for n in re.findall(r"(\d+) B shared", result.stdout)]
    assert shared and max(shared) <= (65536 if target.startswith("gfx") else 101376)
