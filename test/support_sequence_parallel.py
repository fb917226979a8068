"""A sequence split among ranks, as DeepSpeed's Ulysses and context parallelism split it, its labels shifted before."""

import torch
from torch import distributed as dist

from support import tiny_model
from support_ranks import rank_device

VOCAB, ROWS, LENGTH = 67, 2, 14
NAME = "gathered_for_tests"


def gathered_attention(module, query, key, value, attention_mask, scaling=None, **_):
    """Context parallelism at its plainest: this rank's queries (B, heads, part, D) see the keys of all ranks."""
    from torch.distributed._functional_collectives import all_gather_tensor_autograd

    keys, values = (all_gather_tensor_autograd(x.contiguous(), 2, dist.group.WORLD) for x in (key, value))
    first = dist.get_rank() * query.shape[2]
    rows = torch.arange(first, first + query.shape[2], device=query.device)
    seen = rows[:, None] >= torch.arange(keys.shape[2], device=query.device)
    out = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=seen, scale=scaling, enable_gqa=keys.shape[1] != query.shape[1]
    )
    return out.transpose(1, 2).contiguous(), None


def whole_batch() -> dict:
    """Two rows whose labels lie unevenly: of the second, nearly all in one half."""
    generator = torch.Generator().manual_seed(6)
    ids = torch.randint(3, VOCAB, (ROWS, LENGTH), generator=generator)
    labels = ids.clone()
    labels[0, :5], labels[1, :9] = -100, -100
    batch = {"input_ids": ids, "labels": labels, "position_ids": torch.arange(LENGTH).repeat(ROWS, 1)}
    return {name: x.to(rank_device()) for name, x in batch.items()}


def our_parts(whole) -> dict:
    """What accelerate's context parallelism hands a rank: its part of everything, the labels shifted before."""
    shifted = torch.nn.functional.pad(whole["labels"], (0, 1), value=-100)[:, 1:]
    parts = {name: x.chunk(dist.get_world_size(), 1)[dist.get_rank()] for name, x in whole.items()}
    return parts | {"shift_labels": shifted.chunk(dist.get_world_size(), 1)[dist.get_rank()]}


def their_parts(whole) -> list[dict]:
    """What DeepSpeed's loader hands a rank: a part of every rank's batch in turn, all the same batch here."""
    from deepspeed.runtime.sequence_parallel import parallel_state_sp as state
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPDataLoaderAdapter

    group, rank, size = (
        state.get_sequence_parallel_group(),
        state.get_sequence_parallel_rank(),
        state.get_sequence_parallel_world_size(),
    )
    parts = UlyssesSPDataLoaderAdapter([dict(whole)], rank, group, size, rank_device())  # on the CPU whatever device
    return [{name: x.to(rank_device()) for name, x in part.items()} for part in parts]


def errors(how: str) -> dict:
    """How far loss and gradients, summed over the ranks, are from those of one process that has the whole sequence."""
    from liger_kernel.transformers import apply_liger_kernel

    def make(attention="sdpa"):
        torch.manual_seed(1)
        return tiny_model("llama", vocab_size=VOCAB, attn_implementation=attention).to(rank_device())

    whole = whole_batch()
    truth = make()
    true_loss = truth(**whole, use_cache=False).loss
    true_loss.backward()
    if how == "ulysses":
        import deepspeed
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        own = ALL_ATTENTION_FUNCTIONS["sdpa"]
        deepspeed.init_distributed("gloo" if rank_device().type == "cpu" else "nccl")
        model = make()
        UlyssesSPAttentionHF.register_with_transformers(model, "sdpa", dist.get_world_size(), ROWS)
        batches = their_parts(whole)
    else:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        ALL_ATTENTION_FUNCTIONS.register(NAME, gathered_attention)
        model, batches = make(NAME), [our_parts(whole)]
    apply_liger_kernel(model)
    count = (whole["labels"][:, 1:] != -100).sum()
    total, lazy = 0.0, True
    for batch in batches:
        assert batch["shift_labels"].shape == batch["input_ids"].shape == (ROWS, LENGTH // dist.get_world_size())
        outputs = model(**batch, use_cache=False, num_items_in_batch=count * len(batches))
        lazy = lazy and type(outputs.logits).__name__ == "LazyLogits"
        outputs.loss.backward()
        total = total + outputs.loss.detach()
    if how == "ulysses":
        ALL_ATTENTION_FUNCTIONS.register("sdpa", own)
    dist.all_reduce(total)
    flat = torch.cat([p.grad.flatten() for p in model.parameters()])
    dist.all_reduce(flat)
    true = torch.cat([p.grad.flatten() for p in truth.parameters()])
    return {
        "lazy": lazy,
        "loss": abs(total - true_loss.detach()).item() / true_loss.item(),
        "gradients": ((flat - true).norm() / true.norm()).item(),
    }
