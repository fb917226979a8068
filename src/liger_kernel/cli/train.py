"""One training run in a process of its own: `python -m liger_kernel.cli.train JOB.json`.

Prints one JSON object per line on stdout: {"event": "step", ...} each step, then "result" or "out of memory".
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from liger_kernel.cli.memory import Meter


@dataclass
class Job:
    """What to train. model: a local folder or hub id, or the keywords of a LlamaConfig for random weights."""

    model: str | dict
    tokens: str  # file of a 1-D tensor
    batch: int
    seq: int
    steps: int
    device: str
    dtype: str  # a name in torch
    lr: float
    patched: bool = False
    seed: int = 0


@dataclass
class Result:
    """What a run measured. Memory is in bytes above the start of the process; seconds and losses are per step."""

    losses: list[float]
    seconds: list[float]
    peak: int
    head: int | None  # None: a model without a separate backbone
    memory: str  # what `peak` and `head` count
    parameters: int
    modules: int  # how many were patched
    left: str = ""  # why none was, where that was asked for


def train(job: Job) -> Result:
    """Build the model, measure its loss head on one batch, train; the same data in the same order for every job."""
    device = torch.device(job.device)
    meter = Meter(device)
    torch.manual_seed(job.seed)
    model = _build(job).to(device).train()
    modules, left = _patch(model) if job.patched else (0, "")
    batches = _batches(job, device)
    head = head_memory(model, batches[0], Meter(device))
    meter.reset()
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.lr)
    losses, seconds = [], []
    for step in range(job.steps):
        start = time.perf_counter()
        batch = batches[step % len(batches)]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())  # waits for the device
        seconds.append(time.perf_counter() - start)
        _say("step", loss=losses[-1])
    parameters = sum(p.numel() for p in model.parameters())
    return Result(losses, seconds, meter.peak(), head, meter.kind, parameters, modules, left)


def head_memory(model, batch: torch.Tensor, meter: Meter) -> int | None:
    """Bytes that logits, loss and their gradients take at most, on the hidden states of one batch.

    The model runs as in training, but for its backbone, whose output was computed before.
    """
    backbone = model.base_model
    if backbone is model:
        return None
    with torch.no_grad():
        output = backbone(input_ids=batch, use_cache=False)
    output.last_hidden_state = output[0].detach().requires_grad_()
    own = backbone.__dict__.get("forward")  # a patched backbone has a forward of its own
    backbone.forward = lambda *args, **kwargs: output
    try:
        meter.rebase()
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        return meter.peak()
    finally:
        del backbone.forward
        if own is not None:
            backbone.forward = own
        model.zero_grad(set_to_none=True)


def _build(job: Job):
    from transformers import AutoModelForCausalLM, LlamaConfig

    dtype = getattr(torch, job.dtype)
    if isinstance(job.model, dict):
        return AutoModelForCausalLM.from_config(LlamaConfig(**job.model), dtype=dtype)
    return AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype)


def _patch(model) -> tuple[int, str]:
    """How many modules were patched and, where none was, why."""
    from liger_kernel.transformers import apply_liger_kernel

    report = apply_liger_kernel(model)
    if report.patched:
        return len(report.patched), ""
    reasons = dict.fromkeys(f"{row.kind}: {row.reason}" for row in report.left)
    return 0, report.note or "; ".join(reasons)


def _batches(job: Job, device: torch.device) -> list[torch.Tensor]:
    """Batches (batch, seq) in the order of the text; a short text is read again from its start."""
    tokens = torch.load(job.tokens)
    rows = tokens[: len(tokens) // job.seq * job.seq].view(-1, job.seq)
    order = torch.arange(min(job.steps, len(rows)) * job.batch) % len(rows)
    return list(rows[order].to(device).split(job.batch))


def _say(event: str, **what) -> None:
    print(json.dumps({"event": event, **what}), flush=True)


def _out_of_memory(error: BaseException) -> bool:
    """torch has one class for accelerators; its CPU allocator raises a RuntimeError that says so."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or (isinstance(error, RuntimeError) and "allocate memory" in str(error))


def main(path: str) -> int:
    given = json.loads(Path(path).read_text())
    job = Job(**{field.name: given[field.name] for field in fields(Job)})
    try:
        result = train(job)
    except Exception as error:
        if not _out_of_memory(error):
            raise
        _say("out of memory")
    else:
        _say("result", **asdict(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
