"""One contender in a process of its own: `python -m liger_kernel.bench.worker JSON`.

It first calls everything once, so that all kernels are built, prints READY, waits for a line on stdin, then times. On a
device with a compiler the driver has started one before for each op, all at once, that only builds.
Each finished row is one line on stdout: ROW and a JSON object.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import site
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from liger_kernel.bench import measure, peers, shapes
from liger_kernel.ops.core import Contract

# Largest distance from the formula in eager bf16, relative to its norm. Both round; cce drops small gradients.
AGREES = 3e-2


@dataclass(frozen=True)
class Job:
    """What one contender shall time."""

    contender: str
    ops: list[str]
    shapes: str = ""
    table: bool = False
    modes: list[str] = field(default_factory=lambda: ["full", "fwd"])
    samples: int = measure.SAMPLES
    folder: str = ""  # where another liger_kernel, or the peers' packages, are taken from
    dtype: str = "bfloat16"
    only_build: bool = False  # leave the kernels in the compilers' caches and end


@dataclass
class Call:
    """One op at one shape, as one contender calls it."""

    op: str
    label: str
    contract: Contract
    run: Callable
    job: Job

    def case(self):
        return shapes.case_of(self.op, self.contract, self.label, getattr(torch, self.job.dtype), measure.device())

    @property
    def row(self) -> dict:
        return {"op": self.op, "shape": self.label, "peer": self.job.contender}


def calls(job: Job) -> Iterator[Call]:
    """Every op and shape of the job that the contender has; raises ImportError where its package is missing."""
    if job.contender == "base":
        peers.take_from(Path(job.folder))
    contracts = {op: importlib.import_module(f"liger_kernel.ops.{op}").CONTRACT for op in job.ops}
    labels = {op: shapes.labels(op, contracts[op], job.shapes, job.table) for op in job.ops}
    if job.contender == "liger":
        peers.take_from(Path(job.folder))
    elif job.folder and job.contender != "base":
        site.addsitedir(job.folder)  # behind what is installed here; reads its .pth files, which quack needs
    for op, contract in contracts.items():
        run = peers.PEERS[job.contender](op, contract)
        if run is not None:
            yield from (Call(op, label, contract, run, job) for label in labels[op])


def tensors(values) -> list[torch.Tensor]:
    return [v for v in values if isinstance(v, torch.Tensor)]


def _outputs(result) -> list[torch.Tensor]:
    return [o for o in tensors(result if isinstance(result, tuple) else (result,)) if o.requires_grad]


def _random_like(x: torch.Tensor) -> torch.Tensor:
    """The same values whatever the memory layout of x, in that layout."""
    return torch.empty_like(x).copy_(torch.randn(x.shape, dtype=x.dtype, device=x.device))


class Step:
    """A case as a call without arguments: `full` differentiates every floating argument, `fwd` keeps no graph."""

    def __init__(self, run, case, mode: str):
        self.run, self.kwargs, self.mode = run, case.kwargs, mode
        floating = [isinstance(a, torch.Tensor) and a.is_floating_point() for a in case.args]
        self.leaves = [a.detach().requires_grad_() if f and mode == "full" else a for a, f in zip(case.args, floating)]
        self.wanted = [a for a, f in zip(self.leaves, floating) if f]
        self.upstream: list[torch.Tensor] = []

    def __call__(self) -> list:
        if self.mode == "fwd":
            with torch.no_grad():
                result = self.run(*self.leaves, **self.kwargs)
            return tensors(result if isinstance(result, tuple) else (result,))
        outputs = _outputs(self.run(*self.leaves, **self.kwargs))
        if not self.upstream:
            torch.manual_seed(1)
            self.upstream = [_random_like(o) if o.dim() else torch.ones_like(o) for o in outputs]
        grads = torch.autograd.grad(outputs, self.wanted, self.upstream, allow_unused=True)
        return [*outputs, *grads]


def distance(ours: list, theirs: list) -> float:
    """Largest difference of a result, relative to the norm of theirs."""
    worst = 0.0
    for a, b in zip(ours, theirs):
        if a is not None and b is not None and b.numel() and b.is_floating_point():
            # piece by piece: fp32 copies of whole logits would not fit beside them
            pairs = list(zip(a.detach().flatten().split(2**26), b.detach().flatten().split(2**26)))
            off = sum((p.float() - q.float()).square().sum() for p, q in pairs)
            size = sum(q.float().square().sum() for _, q in pairs)
            worst = max(worst, (off / size).sqrt().item() if size > 0 else off.sqrt().item())
    return worst


def timed(call: Call, case, mode: str) -> dict:
    """The row of one call: checked against the formula, then timed as called and as graph replay."""
    job, row = call.job, {**call.row, "mode": mode}
    # The formula has arguments of its own: upstream's backward writes over those it is given.
    wanted = None if job.contender == "torch" else Step(call.contract.reference, call.case(), mode)()
    step = Step(call.run, case, mode)
    made = step()
    if wanted is not None:
        row["error"] = round(distance(made, wanted), 5)
        if not row["error"] <= AGREES:
            return row | {"failed": f"differs from the formula by {row['error']:.3g} of its norm"}
        del wanted
    moved = call.contract.bytes_moved(*case.args, **case.kwargs)  # of forward and backward together
    if mode == "fwd":
        moved = sum(t.numel() * t.element_size() for t in tensors([*case.args, *case.kwargs.values(), *made]))
    del made
    _free()
    event, graph = measure.time_call(step, job.samples), measure.time_graph(step, job.samples)
    best = (graph or event).median
    row |= {"event_ms": event, "graph_ms": graph, "host_us": measure.host_us(step, job.samples), "bytes": moved,
            "extra_MiB": round(measure.peak_extra_mib(step)), "TB_s": float(f"{moved / best / 1e9:.4g}")}  # fmt: skip
    flops = getattr(call.contract, "flops", None)  # --base may be from before there was one
    if flops:
        work = flops(*case.args, **case.kwargs) / (1 if mode == "full" else 3)
        row["TFLOP_s"] = float(f"{work / best / 1e9:.4g}")
    return row


def _free() -> None:
    empty = getattr(torch.get_device_module(measure.device()), "empty_cache", None)
    if empty:
        empty()


def build(call: Call) -> None:
    """Call it once in each mode; what fails here fails again, and is reported, when it is timed."""
    with contextlib.suppress(Exception):
        for mode in call.job.modes:
            Step(call.run, call.case(), mode)()
    _free()


def main() -> int:
    job = Job(**json.loads(sys.argv[1]))
    todo = list(calls(job))
    if job.contender in peers.COMPILED and measure.device().type != "cpu":
        for call in todo:
            build(call)
    if job.only_build:
        return 0
    print("READY", flush=True)
    sys.stdin.readline()
    for call in todo:
        for mode in job.modes:
            try:
                row = timed(call, call.case(), mode)
            except Exception as error:
                row = {**call.row, "mode": mode, "failed": f"{type(error).__name__}: {str(error)[:300]}"}
            print("ROW " + json.dumps(row, default=vars), flush=True)
            _free()
    return 0


if __name__ == "__main__":
    sys.exit(main())
