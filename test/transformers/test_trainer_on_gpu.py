"""What use_liger_kernel=True saves of a card's memory at a real size. Run as a script, this is one such training."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from liger_kernel import backends  # noqa: E402
from liger_kernel.cli.memory import Meter  # noqa: E402

ROOT = Path(__file__).parents[2]
STEPS = 3


class Rows(torch.utils.data.Dataset):
    """As many random rows as the steps take."""

    def __init__(self, batch, length, vocab):
        self.ids = torch.randint(vocab, (STEPS * batch, length), generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def train(shape, batch, length, liger):
    """The loss of each step, and the bytes at the highest point, weights and optimizer included."""
    from liger_kernel.bench.model import Job, build

    meter = Meter(torch.device(backends.current().device_type))
    model = build(Job("", shape, batch, length))  # its weights are bf16
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            folder, max_steps=STEPS, per_device_train_batch_size=batch, bf16=True, optim="adamw_torch_fused",
            learning_rate=1e-5, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
            use_cpu=meter.device.type == "cpu", use_liger_kernel=liger,
        )  # fmt: skip
        arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs would make it a DataParallel
        rows = Rows(batch, length, model.config.vocab_size)
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return {"losses": losses, "peak": meter.peak(), "patched": "_liger_head" in model.__dict__}


def in_a_process(*arguments):
    """What train returns, of a process of its own."""
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, __file__, json.dumps(arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.gpu
@pytest.mark.slow
def test_a_1b_model_with_use_liger_kernel_needs_less_than_half_the_memory():
    total = torch.cuda.get_device_properties(0).total_memory
    if total < 70 * 2**30:
        pytest.skip(f"unpatched it needs some 60 GiB, this device has {total / 2**30:.0f}")
    stock, liger = (in_a_process("llama3.2-1b", 8, 2048, patched) for patched in (False, True))
    print(f"\nunpatched {stock['peak'] / 2**30:.2f} GiB, {stock['losses']}")
    print(f"use_liger_kernel=True {liger['peak'] / 2**30:.2f} GiB, {liger['losses']}")
    assert liger["patched"] and not stock["patched"]
    assert len(stock["losses"]) == STEPS
    # bf16: other kernels move these losses by up to 2.3e-4 (benchmark/results, hf and liger); ten times that
    assert liger["losses"] == pytest.approx(stock["losses"], abs=2e-3)
    assert liger["peak"] < 0.5 * stock["peak"]


if __name__ == "__main__":
    print(json.dumps(train(*json.loads(sys.argv[1]))))
