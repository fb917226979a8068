"""A patched model under DistributedDataParallel: torchrun --nproc-per-node 2 examples/torchrun_ddp.py [--steps 3]"""

import argparse
import gc
import os

import torch
from several import batches, load, parse
from torch import distributed as dist

from liger_kernel.transformers import apply_liger_kernel


def main(args: argparse.Namespace) -> None:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    train(args, device)
    gc.collect()  # the wrapped model, which is a cycle: torch can hang where it outlives its process group
    dist.destroy_process_group()


def train(args: argparse.Namespace, device: torch.device) -> None:
    model = load(args.model).to(device)
    apply_liger_kernel(model)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-3)
    for batch in batches(model.config.vocab_size, dist.get_rank(), args.steps):
        loss = wrapped(**{name: rows.to(device) for name, rows in batch.items()}, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"loss: {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    main(parse(__doc__))
