"""transformers' Trainer logs the same with use_liger_kernel=True, on two processes and whatever engine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("engine", [
    pytest.param("ddp", marks=pytest.mark.slow), "fsdp2", pytest.param("zero3", marks=pytest.mark.slow),
])  # fmt: skip
def test_the_trainer_logs_what_it_logs_unpatched(engine, tmp_path):
    engines = os.environ.get("LIGER_TEST_ENGINES")
    if engine == "zero3":
        pytest.importorskip("deepspeed")
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "test"), *([engines] if engines else [])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.update(DS_ACCELERATOR="cpu", ACCELERATE_USE_CPU="true")
    environment.pop("TRITON_INTERPRET", None)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(ROOT / "test/trainer_on_two.py"), engine]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    found = json.loads(line[7:])
    # Three steps of two batches; in evaluation, 24 sequences in batches of two on two processes.
    assert (found["runs unpatched"], found["runs"]) == (0, 3 * 2 + 6)
    plain, patched = found["plain"], found["patched"]
    assert [*map(set, patched)] == [{"loss", "grad_norm"}] * 3 + [{"eval_loss"}]
    losses = [row["loss"] for row in plain[:3]]
    assert max(losses) - min(losses) > 1e-2  # so that a wrong step shows in the next loss
    for ours, theirs in zip(patched, plain, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)  # fp32 of 24 bits, sums in another order
