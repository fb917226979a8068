"""Hugging Face's Trainer with use_liger_kernel=True trains as it does without, on the transformers installed here.

The last test runs this and all that depends on transformers again on its version 4.57, where that is (the Makefile
puts it there).
"""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support import tiny_model

AcceleratorState = pytest.importorskip("accelerate.state").AcceleratorState
transformers = pytest.importorskip("transformers")

from liger_kernel import backends  # noqa: E402
from liger_kernel.transformers import revert_liger_kernel  # noqa: E402
from liger_kernel.transformers.lazy_logits import LazyLogits  # noqa: E402

ROOT = Path(__file__).parents[2]
OLD = Path(os.environ.get("LIGER_TEST_TRANSFORMERS_457", ROOT / ".deps/transformers-4.57"))
ON_OLD = ("kinds", "patch", "head*", "monkey_patch", "auto_model", "loss_utils", "trainer_integration")
FP32 = 1e-5  # twenty units in the last place of these losses of about 5, for four steps' sums in another order
LOGGED = FP32 + (1e-4 if transformers.__version__ < "5" else 0)  # Trainer logged four decimals: equal may round apart
BF16 = 2e-2  # 2^-8 of a loss of about 5: one rounding, where one run rounds and the other does not
KERNELS = {"rms_norm": True, "rope": True, "fused_linear_cross_entropy": True}


