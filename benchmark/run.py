"""Time ops against their peers on this card, each contender in a process of its own.

    python -m benchmark.run rms_norm swiglu [--against torch,compile,liger,quack,cce] [--peers DIR] [--skip-tests]

An op's tests run first; on red nothing is timed. Every call is timed twice: with events around it, as a user sees it,
and as replays of a CUDA graph, which is the GPU's own time. Results go to benchmark/results (or $OUT).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmark.measure import ceilings, peak_extra_mib, save, time_call, time_graph
from benchmark.peers import PEERS

ROOT = Path(__file__).parent.parent


def contender(op: str, peer: str, shapes: set[str] | None) -> list[dict]:
    """Every timed shape of one op for one contender: forward without gradients, and forward plus backward."""
    room = importlib.import_module(f"liger_kernel.ops.{op}")
    device, rows = torch.device("cuda"), []
    cases = room.CONTRACT.timed(torch.bfloat16, torch.device("meta"))
    call = PEERS[peer](op, room.CONTRACT)
    if call is None:
        return []
    for label in cases:
        if shapes and label not in shapes:
            continue
        torch.manual_seed(0)
        case = room.CONTRACT.timed(torch.bfloat16, device)[label]
        for mode in ("fwd", "full"):
            row = {"op": op, "shape": label, "peer": peer, "mode": mode}
            rows.append(row)
            try:
                step = _step(call, case, mode)
                event, graph = time_call(step), time_graph(step)
                row |= {"event_ms": event, "graph_ms": graph, "extra_MiB": round(peak_extra_mib(step))}
                moved = room.CONTRACT.bytes_moved(*case.args, **case.kwargs)  # of forward and backward together
                row["TB_s"] = round(moved / graph.median / 1e9, 2) if mode == "full" and graph else None
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
        del case
        torch.cuda.empty_cache()
    return rows


def _step(call, case, mode):
    differentiable = [isinstance(a, torch.Tensor) and a.is_floating_point() for a in case.args]
    if mode == "fwd":

        def forward():
            with torch.no_grad():
                call(*case.args, **case.kwargs)

        return forward
    leaves = [a.detach().requires_grad_() if d else a for a, d in zip(case.args, differentiable, strict=True)]
    wanted = [a for a, d in zip(leaves, differentiable, strict=True) if d]
    upstream: list = []

    def full():
        outputs = call(*leaves, **case.kwargs)
        outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if _grows(o)]
        if not upstream:
            upstream.extend(torch.ones_like(o) if o.dim() == 0 else torch.randn_like(o) for o in outputs)
        torch.autograd.grad(outputs, wanted, upstream, allow_unused=True)

    return full


def _grows(output) -> bool:
    return isinstance(output, torch.Tensor) and output.requires_grad


def green(op: str) -> bool:
    """Whether the op's tests pass on this card."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "test/test_contract.py", "-k", op]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-3000:])
    return done.returncode == 0


def show(rows: list[dict], copy: float) -> None:
    for row in rows:
        if "failed" in row:
            print(f"{row['op']:>26} {row['shape']:>22} {row['mode']:4} {row['peer']:8} failed: {row['failed'][:120]}")
            continue
        event, graph = row["event_ms"]["median"], (row["graph_ms"] or {}).get("median")
        rate = f"{row['TB_s']:6.2f} TB/s {row['TB_s'] / copy:5.0%}" if row["TB_s"] else ""
        shown = f"{graph:9.3f}" if graph else "        –"
        print(f"{row['op']:>26} {row['shape']:>22} {row['mode']:4} {row['peer']:8} {event:9.3f} ms {shown} ms graph "
              f"{rate:16} {row['extra_MiB']:7} MiB")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="+")
    parser.add_argument("--against", default="torch,compile")
    parser.add_argument("--shapes", default="")
    parser.add_argument("--peers", type=Path, help="folder with the peers' packages")
    parser.add_argument("--skip-tests", action="store_true", help="the tests passed on this card a moment ago")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    args = parser.parse_args()
    shapes = set(filter(None, args.shapes.split(",")))
    if args.contender:
        print("ROWS " + json.dumps([r for op in args.ops for r in contender(op, args.contender, shapes)], default=vars))
        return 0

    ops = [op for op in args.ops if args.skip_tests or green(op)]
    if len(ops) < len(args.ops):
        print(f"not timed, because their tests fail here: {sorted(set(args.ops) - set(ops))}")
    card, rows = ceilings(), []
    print(f"ceilings: copy {card['copy_TB_s']} TB/s, bf16 GEMM {card['gemm_TFLOP_s']} TFLOP/s")
    for op in ops:
        for peer in ["ours", *filter(None, args.against.split(","))]:
            environment = dict(os.environ)
            if peer == "liger":  # ours stays importable for the contract: the peers' folder is put in front later
                environment["LIGER_BENCH_PEERS"] = str(args.peers)
            command = [sys.executable, "-m", "benchmark.run", op, "--contender", peer, "--shapes", args.shapes]
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
            found = [line[5:] for line in done.stdout.splitlines() if line.startswith("ROWS ")]
            new = json.loads(found[0]) if found else []
            if not found:
                print(f"{op} {peer}: {done.stderr[-800:]}")
            show(new, card["copy_TB_s"])
            rows += new
    print(save("ops-" + "-".join(ops)[:60], rows, card))
    return len(ops) < len(args.ops)


if __name__ == "__main__":
    sys.exit(main())
