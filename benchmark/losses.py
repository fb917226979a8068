"""Losses over a fused head, forward and backward, each contender in a process of its own.

    python -m benchmark.losses [--losses dpo,orpo,simpo,grpo] [--tokens 8x2048] [--against torch,liger] [--peers DIR]

`torch` is the formula on whole logits; `liger` is the upstream package of the same import name, installed in the folder
that --peers names. Before a number is printed, loss and gradients are compared with the formula on a small case.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmark import RESULTS
from liger_kernel.bench import peers
from liger_kernel.bench.measure import path_for, save, time_call

GEMMS = {"dpo": 4, "orpo": 3, "simpo": 3, "kto": 4, "grpo": 3, "gspo": 3}
PAIRED = ("dpo", "orpo", "simpo")


def inputs(loss: str, batch: int, seq: int, width: int, n_classes: int, device, dtype) -> dict:
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


def module(loss: str):
    """The loss of whatever liger_kernel this process imports, as a function of inputs()."""
    from liger_kernel import chunked_loss

    if loss in PAIRED:
        run = getattr(chunked_loss, {"dpo": "LigerFusedLinearDPOLoss", "orpo": "LigerFusedLinearORPOLoss",
                                     "simpo": "LigerFusedLinearSimPOLoss"}[loss])()  # fmt: skip
        return lambda hidden, weight, target, ref_hidden=None, ref_weight=None: run(
            weight, hidden, target, None, *((ref_hidden, ref_weight, None) if loss == "dpo" else ())
        )[0]
    if loss == "kto":
        run = chunked_loss.LigerFusedLinearKTOLoss(use_ref_model=True)
        return lambda hidden, weight, target, labels, ref_hidden, ref_weight: run(
            _input=hidden, lin_weight=weight, target=target, preference_labels=labels, ref_input=ref_hidden,
            ref_weight=ref_weight,
        )[0]  # fmt: skip
    level = "sequence" if loss == "gspo" else "token"
    run = chunked_loss.LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, loss_type="grpo", importance_sampling_level=level
    )
    return lambda hidden, weight, target, advantages, mask: run(hidden, weight, target, mask, advantages)[0]


def formula(loss: str):
    """The same on whole logits, as a trainer writes it."""
    from torch.nn.functional import linear, logsigmoid

    def logps(hidden, weight, target):
        logits = linear(hidden, weight)
        return logits.gather(-1, target[..., None]).squeeze(-1).float() - logits.logsumexp(-1).float()

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


def peak_mib(call) -> float:
    """Device memory of one call beyond what there was before; by torch alone, whatever liger_kernel is imported."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def check(loss: str, device) -> None:
    """AssertionError where the fused loss or a gradient is not the formula's, on a small case in fp32."""
    given = inputs(loss, 4, 33, 64, 1000, device, torch.float32)
    ours, theirs = (run(**given) for run in (module(loss), formula(loss)))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    for a, b in zip(call_of(module(loss), given)(), call_of(formula(loss), given)()):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3 * b.abs().max().item())  # tf32 may be on


def run_one(args) -> dict:
    batch, seq = map(int, args.tokens.split("x"))
    if args.contender == "liger":
        peers.take_from(args.peers)
    if args.contender != "torch":
        check(args.loss, "cuda")
    given = inputs(args.loss, batch, seq, args.hidden, args.vocabulary, "cuda", torch.bfloat16)
    call = call_of(formula(args.loss) if args.contender == "torch" else module(args.loss), given)
    try:
        timing = time_call(call, samples=20)
        return dict(ms=round(timing.median, 2), low=round(timing.low, 2), MiB=round(peak_mib(call)))
    except torch.OutOfMemoryError:
        return dict(out_of_memory=True)


def floor_ms(args, gemms: int) -> float:
    """The products alone, in 4096 rows: forward ones and pairs of gradients in the order of a step."""
    batch, seq = map(int, args.tokens.split("x"))
    h = torch.randn(4096, args.hidden, dtype=torch.bfloat16, device="cuda")
    w = torch.randn(args.vocabulary, args.hidden, dtype=torch.bfloat16, device="cuda")
    out, dh, dw = (
        torch.empty(4096, args.vocabulary, dtype=h.dtype, device="cuda"),
        torch.empty_like(h),
        torch.empty_like(w),
    )

    def call():
        for _ in range(batch * seq // 4096):
            for _ in range(gemms - 2):
                torch.mm(h, w.t(), out=out)
            torch.mm(out, w, out=dh)
            torch.mm(out.t(), h, out=dw)

    return round(time_call(call, samples=10).median, 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", default="dpo,orpo,simpo,grpo,gspo")
    parser.add_argument("--tokens", default="8x2048", help="sequences x length")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--against", default="torch", help="of torch, liger; ours runs always")
    parser.add_argument("--peers", type=Path, help="folder with the peers' packages")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--loss", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        found = dict(ms=floor_ms(args, GEMMS[args.loss])) if args.contender == "products" else run_one(args)
        print("RESULT " + json.dumps(found), flush=True)
        return 0

    rows = []
    for loss in args.losses.split(","):
        for contender in ["products", *filter(None, args.against.split(",")), "ours"]:
            command = [
                sys.executable,
                "-m",
                "benchmark.losses",
                *sys.argv[1:],
                "--loss",
                loss,
                "--contender",
                contender,
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            found = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            row = json.loads(found[0]) if found else {"failed": done.stderr[-1500:]}
            rows.append({"loss": loss, "tokens": args.tokens, "contender": contender, **row})
            print(rows[-1], flush=True)
    print(save(path_for("losses", RESULTS), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
