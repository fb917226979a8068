"""On two ranks: the ORPO loss of a wrapped model, and its gradients, against those of the model alone, as JSON."""

import gc
import json
import types

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from trl_trainer import model

from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss
from liger_kernel.transformers.trainer import LigerORPOTrainer

CPU = torch.device("cpu")


def unwrapped(wrapped):
    return wrapped.module if hasattr(wrapped, "module") else wrapped


def batch(seed):
    draw = torch.Generator().manual_seed(seed)
    made = {}
    for side in ("chosen", "rejected"):
        ids = torch.randint(3, 40, (2, 7), generator=draw)
        made |= {f"{side}_input_ids": ids, f"{side}_labels": ids.index_fill(1, torch.arange(3), -100),
                 f"{side}_attention_mask": torch.ones_like(ids)}  # fmt: skip
    return made


def wrapped(kind):
    made = model(0)
    if kind == "fsdp2":
        for layer in made.model.layers:
            fully_shard(layer)
        return fully_shard(made)
    if kind == "fsdp1":
        return FullyShardedDataParallel(made, use_orig_params=True, device_id=CPU)
    return nn.parallel.DistributedDataParallel(made)


def gradients(kind, found):
    if kind == "fsdp1":
        with FullyShardedDataParallel.summon_full_params(found, with_grads=True):
            return [p.grad.clone() for p in unwrapped(found).parameters()]
    return [p.grad.full_tensor() if kind == "fsdp2" else p.grad for p in unwrapped(found).parameters()]


def errors():
    trainer = object.__new__(LigerORPOTrainer)  # what its loss reads, without what trains
    trainer.orpo_loss, trainer.padding_value = LigerFusedLinearORPOLoss(), 0
    trainer.accelerator = types.SimpleNamespace(device=CPU, unwrap_model=unwrapped)
    alone = model(0)
    losses = [trainer.concatenated_forward(alone, batch(seed))[0] for seed in range(2)]
    (sum(losses) / 2).backward()
    wanted = [p.grad for p in alone.parameters()]
    worst = {}
    for kind in ("fsdp1", "fsdp2", "ddp"):
        found = wrapped(kind)
        loss, _ = trainer.concatenated_forward(found, batch(dist.get_rank()))
        loss.backward()
        pairs = zip([loss.detach(), *gradients(kind, found)], [losses[dist.get_rank()].detach(), *wanted], strict=True)
        worst[kind] = max([(a - b).abs().max().item() for a, b in pairs])
    return worst


def main():
    dist.init_process_group("gloo")
    found = errors()
    if dist.get_rank() == 0:
        print("RESULT " + json.dumps(found))
    dist.barrier()
    gc.collect()  # the wrapped models, which are cycles: torch can hang where they outlive their process group
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
