"""A patched model under FSDP2, with accelerate:

accelerate launch --config_file examples/fsdp2_accelerate.yaml examples/fsdp2_accelerate.py [--model m] [--steps 3]
"""

import argparse

import torch
from accelerate import Accelerator
from several import batches, load, parse

from liger_kernel.transformers import apply_liger_kernel


def main(args: argparse.Namespace) -> None:
    accelerator = Accelerator()
    model = load(args.model)
    apply_liger_kernel(model)  # before it is sharded
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    for batch in batches(model.config.vocab_size, accelerator.process_index, args.steps):
        batch = {name: rows.to(accelerator.device) for name, rows in batch.items()}
        loss = model(**batch, use_cache=False).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print(f"loss: {loss.item():.4f}")


if __name__ == "__main__":
    main(parse(__doc__))
