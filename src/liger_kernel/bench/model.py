"""Whole training steps of a model with random weights, each contender in a process of its own."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from liger_kernel.bench import measure, peers
from liger_kernel.bench.process import Asked, Worker, base_folder, stop_after
from liger_kernel.bench.shapes import MODELS
from liger_kernel.cli.memory import Meter

CONTENDERS = ("torch", "compile", "liger")
FIRST_CONTEXT = 8192


@dataclass(frozen=True)
class Job:
    """What one contender shall train."""

    contender: str  # torch, compile, liger, base, ours, ours+compile
    model: str
    batch: int
    seq: int
    steps: int = 8
    warmup: int = 3
    checkpoint: bool = False
    optimizer: bool = True
    longest_context: bool = False
    profile: bool = False
    folder: str = ""  # where another liger_kernel is taken from
    rank: int = 0  # among processes that train together, each on tokens of its own


def build(job: Job):
    """A causal LM of the shape with random weights, the same at every call, in bf16 (fp32 on a CPU)."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    shape = MODELS[job.model]
    sizes: dict = dict(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
        vocab_size=shape.vocabulary, tie_word_embeddings=shape.tied, max_position_embeddings=131072, use_cache=False,
    )  # fmt: skip
    config = CONFIG_MAPPING[shape.type](**sizes)
    torch.manual_seed(0)
    with torch.device(measure.device()):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype(), attn_implementation="sdpa")
    if job.checkpoint:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def dtype() -> torch.dtype:
    return torch.float32 if measure.device().type == "cpu" else torch.bfloat16


def patch(model, job: Job):
    """The model a contender trains, and a sentence on what was done to it."""
    if job.contender == "compile":
        return torch.compile(model), "torch.compile"
    if job.contender == "liger":
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model)
        return model, "upstream"
    if job.contender in ("ours", "base", "ours+compile"):
        from liger_kernel.transformers import apply_liger_kernel

        done = f"{len(apply_liger_kernel(model).patched)} modules patched"
        return (torch.compile(model), f"{done}, compiled") if "compile" in job.contender else (model, done)
    return model, "unpatched"


class Trainer:
    """A model, its optimiser, and one step at a time on random tokens."""

    def __init__(self, job: Job):
        if job.contender in ("liger", "base"):
            peers.take_from(Path(job.folder))
        self.job = job
        self.plain = build(job)
        model, self.patched = patch(self.plain, job)
        self.model = self.wrap(model)
        self.optimizer = None
        if job.optimizer:
            fused = measure.device().type != "cpu"
            self.optimizer = torch.optim.AdamW(self.plain.parameters(), lr=1e-5, fused=fused)
        self.generator = torch.Generator().manual_seed(1 + job.rank)

    def wrap(self, model):
        """What is called for the patched model, before its parameters are given to the optimiser."""
        return model

    def step(self, batch: int, seq: int) -> tuple[float, float]:
        """(seconds, loss) of one step on new tokens."""
        vocabulary = self.plain.config.vocab_size
        ids = torch.randint(0, vocabulary, (batch, seq), generator=self.generator).to(measure.device())
        measure.synchronize()
        start = time.perf_counter()
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        if self.optimizer:
            self.optimizer.step()
        self.plain.zero_grad(set_to_none=True)
        measure.synchronize()
        return time.perf_counter() - start, loss.item()

    def measure(self, batch: int, seq: int) -> dict:
        """Tokens per second, peak memory and losses, or that memory ran out."""
        row = {"contender": self.job.contender, "model": self.job.model, "batch": batch, "seq": seq,
               "optimizer": self.job.optimizer, "checkpoint": self.job.checkpoint, "patched": self.patched}  # fmt: skip
        meter, seconds, losses = Meter(measure.device()), [], []
        try:
            for i in range(self.job.warmup + self.job.steps):
                if i == self.job.warmup:
                    meter.reset()
                taken, loss = self.step(batch, seq)
                seconds.append(taken)
                losses.append(loss)
        except torch.OutOfMemoryError:
            return row | {"out_of_memory": True}
        step = statistics.median(seconds[self.job.warmup :])
        peak = (meter.base + meter.peak()) / 2**30
        return row | {"tokens_per_s": round(batch * seq / step), "peak_GiB": round(peak, 2),
                      "step_ms": round(step * 1000, 1), "loss": losses}  # fmt: skip


def work(job: Job) -> None:
    """Train as the job says and print each row."""
    trainer = Trainer(job)
    batch, seq = (1, FIRST_CONTEXT) if job.longest_context else (job.batch, job.seq)
    while True:
        row = trainer.measure(batch, seq)
        print("ROW " + json.dumps(row), flush=True)
        if not job.longest_context or "out_of_memory" in row:
            break
        seq *= 2
    if job.profile:
        from liger_kernel.bench import profile

        for line in profile.of(lambda: trainer.step(batch, seq)):
            print("TEXT " + line, flush=True)


def drive(args: argparse.Namespace) -> int:
    """Run every contender of the command line, print and save; the exit code."""
    if args.model not in MODELS:
        raise Asked(f"--model knows {', '.join(MODELS)}, not {args.model!r}")
    against = [name for name in args.against.split(",") if name]
    for name in against:
        if name not in CONTENDERS:
            raise Asked(f"--against knows {', '.join(CONTENDERS)} for a whole model, not {name!r}")
    if "liger" in against and not args.peers:
        raise Asked("--against liger needs --peers DIR, the folder that liger-kernel is installed in")
    batch, seq = (int(n) for n in args.tokens.replace("×", "x").split("x"))
    until = time.monotonic() + args.seconds if args.seconds else None
    rows: list[dict] = []
    suffix = ("-ckpt" if args.checkpoint else "") + ("-longest" if args.longest_context else "")
    path = measure.path_for(f"model-{args.model}-{args.tokens.replace('×', 'x')}{suffix}", args.output)
    with base_folder(args.base) as base:
        names = [*against, *(["base"] if base else []), *args.ours.split(",")]
        for name in names:
            folder = base if name == "base" else str(args.peers.absolute()) if args.peers else ""
            job = Job(name, args.model, batch, seq, args.steps, args.warmup, args.checkpoint, not args.no_optimizer,
                      args.longest_context, args.profile and name.startswith("ours"), folder)  # fmt: skip
            worker = Worker("liger_kernel.bench.model", job)
            cancel = stop_after(until and until - time.monotonic(), [worker])
            try:
                for row in worker.rows():
                    rows.append({"contender": name, "model": args.model, "batch": batch, "seq": seq} | row)
                    print({k: v for k, v in rows[-1].items() if k != "loss"}, flush=True)
            finally:
                cancel()
                worker.close()
            measure.save(path, rows)
    print(path)
    return int(any("failed" in r and r["contender"].startswith("ours") for r in rows))


if __name__ == "__main__":
    work(Job(**json.loads(sys.argv[1])))
