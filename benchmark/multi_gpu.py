"""Training on several GPUs of one host: memory, speed and longest context under FSDP2, scaling under DDP.

    python -m benchmark.multi_gpu fsdp2 [--peers DIR] [--contenders torch,ours,liger] [--model llama3-8b]
    python -m benchmark.multi_gpu ddp [--peers DIR] [--model llama3.2-1b] [--tokens 4x2048]

Each contender runs in processes of its own: torch is the unpatched model, ours the patched one, liger the liger_kernel
in DIR (`pip download --no-deps liger-kernel==0.8.5` and `unzip` make one); one that cannot run says why in its row.

fsdp2: bf16 and AdamW, checkpointed layers. The tokens of a step double, from --tokens on, first the sequence up to
--longest and then the batch, until memory ends; the head is in the root's unit. ddp: the same batch per process, in one
and in --gpus of them.
All tokens/s are of all processes, peak_GiB is the fullest GPU's. Rows go to benchmark/results (or $OUT). Without GPUs
the processes are joined by gloo, for a trial of the program with --model tiny.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed as dist

from benchmark import RESULTS
from liger_kernel.bench import measure, model
from liger_kernel.bench.process import Asked, Worker, stop_after
from liger_kernel.bench.shapes import MODELS

CONTENDERS = ("torch", "ours", "liger")


@dataclass(frozen=True)
class Job(model.Job):
    """What the processes of one contender train together."""

    engine: str = "fsdp2"
    longest: int = 0  # of a sequence, from where on the batch grows; 0: one size alone
    most: int = 0  # tokens of a step and process to stop at; 0: where memory ends


class Trainer(model.Trainer):
    """One process's model under the engine."""

    def wrap(self, patched):
        if self.job.engine == "fsdp2":
            from torch.distributed.fsdp import fully_shard

            for layer in self.plain.model.layers:
                fully_shard(layer)
            return fully_shard(patched)
        if dist.get_world_size() == 1:
            return patched
        device = None if measure.device().type == "cpu" else [torch.cuda.current_device()]
        return torch.nn.parallel.DistributedDataParallel(patched, device_ids=device, gradient_as_bucket_view=True)

    def measure(self, batch: int, seq: int) -> dict:
        """The row of all processes; the process whose memory ends says so and ends."""
        row = super().measure(batch, seq) | {"engine": self.job.engine, "processes": dist.get_world_size()}
        if "out_of_memory" in row:
            _say(row)
            os._exit(1)
        worst = torch.tensor([row["peak_GiB"], row["step_ms"]], dtype=torch.float64, device=measure.device())
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        peak, step = worst.tolist()
        tokens = round(batch * seq * dist.get_world_size() / step * 1000)
        return row | {"tokens_per_s": tokens, "peak_GiB": peak, "step_ms": step}


def work(given: dict) -> None:
    """Train as one of the processes that torchrun has started."""
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    on_gpu = measure.device().type == "cuda"
    if on_gpu:
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        _measure(Job(**given | {"rank": rank}))
    except Exception as problem:  # the others wait for this process: it ends, so that torchrun ends them
        kind = "out_of_memory" if isinstance(problem, torch.OutOfMemoryError) else "failed"
        _say({kind: f"{type(problem).__name__}: {problem}".splitlines()[0]})
        os._exit(1)
    gc.collect()  # the wrapped model, which is a cycle: torch can hang where it outlives its process group
    dist.destroy_process_group()


def _measure(job: Job) -> None:
    trainer = Trainer(job)
    batch, seq = job.batch, job.seq
    while True:
        row = trainer.measure(batch, seq)
        if job.rank == 0:
            _say(row)
        batch, seq = (batch, 2 * seq) if seq < job.longest else (2 * batch, seq)
        if not job.longest or (job.most and batch * seq > job.most):
            return


def _say(row: dict) -> None:
    os.write(1, f"ROW {json.dumps(row)}\n".encode())  # whole, between what the other processes write


