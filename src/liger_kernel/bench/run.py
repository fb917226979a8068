"""Time ops against their peers on this device, each contender in a process of its own.

An op's tests run first; on red nothing of it is timed. Every call is timed twice: with events around it, as a user sees
it, and as replays of a CUDA graph, which is the GPU's own time and what TB/s means. Contenders build their kernels side
by side and are then timed one after the other. Rows are written as they come.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
import time
from dataclasses import replace

import torch

from liger_kernel.bench import CONTENDERS, MODES, measure, plot, shapes
from liger_kernel.bench.peers import COMPILED
from liger_kernel.bench.process import REPOSITORY, Asked, Worker, base_folder, stop_after
from liger_kernel.bench.worker import Job
from liger_kernel.ops import EXPORTS

WORKER = "liger_kernel.bench.worker"
BUILDERS = min(os.cpu_count() or 1, 16)  # at once; each takes some GB of the host's memory and of the device's


def main(args: argparse.Namespace) -> int:
    """Run what `bench.add_arguments` describes and return the exit code. Raises Asked for what cannot be done."""
    if args.model:
        from liger_kernel.bench import model

        return model.drive(args)
    until = time.monotonic() + args.seconds if args.seconds else None
    asked, against = _asked(args), [name for name in args.against.split(",") if name]
    ops = asked if args.skip_tests else green(asked)
    if len(ops) < len(asked):
        print(f"not timed, because their tests fail here: {', '.join(sorted(set(asked) - set(ops)))}")
    if not ops:
        return 1
    with base_folder(args.base) as base:
        contenders = ["ours", *(["base"] if base else []), *against]
        rows = compare(args, ops, contenders, base, until)
    return int(len(ops) < len(asked) or any("failed" in r and r["peer"] == "ours" for r in rows))


def _asked(args) -> list[str]:
    for name in filter(None, args.against.split(",")):
        if name not in CONTENDERS:
            raise Asked(f"--against knows {', '.join(CONTENDERS)}, not {name!r}")
    for mode in args.modes.split(","):
        if mode not in MODES:
            raise Asked(f"--modes knows {', '.join(MODES)}, not {mode!r}")
    if "liger" in args.against.split(",") and not args.peers:
        raise Asked("--against liger needs --peers DIR, the folder that liger-kernel is installed in")
    args.table = args.table or not args.ops
    asked = args.ops or list(shapes.TABLE)
    for op in asked:
        if op not in EXPORTS or not hasattr(importlib.import_module(f"liger_kernel.ops.{op}"), "CONTRACT"):
            raise Asked(f"there is no op {op!r}: {', '.join(EXPORTS)}")
        contract = importlib.import_module(f"liger_kernel.ops.{op}").CONTRACT
        if not shapes.labels(op, contract, args.shapes, args.table):
            known = [*contract.timed(torch.bfloat16, torch.device("meta")), *shapes.MODELS]
            raise Asked(f"{op} has none of these shapes; it has {', '.join(known)}")
    return asked


# Tests


def green(ops: list[str]) -> list[str]:
    """The ops whose tests pass on this device; all of them outside the repository, where the worker's check remains."""
    folder = REPOSITORY / "test"
    if not (folder / "test_contract.py").exists():
        return ops
    own = [f"test/transformers/test_{op}.py" for op in ops]
    files = ["test/test_contract.py", *(name for name in own if (REPOSITORY / name).exists())]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-rfE", "-p", "no:cacheprovider"]
    command += [*files, "-k", " or ".join(ops)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if done.returncode and not failed:  # the run itself broke
        print(done.stdout[-2000:] + done.stderr[-2000:])
        return []
    for line in failed:
        print(line)
    return [op for op in ops if not any(of_op(op, line) for line in failed)]


def of_op(op: str, line: str) -> bool:
    """Whether a line of pytest's summary is about this op: by its file's name, or by a parameter of the test."""
    return f"test_{op}.py" in line or re.search(rf"[\[-]{op}[\]-]", line) is not None


# Contenders


def compare(args, ops: list[str], names: list[str], base: str, until: float | None) -> list[dict]:
    """Time every contender, print and save; what is not done when time is up is left out."""
    folders = {"base": base, "ours": "", "lean": "", "torch": "", "compile": ""}
    jobs = [
        Job(name, ops, args.shapes, args.table, args.modes.split(","), args.samples,
            folders.get(name, str(args.peers.absolute()) if args.peers else ""), dtype())
        for name in names
    ]  # fmt: skip
    rows: list[dict] = []
    path = measure.path_for("ops-" + ("table" if args.table else "-".join(ops)[:60]), args.output)
    at_once = measure.device().type != "cpu"  # a CPU that builds for one would disturb the timing of another
    workers: list[Worker] = []
    cancel = stop_after(until and until - time.monotonic(), workers)
    try:
        if at_once:
            _build(jobs, workers, until)
            workers.extend(Worker(WORKER, job) for job in jobs if _time_is_left(until))
        for worker in workers:
            worker.ready()
        card = measure.ceilings(args.samples)
        print(f"ceilings: copy {card['copy_TB_s']} TB/s, GEMM {card['gemm_TFLOP_s']} TFLOP/s", flush=True)
        for i, job in enumerate(jobs):
            if not at_once and _time_is_left(until):
                workers.append(Worker(WORKER, job))
                workers[i].ready()
            for row in workers[i].rows() if _time_is_left(until) else ():
                rows.append({"op": "", "shape": "", "mode": "", "peer": job.contender} | row)
                print(line(rows[-1], card, rows), flush=True)
            measure.save(path, rows, card)
    finally:
        cancel()
        for worker in workers:
            worker.close()
    measure.save(path, rows, card)
    print(path)
    for op in ops:
        picture = measure.path_for(op, args.output, ".png")
        if plot.save(op, rows, card, picture):
            print(picture)
    return rows


def _time_is_left(until: float | None) -> bool:
    return until is None or time.monotonic() < until


def _build(jobs: list[Job], workers: list[Worker], until: float | None) -> None:
    """Fill the compilers' caches, op by op side by side: what a contender does in its own process is then short."""
    todo = [replace(j, ops=[op], only_build=True) for j in jobs if j.contender in COMPILED for op in j.ops]
    for at in range(0, len(todo), BUILDERS):
        if not _time_is_left(until):
            return
        workers.extend(Worker(WORKER, job) for job in todo[at : at + BUILDERS])
        while workers:
            workers[-1].ready()
            workers.pop().close()


def dtype() -> str:
    """bf16 as in training; fp32 on a CPU, where few of them compute in bf16."""
    return "float32" if measure.device().type == "cpu" else "bfloat16"


def line(row: dict, card: dict, rows: list[dict]) -> str:
    """One row as text, with its share of the ceiling and how many times as fast as ours it is."""
    what = f"{row['op']:>26} {row['shape']:>22} {row['mode']:4} {row['peer']:8}"
    if "failed" in row:
        return f"{what} failed: {row['failed'][:160]}"
    event, graph = (row[key]["median"] if row[key] else None for key in ("event_ms", "graph_ms"))
    rate = f"{row['TB_s']:6.2f} TB/s {row['TB_s'] / card['copy_TB_s']:4.0%}"
    if "TFLOP_s" in row:
        rate = f"{row['TFLOP_s']:6.0f} TFLOP/s {row['TFLOP_s'] / card['gemm_TFLOP_s']:4.0%}"
    share = ""
    for other in rows:
        if other["peer"] == "ours" and row["peer"] != "ours" and "failed" not in other and _same(other, row):
            share = f"  ours takes {time_of(other) / time_of(row):.2f} of it"
    return (
        f"{what} {event:9.3f} ms {'' if graph is None else f'{graph:.3f}':>9} graph {rate} "
        f"{row['host_us'] or 0:7.0f} us host {row['extra_MiB']:7} MiB{share}"
    )


def _same(a: dict, b: dict) -> bool:
    return all(a[key] == b[key] for key in ("op", "shape", "mode"))


def time_of(row: dict) -> float:
    """Milliseconds of the device's own time, or as called where no graph could be captured."""
    return (row["graph_ms"] or row["event_ms"])["median"]
