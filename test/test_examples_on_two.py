"""The examples for several processes run as written, on two."""

import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENGINES = os.environ.get("LIGER_TEST_ENGINES")
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "{port}"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--config_file", "examples/fsdp2_accelerate.yaml"]
RUNS = {
    "torchrun_ddp": [*TORCHRUN, "examples/torchrun_ddp.py"],
    "fsdp2_accelerate": [*ACCELERATE, "--cpu", "--main_process_port", "{port}", "examples/fsdp2_accelerate.py"],
    "deepspeed_zero3": [*TORCHRUN, "test/deepspeed_on_cpu.py"],
    "lightning_fsdp": ["examples/lightning_fsdp.py"],
}
SLOW = ("deepspeed_zero3", "lightning_fsdp")


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in RUNS])
def test_an_example_trains_on_two_processes(name, tmp_path):
    if name in SLOW and not ENGINES:
        pytest.skip("LIGER_TEST_ENGINES names no folder with DeepSpeed and Lightning")
    path = os.pathsep.join([str(ROOT / "src"), *([ENGINES] if ENGINES else [])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("TRITON_INTERPRET", None)
    environment.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", MASTER_PORT=free_port())
    command = [sys.executable, *(part.format(port=free_port()) for part in RUNS[name]), "--steps", "2"]
    command = [str(ROOT / part) if part.startswith(("examples/", "test/")) else part for part in command]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    losses = [float(v) for v in re.findall(r"^loss: (\S+)", said, flags=re.M)]
    assert len(losses) == 2 and all(map(math.isfinite, losses)), said[-3000:]
