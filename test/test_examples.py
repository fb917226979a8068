"""The examples run as written, on their tiny models."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import test_examples_on_two

ROOT = Path(__file__).parent.parent
TRL = os.environ.get("LIGER_TEST_TRL")
RUNS = {"distill": "", "dpo_trl": "1.12", "sft_trl": "1.16"}  # the TRL of each


@pytest.fixture(scope="module")
def running():
    """All of them at once: what they wait for is mostly imports."""
    started = {}
    for name, version in RUNS.items():
        if version and not TRL:
            continue
        path = os.pathsep.join([str(ROOT / "src"), *([f"{TRL}/{version}"] if version else [])])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        environment.pop("TRITON_INTERPRET", None)
        started[name] = subprocess.Popen(
            [sys.executable, str(ROOT / f"examples/{name}.py"), "--steps", "2"], env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    yield started
    for process in started.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("name", RUNS)
def test_an_example_trains(name, running):
    if name not in running:
        pytest.skip("LIGER_TEST_TRL names no folder with TRL's versions")
    said, _ = running[name].communicate(timeout=300)
    assert running[name].returncode == 0, said[-3000:]
    losses = [float(v) for v in re.findall(r"loss'?:? '?(-?\d[\d.e-]*)", said)]
    assert len(losses) >= 2 and all(map(math.isfinite, losses)), said[-3000:]


def test_every_example_is_run():
    assert {p.stem for p in (ROOT / "examples").glob("*.py")} == {*RUNS, *test_examples_on_two.RUNS, "several", "tiny"}
