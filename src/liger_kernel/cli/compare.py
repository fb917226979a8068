"""`liger-kernel compare`: one model trained twice, unpatched and patched, in two fresh processes; what was gained."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from liger_kernel import backends
from liger_kernel.cli import UserError, plot, report, text
from liger_kernel.cli.train import Job, Result

WORKER = ["-m", "liger_kernel.cli.train"]


def run(arguments: argparse.Namespace) -> int:
    path = Path(arguments.data)
    text.check(path)
    device = device_of(arguments.device)
    folder = writable(arguments.output)
    tokenizer, vocabulary = _load(arguments.model)
    job = Job(
        model=arguments.model,
        tokens="",
        batch=arguments.batch or 4,
        seq=arguments.seq or 512,
        steps=arguments.steps or 20,
        device=str(device),
        dtype="float32" if device.type == "cpu" else "bfloat16",
        lr=2e-5,
    )

    def encode(piece: str) -> list[int]:
        return tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]

    with progress() as bars:
        bars.add_task(f"reading {path.name}", total=None)
        found = text.tokens(text.read(path, arguments.text_field), encode, job.batch * job.seq * job.steps, str(path))
    if len(found) < job.seq:
        raise UserError(f"{path} holds {len(found)} tokens, fewer than one sequence of {job.seq}: lower --seq")
    if max(found) >= vocabulary:
        raise UserError(f"the tokenizer of {job.model} gives token {max(found)}; the model has {vocabulary} of them")
    return compare(job, torch.tensor(found), arguments.model, folder / "liger-compare")


def compare(job: Job, tokens: torch.Tensor, title: str, target: Path) -> int:
    """Run `job` unpatched and patched, print the table and the sentence, save TARGET.png and TARGET.json.

    Returns the exit code: 0, or 2 without files where nothing could be compared: both runs were out of memory, or
    nothing was patched. Raises UserError for a run that failed.
    """
    results = []
    with tempfile.TemporaryDirectory(prefix="liger-kernel-") as scratch, progress() as bars:
        saved = Path(scratch) / "tokens.pt"
        torch.save(tokens, saved)
        for with_ours in (False, True):
            task = bars.add_task("with liger_kernel" if with_ours else "transformers alone", total=job.steps)
            one = replace(job, tokens=str(saved), patched=with_ours)
            results.append(run_worker(one, Path(scratch), lambda: bars.advance(task)))  # noqa: B023  called at once
    plain, patched = results
    print(f"{report.heading(job, title, plain or patched)}\n")
    Console().print(report.table(plain, patched, job.batch * job.seq))
    print(f"\n{report.sentence(plain, patched, job.batch * job.seq, job.device)}")
    if (plain is None and patched is None) or report.nothing_patched(patched) is not None:
        return 2
    target.parent.mkdir(parents=True, exist_ok=True)
    figures = {"job": asdict(job) | {"tokens": len(tokens)}, "plain": plain, "patched": patched}
    text_of = json.dumps(figures, default=asdict, indent=1)
    write(target.with_suffix(".json"), lambda path: path.write_text(text_of))
    write(target.with_suffix(".png"), lambda path: plot.save(plain, patched, job.batch * job.seq, path))
    print(f"{target.with_suffix('.png')} and {target.with_suffix('.json')} hold the curves and the figures.")
    return 0


def run_worker(job: Job, scratch: Path, advance: Callable[[], None]) -> Result | None:
    """The result of `job` in a fresh process; None where it ran out of memory. Raises UserError where it failed."""
    given = scratch / "job.json"
    given.write_text(json.dumps(asdict(job)))
    with (scratch / "stderr").open("w+") as errors, subprocess.Popen(
        [sys.executable, *WORKER, str(given)], stdout=subprocess.PIPE, stderr=errors, text=True
    ) as worker:  # fmt: skip
        outcome: dict = {}
        try:
            for line in worker.stdout or ():
                event = json.loads(line) if line.startswith('{"event"') else {"event": None}
                if event["event"] == "step":
                    advance()
                elif event["event"]:
                    outcome = event
        except BaseException:
            worker.kill()
            raise
        code = worker.wait()
        errors.seek(0)
        said = [line.strip() for line in errors if line.strip()]
    kind = outcome.pop("event", None)
    if kind == "result":
        return Result(**outcome)
    if kind == "out of memory" or code == -9:  # a system without memory left kills with signal 9
        return None
    which = "with liger_kernel" if job.patched else "of transformers alone"
    raise UserError(f"the run {which} failed: {said[-1] if said else f'exit code {code}'}")


def device_of(name: str | None) -> torch.device:
    """The device named, or this machine's accelerator, or the CPU. Raises UserError for one that is not usable."""
    if name is None:
        return torch.device(backends.current().device_type)
    try:
        one = torch.ones(1, device=name)
        one.item()  # "meta" has shapes and no values, so nothing could be trained there
        return one.device
    except Exception as error:  # torch raises AssertionError, RuntimeError or ImportError, by device
        raise UserError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None


def writable(name: str) -> Path:
    """The output folder, not created yet. Raises UserError where files could not be written into it."""
    folder = Path(name)
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"cannot write into {folder}: {existing} is not a folder that you may write to")
    return folder


def write(path: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write a file beside `path`, then put it there in one step: never half a file."""
    beside = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        fill(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def progress() -> Progress:
    columns = (TextColumn("{task.description:>22}"), BarColumn(), TextColumn("{task.completed}"), TimeElapsedColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _load(model: str):
    """(tokenizer, vocabulary size of the model). Raises UserError where there is no such model or no tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(model)
    except Exception as error:  # the hub's errors share no class
        raise UserError(f"cannot find a model at {model!r}: {_first_line(error)}") from None
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(f"{model} is of type {config.model_type!r}, which is not a causal language model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        usable = len(tokenizer) > len(tokenizer.all_special_tokens)  # without files some classes are merely empty
    except Exception:
        usable = False
    if not usable:
        raise UserError(f"the model {model} has no tokenizer")
    return tokenizer, config.get_text_config().vocab_size


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
