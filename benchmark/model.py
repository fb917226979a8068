"""Whole training steps of a model with random weights, each contender in a process of its own.

    python -m benchmark.model --model llama3.2-1b --tokens 8x2048 [--against hf,liger] [--checkpoint] [--peers DIR]

`liger` is the upstream package of the same import name, installed in the folder that --peers names.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

SHAPES = {
    "llama3.2-1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                        num_key_value_heads=8, head_dim=64, vocab_size=128256, tie_word_embeddings=True),
    "llama3-8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                      num_key_value_heads=8, head_dim=128, vocab_size=128256, tie_word_embeddings=False),
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=512),
}  # fmt: skip


def build(shape: str, checkpoint: bool):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=131072, rope_theta=500000.0, use_cache=False)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with torch.device(device()):
        torch.set_default_dtype(torch.bfloat16)
        model = LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    if checkpoint:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def patch(model, contender: str):
    """The model a contender trains, and a sentence on what was done to it."""
    import torch

    if contender == "compile":
        return torch.compile(model), "torch.compile"
    if contender == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(model=model)
        return model, "upstream"
    if contender in ("ours", "ours+compile"):
        from liger_kernel.transformers import apply_liger_kernel

        report = apply_liger_kernel(model)
        done = f"{len(report.patched)} modules patched"
        return (torch.compile(model), done + ", compiled") if "compile" in contender else (model, done)
    return model, "unpatched"


def run_one(args) -> dict:
    """Train a few steps and measure them; out of memory is a result."""
    import torch

    batch, seq = map(int, args.tokens.split("x"))
    cuda = torch.cuda.is_available()
    result = {"contender": args.contender, "model": args.model, "batch": batch, "seq": seq}
    model = build(args.model, args.checkpoint)
    model, result["patched"] = patch(model, args.contender)
    optimizer = None if args.no_optimizer else torch.optim.AdamW(model.parameters(), lr=1e-5, fused=cuda)
    generator = torch.Generator().manual_seed(1)
    seconds, losses = [], []
    try:
        for step in range(args.warmup + args.steps):
            ids = torch.randint(0, model.config.vocab_size, (batch, seq), generator=generator).to(device())
            if cuda:
                torch.cuda.synchronize()
                if step == args.warmup:
                    torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            if optimizer:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            else:
                model.zero_grad(set_to_none=True)
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            losses.append(loss.item())
    except torch.OutOfMemoryError:
        return {**result, "out_of_memory": True}
    step = statistics.median(seconds[args.warmup :])
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    return {**result, "tokens_per_s": round(batch * seq / step), "peak_GiB": round(peak, 2),
            "step_ms": round(step * 1000, 1), "loss": losses}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="llama3.2-1b")
    parser.add_argument("--tokens", default="8x2048", help="batch x sequence length")
    parser.add_argument("--against", default="hf", help="of hf, compile, liger; ours runs always")
    parser.add_argument("--ours", default="ours", help="ours, ours+compile, or both, comma separated")
    parser.add_argument("--checkpoint", action="store_true", help="gradient checkpointing")
    parser.add_argument("--no-optimizer", action="store_true", help="forward and backward only")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--peers", type=Path, help="folder with the peers' packages")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        print("RESULT " + json.dumps(run_one(args)), flush=True)
        return 0

    rows = []
    for contender in [*filter(None, args.against.split(",")), *args.ours.split(",")]:
        environment = dict(os.environ)
        if contender == "liger":
            environment["PYTHONPATH"] = f"{args.peers}:{environment.get('PYTHONPATH', '')}"
        command = [sys.executable, "-m", "benchmark.model", *sys.argv[1:], "--contender", contender]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        found = [line[7:] for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        row = json.loads(found[0]) if found else {"contender": contender, "failed": done.stderr[-1500:]}
        rows.append(row)
        print({k: v for k, v in row.items() if k != "loss"}, flush=True)
    if device() == "cuda":
        from benchmark.measure import save

        print(save(f"model-{args.model}-{args.tokens}{'-ckpt' if args.checkpoint else ''}", rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