@pytest.fixture(autouse=True)
def reverted(monkeypatch):
    """Models to revert. What is process-wide ends with each test: patched rope, accelerate's mixed precision."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # bf16=True sets it for good
    made = []
    yield made
    AcceleratorState._reset_state(True)
    for model in made:
        revert_liger_kernel(model)


class Rows(torch.utils.data.Dataset):
    """Rows with different numbers of ignored labels, so that tokens per micro-batch differ."""

    def __init__(self, n=24, length=12):
        generator = torch.Generator().manual_seed(5)
        self.ids = torch.randint(3, 40, (n, length), generator=generator)
        self.ignored = torch.randint(0, length - 2, (n,), generator=generator).tolist()

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        labels = self.ids[i].clone()
        labels[: self.ignored[i]] = -100
        return {"input_ids": self.ids[i], "attention_mask": torch.ones_like(labels), "labels": labels}


def on_cpu():
    return backends.current().device_type == "cpu"


def trainer(tmp_path, model_type, liger, config=KERNELS, steps=4, seed=0, reverted=None, **options):
    torch.manual_seed(seed)
    model = tiny_model(model_type)
    if reverted is not None:
        reverted.append(model)
    compute_metrics = options.pop("compute_metrics", None)
    arguments = dict(
        output_dir=str(tmp_path), max_steps=steps, per_device_train_batch_size=2, per_device_eval_batch_size=4,
        gradient_accumulation_steps=2, learning_rate=1e-2, logging_steps=1, report_to=[], save_strategy="no",
        use_cpu=on_cpu(), disable_tqdm=True, use_liger_kernel=liger, liger_kernel_config=config if liger else None,
        adam_epsilon=1e-4,  # Adam divides by it where a gradient is 0: rounding would decide the sign of a step there
    )  # fmt: skip
    arguments = transformers.TrainingArguments(**(arguments | options))
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs would make it a DataParallel of more rows per step
    return transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=Rows(),
        eval_dataset=Rows(8),
        compute_metrics=compute_metrics,
    )


def losses(made):
    return [row["loss"] for row in made.state.log_history if "loss" in row]


CASES = {
    "accumulation": {},
    "activation checkpointing": {"gradient_checkpointing": True},
    "bf16 autocast": {"bf16": True},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_trained_losses_are_those_of_the_stock_trainer(model_type, options, tmp_path, fused_calls, reverted):
    stock = trainer(tmp_path, model_type, False, **options)
    stock.train()
    assert not fused_calls
    liger = trainer(tmp_path, model_type, True, reverted=reverted, **options)
    liger.train()
    assert len(fused_calls) == 8  # 4 steps of 2 micro-batches
    assert all(call["reduction"] == "sum" for call in fused_calls)  # num_items_in_batch arrived
    wanted = losses(stock)
    assert len(wanted) == 4 and wanted[-1] < wanted[0] - 0.3, "nothing was learned, so nothing is compared"
    assert losses(liger) == pytest.approx(wanted, abs=BF16 if options.get("bf16") else LOGGED)


def test_training_twice_patches_once_and_goes_on(tmp_path, fused_calls, reverted):
    made = [trainer(tmp_path, "llama", liger, steps=2) for liger in (False, True)]
    reverted.append(made[1].model)
    for one in made:
        one.train()
        one.train()
    assert len(fused_calls) == 8
    assert losses(made[1]) == pytest.approx(losses(made[0]), abs=LOGGED)


def test_generation_after_training_is_that_of_the_stock_model(tmp_path, reverted):
    texts = []
    for liger in (False, True):
        made = trainer(tmp_path, "gemma2", liger, reverted=reverted)
        made.train()
        model = made.accelerator.unwrap_model(made.model).eval()
        start = torch.arange(3, 9, device=model.device)[None]
        texts.append(model.generate(start, max_new_tokens=8, do_sample=False, pad_token_id=0))
    assert torch.equal(*texts)


def test_loss_only_evaluation_builds_no_logits(tmp_path, fused_calls, reverted, monkeypatch):
    built = []
    own = LazyLogits.materialize
    monkeypatch.setattr(LazyLogits, "materialize", lambda self, **options: built.append(1) or own(self, **options))
    made = trainer(tmp_path, "gemma2", True, reverted=reverted, prediction_loss_only=True)
    stock = trainer(tmp_path, "gemma2", False, prediction_loss_only=True)
    made.train(), stock.train()
    fused_calls.clear()
    loss, wanted = made.evaluate()["eval_loss"], stock.evaluate()["eval_loss"]
    says_so = "skip_logits" in inspect.getsource(transformers.Trainer.prediction_step)  # 4.57 does not
    assert len(fused_calls) == (2 if says_so else 0) and not built  # 8 rows in batches of 4
    assert loss == pytest.approx(wanted, abs=FP32)


def test_metrics_get_real_logits(tmp_path, fused_calls, reverted):
    def compute_metrics(prediction):
        return {"top": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    values = []
    for liger in (False, True):
        made = trainer(tmp_path, "llama", liger, reverted=reverted, compute_metrics=compute_metrics)
        made.train()
        fused_calls.clear()
        values.append(made.evaluate())
        assert not fused_calls
    assert values[1]["eval_top"] == values[0]["eval_top"]
    assert values[1]["eval_loss"] == pytest.approx(values[0]["eval_loss"], abs=FP32)


def test_label_smoothing_of_the_trainer_sees_real_logits(tmp_path, fused_calls, reverted):
    made = [trainer(tmp_path, "llama", liger, label_smoothing_factor=0.1) for liger in (False, True)]
    reverted.append(made[1].model)
    for one in made:
        one.train()
    assert losses(made[1]) == pytest.approx(losses(made[0]), abs=LOGGED)
    assert not fused_calls  # the trainer takes the labels away and computes the loss itself


def test_the_head_flag_switches_the_head_only(tmp_path, fused_calls, reverted):
    config = {"fused_linear_cross_entropy": False}
    made = trainer(tmp_path, "llama", True, config, reverted=reverted)
    forward = type(made.model).forward
    made.train()
    assert not fused_calls and "_liger_head" not in made.model.__dict__
    assert type(made.model).forward is forward


def test_peft_model_in_the_trainer(tmp_path, fused_calls, reverted):
    peft = pytest.importorskip("peft")
    made = []
    for liger in (False, True):
        one = trainer(tmp_path, "llama", liger, reverted=reverted)
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "lm_head"])
        made.append(
            transformers.Trainer(model=peft.get_peft_model(one.model, config), args=one.args, train_dataset=Rows())
        )
        made[-1].train()
    assert len(fused_calls) == 8
    assert losses(made[1]) == pytest.approx(losses(made[0]), abs=LOGGED)


@pytest.mark.skipif(transformers.__version__.startswith("4.57"), reason="is what the last test runs")
@pytest.mark.skipif(not OLD.is_dir(), reason=f"no transformers 4.57 in {OLD}: make test puts it there")
@pytest.mark.timeout(900)
def test_patching_heads_training_and_the_trainer_on_transformers_4_57():
    paths = os.pathsep.join(filter(None, [str(OLD), os.environ.get("PYTHONPATH")]))
    here = Path(__file__).parent
    files = [str(f) for name in ON_OLD for f in sorted(here.glob(f"test_{name}.py"))] + [str(ROOT / "test/convergence")]
    script = "; ".join([
        "import sys",
        "sys.modules['datasets'] = None",  # the one installed here needs a newer hub client than this transformers
        "import pytest, transformers",
        "assert transformers.__version__.startswith('4.57')",
        f"sys.exit(pytest.main([*{files}, '-k', 'not compiles']))",
    ])  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"PYTHONPATH": paths}
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(run.stdout[-3000:])
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-3000:]
