"""Losses over a fused head, forward and backward, each contender in a process of its own.

    python -m benchmark.losses [--rows dpo,orpo,simpo,grpo,grpo-long] [--against torch,compile,liger,trl]
                               [--peers DIR...] [--device cpu] [--small]

`torch` is the formula on whole logits and `compile` torch.compile of it. `liger` is the upstream package of the same
import name and `trl` the formula over the log-probabilities of TRL's own chunked head, for DPO and GRPO; each is in one
of the folders that --peers names. Before a number is printed, loss and gradients are compared with the formula on a
small case. --small runs every row in a few seconds, to check the script, and writes nothing.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from benchmark import RESULTS
from liger_kernel.bench import measure, peers
from liger_kernel.bench.measure import path_for, save, time_call

GEMMS = {"dpo": 4, "orpo": 3, "simpo": 3, "kto": 4, "grpo": 3, "gspo": 3}
PAIRED = ("dpo", "orpo", "simpo")
# What the trainers of TRL 1.16 ask their chunked head for, and the width of its tiles.
TRL_OUTPUTS = {"dpo": ("log_probs", "entropy", "mean_logits", "is_top1"), "grpo": ("log_probs", "entropy"),
               "gspo": ("log_probs", "entropy")}  # fmt: skip
TRL_TILE = 32768
CONTENDERS = ("torch", "compile", "liger", "trl")
SECONDS, SAMPLES = 6, (3, 20)  # of a contender's timed calls, and how many of them at least and at most


class Row(NamedTuple):
    loss: str
    batch: int = 8
    seq: int = 2048
    hidden: int = 4096
    classes: int = 128256


ROWS = {loss: Row(loss) for loss in GEMMS} | {"grpo-long": Row("grpo", 1, 131072, classes=262144)}
SMALL = dict(batch=4, seq=24, hidden=32, classes=500)


def inputs(row: Row, dtype) -> dict:
    loss, batch, seq, width, n_classes = row
    device = measure.device()
    torch.manual_seed(0)
    make = dict(dtype=dtype, device=device)
    given = dict(
        hidden=torch.randn(batch, seq, width, **make).requires_grad_(),
        weight=(torch.randn(n_classes, width, **make) / width**0.5).requires_grad_(),
        target=torch.randint(0, n_classes, (batch, seq), device=device),
    )
    if loss in ("dpo", "kto"):
        given["ref_hidden"] = torch.randn(batch, seq, width, **make)
        given["ref_weight"] = torch.randn(n_classes, width, **make) / width**0.5
    if loss == "kto":
        given["labels"] = torch.arange(batch, device=device) % 2 == 0
    if loss in ("grpo", "gspo"):
        given["advantages"] = torch.randn(batch, device=device)
        given["mask"] = torch.ones(batch, seq, dtype=torch.int64, device=device)
    return given


def module(loss: str, **options):
    """The loss of whatever liger_kernel this process imports, as a function of inputs()."""
    from liger_kernel import chunked_loss

    if loss in PAIRED:
        run = getattr(chunked_loss, {"dpo": "LigerFusedLinearDPOLoss", "orpo": "LigerFusedLinearORPOLoss",
                                     "simpo": "LigerFusedLinearSimPOLoss"}[loss])(**options)  # fmt: skip
        return lambda hidden, weight, target, ref_hidden=None, ref_weight=None: run(
            weight, hidden, target, None, *((ref_hidden, ref_weight, None) if loss == "dpo" else ())
        )[0]
    if loss == "kto":
        run = chunked_loss.LigerFusedLinearKTOLoss(use_ref_model=True, **options)
        return lambda hidden, weight, target, labels, ref_hidden, ref_weight: run(
            _input=hidden, lin_weight=weight, target=target, preference_labels=labels, ref_input=ref_hidden,
            ref_weight=ref_weight,
        )[0]  # fmt: skip
    level = "sequence" if loss == "gspo" else "token"
    run = chunked_loss.LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, loss_type="grpo", importance_sampling_level=level, **options
    )
    return lambda hidden, weight, target, advantages, mask: run(hidden, weight, target, mask, advantages)[0]


def whole_logits(hidden, weight, target):
    """The labels' log-probabilities."""
    logits = torch.nn.functional.linear(hidden, weight)
    return logits.gather(-1, target[..., None]).squeeze(-1).float() - logits.logsumexp(-1).float()


