"""On two ranks: what transformers' Trainer logs under an engine, unpatched and with use_liger_kernel=True, as JSON."""

import importlib
import json
import sys
import tempfile

import torch
from torch.utils.data import Dataset
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from support import tiny_model

ENGINE = sys.argv[1]
LAYERS = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
ZERO3 = {
    "zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
    "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
}  # fmt: skip
OPTIONS = {
    "ddp": {},
    "fsdp2": {"fsdp": "full_shard auto_wrap", "fsdp_config": {"version": 2, **LAYERS}},
    "zero3": {"deepspeed": ZERO3},
}


class Rows(Dataset):
    """Sequences whose numbers of labels differ."""

    def __len__(self):
        return 24

    def __getitem__(self, i):
        ids = torch.randint(3, 67, (24,), generator=torch.Generator().manual_seed(i))
        labels = ids.clone()
        labels[: i % 20] = -100
        return {"input_ids": ids, "labels": labels}


def logged(patched: bool) -> list:
    torch.manual_seed(1)
    model = tiny_model("llama", vocab_size=67, tie_word_embeddings=ENGINE == "fsdp2", use_cache=False)
    assert isinstance(model, LlamaForCausalLM)
    args = TrainingArguments(
        tempfile.mkdtemp(), use_cpu=True, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=3,
        learning_rate=0.5, optim="sgd", lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to=[],
        eval_strategy="steps", eval_steps=3, per_device_eval_batch_size=2, prediction_loss_only=True, disable_tqdm=True,
        use_liger_kernel=patched, seed=0, **OPTIONS[ENGINE],
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=Rows(), eval_dataset=Rows())
    trainer.train()
    names = "loss", "grad_norm", "eval_loss"
    return [{name: row[name] for name in names if name in row} for row in trainer.state.log_history[:-1]]


def main() -> None:
    engine, run = importlib.import_module("liger_kernel.ops.head"), []
    own = engine._run
    engine._run = lambda *given: run.append(1) or own(*given)
    importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy").SMALL = 0  # a tiny head takes the engine too
    if ENGINE == "zero3":  # where it would compile C++ first; gloo serves as well
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    found: dict = {"plain": logged(False), "runs unpatched": len(run)}
    found |= {"patched": logged(True), "runs": len(run)}
    if torch.distributed.get_rank() == 0:
        print(f"RESULT {json.dumps(found)}", flush=True)


main()