def together(job: Job, processes: int, seconds: float | None) -> list[dict]:
    """The rows of one contender in so many processes."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    worker = Worker("benchmark.multi_gpu", job, launcher)
    cancel = stop_after(seconds, [worker])
    rows: list[dict] = []
    try:
        for row in worker.rows():
            if not any(end in r for r in rows for end in ("out_of_memory", "failed")):  # later ones follow from that
                rows.append({"contender": job.contender, "model": job.model, "processes": processes} | row)
                print({k: v for k, v in rows[-1].items() if k != "loss"}, flush=True)
    finally:
        cancel()
        worker.close()
    return rows


def main(args: argparse.Namespace) -> int:
    """Measure what the command line asks for; the exit code."""
    contenders = (args.contenders or f"torch,ours{',liger' * bool(args.peers)}").split(",")
    shape = args.model or {"fsdp2": "llama3-8b", "ddp": "llama3.2-1b"}[args.engine]
    tokens = args.tokens or {"fsdp2": "1x4096", "ddp": "4x2048"}[args.engine]
    if unknown := set(contenders) - set(CONTENDERS):
        raise Asked(f"--contenders knows {', '.join(CONTENDERS)}, not {', '.join(sorted(unknown))}")
    if shape not in MODELS:
        raise Asked(f"--model knows {', '.join(MODELS)}, not {shape!r}")
    if "liger" in contenders and not args.peers:
        raise Asked("the contender liger needs --peers DIR, the folder that liger-kernel is installed in")
    if measure.device().type == "cuda" and torch.cuda.device_count() < args.gpus:
        raise Asked(f"--gpus {args.gpus}, and there are {torch.cuda.device_count()}")
    batch, seq = (int(n) for n in tokens.split("x"))
    until = time.monotonic() + args.seconds if args.seconds else None
    path = measure.path_for(f"multi-{args.engine}-{shape}-x{args.gpus}", args.output)
    rows: list[dict] = []
    scaling: dict[str, float] = {}
    command = "python -m benchmark.multi_gpu " + " ".join(sys.argv[1:])
    said = {"command": command, "engine": args.engine, "gpus": args.gpus, "scaling": scaling}
    for name in contenders:
        found: list[dict] = []
        for processes in (args.gpus,) if args.engine == "fsdp2" else (1, args.gpus):
            job = Job(
                name, shape, batch, seq, args.steps, args.warmup, args.engine == "fsdp2", engine=args.engine,
                longest=args.longest if args.engine == "fsdp2" else 0, most=args.most,
                folder=str(args.peers.absolute()) if name == "liger" else "",
            )  # fmt: skip
            found += together(job, processes, until and until - time.monotonic())
            measure.save(path, rows + found, said)
        rows += found
        if args.engine == "ddp" and len(found) == 2 and all("tokens_per_s" in r for r in found):
            alone, many = (r["tokens_per_s"] for r in found)
            scaling[name] = round(many / (args.gpus * alone), 4)
            print(f"{name}: scaling from 1 to {args.gpus}: {scaling[name]}")
            measure.save(path, rows, said)
    print(path)
    return int(any("failed" in r and r["contender"] == "ours" for r in rows))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=("fsdp2", "ddp"))
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--model", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--tokens", help="batch x sequence of one process, the first size")
    parser.add_argument("--contenders", help=f"of {', '.join(CONTENDERS)}; without --peers not the last")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="folder with the upstream package")
    parser.add_argument("--longest", type=int, default=1 << 17, help="tokens of a sequence (%(default)s)")
    parser.add_argument("--most", type=int, default=0, help="stop at so many tokens of a step and process")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--seconds", type=float, help="stop after so many; what was measured is kept")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="DIR", help="for JSON (%(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    if "RANK" in os.environ:
        work(json.loads(sys.argv[-1]))
    else:
        try:
            sys.exit(main(arguments()))
        except Asked as reason:
            sys.exit(str(reason))