def trls(loss: str):
    """The same by TRL's chunked head, with what its trainers ask it for."""
    function = importlib.import_module("trl.kernels").ChunkedLogProbFunction

    def logps(hidden, weight, target):
        outputs = TRL_OUTPUTS[loss] if torch.is_grad_enabled() else ("log_probs",)
        flat = hidden.flatten(0, 1), weight, None, target.flatten(), 1.0, TRL_TILE, None, 1.0, outputs
        return function.apply(*flat)[0].view(target.shape)

    return logps


def formula(loss: str, logps=whole_logits):
    """The same by the labels' log-probabilities, as a trainer writes it."""
    from torch.nn.functional import logsigmoid

    def paired(hidden, weight, target, ref_hidden=None, ref_weight=None):
        tokens = logps(hidden, weight, target)
        chosen, rejected = (tokens.sum(-1) if loss == "dpo" else tokens.mean(-1)).chunk(2)
        if loss == "dpo":
            with torch.no_grad():
                ref_chosen, ref_rejected = logps(ref_hidden, ref_weight, target).sum(-1).chunk(2)
            return -logsigmoid(0.1 * (chosen - ref_chosen - rejected + ref_rejected)).mean()
        nll = -tokens.chunk(2)[0].mean()
        if loss == "simpo":
            return nll - logsigmoid(0.1 * (chosen - rejected) - 0.5).mean()
        odds = (chosen - rejected) - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
        return nll - 0.1 * logsigmoid(odds).mean()

    def kto(hidden, weight, target, labels, ref_hidden, ref_weight):
        with torch.no_grad():
            ref = logps(ref_hidden, ref_weight, target).sum(-1)
        gap = 0.1 * (logps(hidden, weight, target).sum(-1) - ref)
        return (1 - torch.sigmoid(torch.where(labels, gap, -gap))).mean()

    def grpo(hidden, weight, target, advantages, mask):
        tokens = logps(hidden, weight, target)
        gap = tokens - tokens.detach()
        gap = gap.mean(-1, keepdim=True) if loss == "gspo" else gap
        ratio, a = gap.exp(), advantages[:, None]
        return -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).mean()

    return paired if loss in PAIRED else kto if loss == "kto" else grpo


def call_of(run, given):
    leaves = given["hidden"], given["weight"]

    def call():
        return torch.autograd.grad(run(**given), leaves)

    return call


def extra_mib(call) -> float:
    """Device memory of one call beyond what there was before; by torch alone, whatever liger_kernel is imported."""
    memory = torch.get_device_module(measure.device())
    if not hasattr(memory, "max_memory_allocated"):
        return measure.peak_extra_mib(call)
    measure.synchronize()
    before = memory.memory_allocated()
    memory.reset_peak_memory_stats()
    call()
    measure.synchronize()
    return (memory.max_memory_allocated() - before) / 2**20


