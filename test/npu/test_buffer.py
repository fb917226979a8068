"""Every launch of every op, at the sizes of real models, fits a core's Unified Buffer: 192 KB (910B), 248 KB (950)."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, Path(__file__).with_name("buffer.py")]


def lowered(*arguments):
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT / "src"), str(ROOT / "test")])
    done = subprocess.run(
        [*COMMAND, *arguments], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=1200
    )
    assert "kernels checked" in done.stdout, done.stderr[-3000:]
    return done


def test_every_launch_fits():
    done = lowered("Ascend910B2", "Ascend950PR_9589")
    wrong = [line for line in done.stdout.splitlines() if "overflow" in line or "int64 vectors of" in line]
    assert done.returncode == 0, "\n".join(wrong[:20]) or done.stdout[-2000:]
    total = int(re.search(r"(\d+) kernels checked, 0 do not fit", done.stdout)[1])
    assert total > 200, "hardly a kernel was lowered"
