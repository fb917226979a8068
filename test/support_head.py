"""Helpers of the tests of the fused head."""

import copy
import itertools
import random

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from support import tiny_model


def tokens(rows=2, length=11):
    """One batch with labels, the first three of each row ignored."""
    ids = torch.randint(3, 250, (rows, length))
    labels = ids.clone()
    labels[:, :3] = -100
    return dict(input_ids=ids, labels=labels, use_cache=False)


def both(model_type="llama", fuse=None, **config):
    """A model, its copy, and what `fuse` (default: fuse_head) returned for the copy."""
    from liger_kernel.transformers.head import fuse_head

    model = tiny_model(model_type, **config)
    fused = copy.deepcopy(model)
    return model, fused, (fuse or fuse_head)(fused)


def agree(model, fused, given, rtol=1e-5, **kwargs):
    """Forward and backward through both: same loss, same gradients.

    The default rtol is some 80 roundings of fp32: the same sums over tokens and vocabulary, in another order.
    """
    output, other = fused(**given, **kwargs), model(**given, **kwargs)
    output.loss.backward()
    other.loss.backward()
    torch.testing.assert_close(output.loss, other.loss, rtol=rtol, atol=0)
    compared = 0
    for (name, p), q in zip(model.named_parameters(), fused.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            slack = rtol * 10 * p.grad.abs().max().item()  # of sums over tokens and layers, in another order
            torch.testing.assert_close(q.grad, p.grad, rtol=0, atol=slack, msg=lambda m, n=name: f"{n}: {m}")
            compared += 1
    assert compared
    return output, other


def pairwise(values, allowed=lambda row: True):
    """Rows in which every pair of values of two options occurs at least once, where that is allowed at all."""

    def pairs(row):
        return set(itertools.combinations(sorted(row.items(), key=lambda kv: kv[0]), 2))

    choose, names = random.Random(0), list(values)
    grid = [{n: choose.choice(values[n]) for n in names} for _ in range(3000)]
    grid = [row for row in grid if allowed(row)]
    missing = set().union(*map(pairs, grid))
    rows = []
    while missing:
        rows.append(max(grid[:600] if len(missing) > 40 else grid, key=lambda row: len(missing & pairs(row))))
        missing -= pairs(rows[-1])
    return rows


def problem(rows=9, width=8, classes=21, dtype=torch.float32, device="cpu", bias=False):
    x = torch.randn(rows, width, dtype=dtype, device=device, requires_grad=True)
    weight = torch.randn(classes, width, dtype=dtype, device=device, requires_grad=True)
    target = torch.randint(0, classes, (rows,), device=device)
    target[rows // 2] = -100
    b = torch.randn(classes, dtype=dtype, device=device, requires_grad=True) if bias else None
    return x, weight, target, b


def low_rank_term(rows=9, rank=3, classes=21, dtype=torch.float32, device="cpu"):
    return tuple(torch.randn(n, rank, dtype=dtype, device=device, requires_grad=True) for n in (rows, classes))


class Peak(TorchDispatchMode):
    """The most bytes that results of operations held at one time."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out