def check(loss: str, run) -> None:
    """AssertionError where the fused loss or a gradient is not the formula's, on a small case in fp32."""
    given = inputs(Row(loss, 4, 33, 64, 1000), torch.float32)
    torch.testing.assert_close(run(**given), formula(loss)(**given), rtol=1e-4, atol=1e-6)
    for a, b in zip(call_of(run, given)(), call_of(formula(loss), given)(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3 * b.abs().max().item())  # tf32 may be on


def timed(call) -> dict:
    start = time.perf_counter()
    call()  # kernels are built
    measure.synchronize()
    built, start = time.perf_counter() - start, time.perf_counter()
    call()
    measure.synchronize()
    few, many = SAMPLES
    n = max(few, min(many, int(SECONDS / (time.perf_counter() - start))))
    timing = time_call(call, samples=n, warmup=1)
    return dict(ms=round(timing.median, 2), low=round(timing.low, 2), samples=n, first_call_s=round(built, 1))


def measured(row: Row, run, checks: bool = True) -> dict:
    if checks:
        check(row.loss, run)
    call = call_of(run, inputs(row, torch.bfloat16))
    try:
        return timed(call) | dict(MiB=round(extra_mib(call)))
    except torch.OutOfMemoryError:
        return dict(out_of_memory=True)


def holding(package: str, folders: list[Path]) -> Path | None:
    return next((folder.resolve() for folder in folders if (folder / package).is_dir()), None)


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # sources without what an installation writes beside them
        return "unknown"


def liger(row: Row, folders: list[Path]) -> dict:
    folder = holding("liger_kernel", folders)
    if folder is None:
        raise SystemExit("--against liger: no folder of --peers has a liger_kernel")
    peers.take_from(folder)
    found = {"version": version("liger_kernel")}
    try:
        return measured(row, module(row.loss)) | found
    except Exception as error:
        without = measured(row, module(row.loss, compiled=False))
        return without | found | {"compiled": False, "default": f"{type(error).__name__}: {error}"[:200]}


def trl(row: Row, folders: list[Path]) -> dict:
    folder = holding("trl", folders)
    if folder is None:
        raise SystemExit("--against trl: no folder of --peers has a trl")
    sys.path.insert(0, str(folder))
    return measured(row, formula(row.loss, trls(row.loss))) | {"version": version("trl")}


def compiled(row: Row) -> dict:
    return measured(row, torch.compile(formula(row.loss), dynamic=False))


def products(row: Row) -> dict:
    """The products alone, in 4096 rows: forward ones and pairs of gradients in the order of a step."""
    rows = min(4096, row.batch * row.seq)
    make = dict(dtype=torch.bfloat16, device=measure.device())
    h, w = torch.randn(rows, row.hidden, **make), torch.randn(row.classes, row.hidden, **make)
    out, dh, dw = torch.empty(rows, row.classes, **make), torch.empty_like(h), torch.empty_like(w)

    def call():
        for _ in range(row.batch * row.seq // rows):
            for _ in range(GEMMS[row.loss] - 2):
                torch.mm(h, w.t(), out=out)
            torch.mm(out, w, out=dh)
            torch.mm(out.t(), h, out=dw)

    return timed(call)


def one(contender: str, row: Row, folders: list[Path]) -> dict:
    if contender in ("liger", "trl"):
        return {"liger": liger, "trl": trl}[contender](row, folders)
    if contender == "ours":
        return measured(row, module(row.loss))
    if contender == "torch":
        return measured(row, formula(row.loss), checks=False)
    return {"compile": compiled, "products": products}[contender](row)


def in_a_process(contender: str, name: str, limit: float) -> dict:
    command = [sys.executable, "-m", "benchmark.losses", *sys.argv[1:], "--contender", contender, "--row", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {limit:.0f} s"}
    found = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    return json.loads(found[0]) if found else {"failed": done.stderr[-1500:]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="dpo,orpo,simpo,grpo,grpo-long", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--against", default="torch", help=f"of {', '.join(CONTENDERS)}; ours runs always")
    parser.add_argument("--peers", type=Path, nargs="+", default=[], help="folders with the peers' packages")
    parser.add_argument("--device", choices=["cpu"], help="as if there were no accelerator")
    parser.add_argument("--small", action="store_true", help="tiny sizes: a check of the script, not a measurement")
    parser.add_argument("--limit", type=float, default=240, help="seconds that a contender may take for a row")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    against = [c for c in args.against.split(",") if c]
    for given, known in ((args.rows.split(","), ROWS), (against, CONTENDERS)):
        if unknown := [g for g in given if g not in known]:
            parser.error(f"expected of {', '.join(known)}, got {', '.join(unknown)}")
    if args.device == "cpu":
        os.environ.update(CUDA_VISIBLE_DEVICES="")
    sizes = {name: row._replace(**SMALL) if args.small else row for name, row in ROWS.items()}
    if args.contender:
        print("RESULT " + json.dumps(one(args.contender, sizes[args.row], args.peers)), flush=True)
        return 0

    rows, floors = [], {}
    path = path_for("losses", RESULTS) if not args.small else None
    for name in args.rows.split(","):
        row = sizes[name]
        for contender in ["products", *against, "ours"]:
            if contender == "trl" and row.loss not in TRL_OUTPUTS:
                continue  # it has no chunked path for them
            floor = (GEMMS[row.loss], *row[1:])
            found = floors.get(floor) if contender == "products" else None
            found = found or in_a_process(contender, name, args.limit)
            if contender == "products":
                floors[floor] = found
            rows.append({**row._asdict(), "contender": contender, **found})
            print(rows[-1], flush=True)
            if path:
                save(path, rows)
    if path:
        print(path)
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
