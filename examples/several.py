"""What the examples for several processes share: a model, its data, the command line."""

import argparse
from collections.abc import Iterator

import torch
from transformers import AutoModelForCausalLM, LlamaConfig


def parse(doc: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id; default: a tiny one with random weights")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    return parser.parse_args()


def load(name: str | None) -> torch.nn.Module:
    """The model in training mode, the same on every process."""
    if name:
        return AutoModelForCausalLM.from_pretrained(name).train()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).train()


def batches(vocab_size: int, rank: int, steps: int) -> Iterator[dict[str, torch.Tensor]]:
    """Random tokens, other ones on each process."""
    generator = torch.Generator().manual_seed(rank)
    for _ in range(steps):
        ids = torch.randint(3, vocab_size, (2, 32), generator=generator)
        yield {"input_ids": ids, "labels": ids}
