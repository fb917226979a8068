"""No loss keeps more logits than the workspace allows, however many tokens there are: one loss of each family."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from chunked_loss.test_call_arguments import KINDS, cases, fused
from chunked_loss.test_lengths import labels, without
from liger_kernel.ops import head, head_chunks, head_distill, head_groups, head_slabs, head_tiles

from support_losses import outcome

BUDGET = 2**18
CLASSES, WIDTH = 512, 8
LOSSES = [
    ("DPO", {}), ("DPO", dict(loss_type="bco_pair")), ("KTO", {}), ("JSD", {}), ("CosineSimilarity", {}),
    ("GRPO", dict(beta=0.0, loss_type="grpo")),
    ("GRPO", dict(beta=0.0, loss_type="grpo", importance_sampling_level="sequence")),
]  # fmt: skip


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that an op makes."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        sizes = [t.numel() * t.itemsize for t in tree_leaves(made) if isinstance(t, torch.Tensor)]
        self.size = max([self.size, *sizes])
        return made


def case(kind, length, device):
    """Two sequences of as many tokens."""
    sizes = dict(hidden=(2, length, WIDTH), weight=(CLASSES, WIDTH), bias=(CLASSES,))
    if kind != "GRPO":
        other = "teacher_" if kind in ("JSD", "CosineSimilarity") else "ref_"
        sizes |= {other + name: size for name, size in sizes.items()}
    given = {name: torch.randn(size, device=device) for name, size in sizes.items()}
    labels = torch.randint(0, CLASSES, (2, length), device=device)
    given |= {"target": labels, "labels": torch.tensor([True, False], device=device), "ids": labels}
    return given | {"mask": torch.ones_like(labels), "advantages": torch.tensor([1.0, -1.0], device=device)}


@pytest.mark.parametrize("kind, options", LOSSES, ids=str)
def test_no_chunk_of_logits_exceeds_the_budget_however_long_a_completion(kind, options, device, monkeypatch):
    chunks, make = [], head_chunks.empty_chunk

    def noted(rows, n_classes, dtype, where):
        chunks.append(rows * n_classes * dtype.itemsize)
        return make(rows, n_classes, dtype, where)

    for module in (head, head_groups, head_distill, head_slabs, head_tiles):
        monkeypatch.setattr(module, "empty_chunk", noted)
    monkeypatch.setenv("LIGER_KERNEL_WORKSPACE_MB", str(BUDGET / 2**20))
    most = []
    for length in (512, 2048):
        given = case(kind, length, device)
        given["hidden"].requires_grad_()
        given["weight"].requires_grad_()
        chunks.clear()
        with Largest() as largest:
            loss, _ = fused(kind, **options)(**given)
            loss.backward()
        assert chunks and max(chunks) <= BUDGET
        # The hidden states' gradient is as long as they are; a tensor of as many logits would be 64 times that.
        assert largest.size <= max(BUDGET, given["hidden"].numel() * 4)
        assert given["hidden"].grad.isfinite().all() and given["hidden"].grad.any()
        most.append(max(chunks))
    assert most[0] == most[1]


def flops(kind, given):
    with FlopCounterMode(display=False) as counter:
        outcome(fused(kind), given, torch.float32)
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", KINDS)
def test_masked_tokens_cost_nothing(kind):
    """On a CPU, where it costs nothing to know which are."""
    given = cases(kind, torch.device("cpu"))[0]
    name, nothing = labels(given)
    given[name] = given[name].where(given[name] != nothing, 1 if name == "mask" else 9)
    four, every = torch.arange(7).expand(given[name].shape) < 4, torch.ones(given[name].shape, dtype=torch.bool)
    # 3 of 7; the cosine's chunks here are of one row, whose outer products are not all counted
    assert flops(kind, without(given, four)) <= (0.45 if kind == "CosineSimilarity" else 3 / 7) * flops(kind, given)
    assert flops(kind, without(given, every)) == 0
