"""`liger-kernel demo`: compare on a small Llama with random weights and text that is on every machine."""

from __future__ import annotations

import argparse

import torch

from liger_kernel.cli import compare, text
from liger_kernel.cli.train import Job
from liger_kernel.utils import get_total_gpu_memory

VOCABULARY = 32768

# at least this many GB of device memory -> layers and hidden size, sequences per step, tokens per sequence
SIZES = (
    (40, dict(num_hidden_layers=16, hidden_size=2048), 16, 1024),
    (12, dict(num_hidden_layers=12, hidden_size=1024), 8, 1024),
    (0, dict(num_hidden_layers=4, hidden_size=256), 8, 256),
)


def run(arguments: argparse.Namespace) -> int:
    device = compare.device_of(arguments.device)
    folder = compare.writable(arguments.output)
    on_cpu = device.type == "cpu"
    memory = 0 if on_cpu else get_total_gpu_memory()
    size, batch, seq = size_for(memory)
    job = Job(
        model=_llama(**size),
        tokens="",
        batch=arguments.batch or batch,
        seq=arguments.seq or seq,
        steps=arguments.steps or 20,
        device=str(device),
        dtype="float32" if on_cpu else "bfloat16",
        lr=1e-3 if on_cpu else 3e-4,
    )
    texts = text.standard_library()
    with compare.progress() as bars:
        task = bars.add_task("training a tokenizer", total=len(texts))
        tokenizer = text.train_tokenizer(texts, VOCABULARY, lambda: bars.advance(task))
    needed = job.batch * job.seq * job.steps
    found = text.tokens(texts, lambda t: tokenizer.encode(t).ids, needed, "the standard library")
    return compare.compare(job, torch.tensor(found), "A Llama with random weights", folder / "liger-demo")


def size_for(memory: float) -> tuple[dict, int, int]:
    """Layers and hidden size, sequences per step and tokens per sequence for that many GB of device memory."""
    return next((size, batch, seq) for least, size, batch, seq in SIZES if memory >= least)


def _llama(num_hidden_layers: int, hidden_size: int) -> dict:
    heads = hidden_size // 64
    return dict(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3 // 64 * 64,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
