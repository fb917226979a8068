"""Saved tensors that a backward may write its gradients over: those that nobody can read any more.

A tensor is spare when the graph is not kept for another backward and everybody who holds it is the backward itself.
Holders are counted: names in Python, handles in C++ and users of the storage, which views and detached copies are. How
many the backward alone makes depends on Python and torch, so it is learned from a Function of two numbers. What the
count does not know (hooks on saved tensors, an older torch) is taken for somebody else.
"""

from __future__ import annotations

import contextlib
import functools
import sys

import torch


def spare(saved: tuple[torch.Tensor, ...]) -> bool:
    """Whether all of `saved`, which is what `a, b = saved = ctx.saved_tensors` names, may be written over.

    To be called in a Function's backward on its own, not as an argument beside them, which would hold them too.
    """
    if torch.compiler.is_compiling() or not _COUNTS:
        return False
    return not torch._C._autograd._get_current_graph_task_keep_graph() and set(_holders(saved)) <= _alone()


_COUNTS = hasattr(torch.Tensor, "_use_count") and all(
    hasattr(torch._C._autograd, name)
    for name in ("_get_current_graph_task_keep_graph", "_top_saved_tensors_default_hooks")
)


def hooked() -> bool:
    """Whether somebody's hooks get the tensors that are saved now; True where torch cannot be asked, as in 2.6."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or bool(top(False))


def _holders(saved) -> list[tuple[int, int, int]]:
    """(references in Python, handles in C++, users of the storage) of each tensor."""
    return [
        (sys.getrefcount(x), x._use_count(), torch._C._storage_Use_Count(x.untyped_storage()._cdata)) for x in saved
    ]


class _Watched(torch.autograd.Function):
    """The product of two tensors, whose backward notes who holds them in `seen`."""

    @staticmethod
    def forward(ctx, a, b, seen):
        ctx.save_for_backward(a, b)
        ctx.seen = seen
        return a * b

    @staticmethod
    def backward(ctx, dc):
        a, b = saved = ctx.saved_tensors
        ctx.seen.extend(_holders(saved))
        return dc * b, dc * a, None


@functools.cache
def _alone() -> frozenset[tuple[int, int, int]]:
    """The counts of a tensor that only its backward holds: one that was saved, or that a hook has just made again.

    The hooks of checkpointing do so; it is not called here, as its first call imports torch's compiler.
    """
    if hooked():
        return frozenset()
    shared = (lambda t: t, torch.Tensor.detach, lambda t: t[:])
    with torch.enable_grad():
        alone = _counts(None, False) | _counts(None, True)
        return frozenset(alone.difference(*(_counts(keep, again) for keep in shared for again in (False, True))))


def _counts(keep, again: bool) -> set[tuple[int, int, int]]:
    """Who holds two tensors in a backward: it alone, or keep(tensor) as well; again: hooks have made them again."""
    seen: list = []
    kept: list = []

    def pack(x):
        return [x.detach().clone()]

    def unpack(box):
        x = box.pop()
        if keep is not None:
            kept.append(keep(x))
        return x

    x = torch.ones(1, requires_grad=True)
    a, b = x + 1, x + 2
    if keep is not None and not again:
        kept += [keep(a), keep(b)]
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack) if again else contextlib.nullcontext():
        product = _Watched.apply(a, b, seen)
    del a, b
    product.backward()
    return set(seen)
