"""Rotary embedding functions: module globals in transformers, found by who calls them, verified, replaced by module.

A replacement has the signature of the original and serves every model of that modeling module in the process; it is
equal in value, because verified. The original comes back when the last patched model is reverted.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from liger_kernel import ops
from liger_kernel.ops.rope import reference
from liger_kernel.transformers import functional
from liger_kernel.transformers.kinds import probe
from liger_kernel.transformers.kinds.probe import MAX_ERROR, MIN_SAME, Match, Refusal

NAME = "rope"
_INPUTS = ("q", "k", "cos", "sin")
_OPTIONS = {"position_ids", "unsqueeze_dim"}
_SHAPE = dict(batch=2, seq=5, dim=16, q_heads=4, k_heads=2)


@dataclass(frozen=True)
class Rope:
    """Half rotation of the first elements of a head, as many as cos is wide."""

    keeps_dtype: bool  # an fp32 cos does not make a bf16 q fp32


@dataclass
class Place:
    """A function's place: a name in the globals of a modeling module."""

    scope: dict[str, Any]
    name: str

    @property
    def label(self) -> str:
        return f"{self.scope['__name__']}.{self.name}"


@dataclass
class _Replaced:
    place: Place
    original: Any
    replacement: Any
    users: weakref.WeakSet = field(default_factory=weakref.WeakSet)


_replaced: dict[str, _Replaced] = {}


def places(model: nn.Module) -> Iterator[Place]:
    """Where the model's own code finds functions of (q, k, cos, sin), each place once."""
    seen = set()
    for cls in dict.fromkeys(type(m) for m in model.modules()):
        for method in _methods(cls):
            for name in method.__code__.co_names:
                place = Place(method.__globals__, name)
                function = place.scope.get(name)
                if callable(function) and place.label not in seen and _takes_cos_and_sin(function):
                    seen.add(place.label)
                    yield place


def _methods(cls: type) -> Iterator[Any]:
    """A module class's own functions, without their decorators."""
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        yield from (
            f for f in map(inspect.unwrap, filter(inspect.isfunction, vars(base).values())) if hasattr(f, "__code__")
        )


def _takes_cos_and_sin(function: Any) -> bool:
    function = function.forward if isinstance(function, nn.Module) else function
    try:
        return not isinstance(function, type) and {"cos", "sin"} <= set(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # some built-ins have none
        return False


@functools.cache
def verify(function: Any) -> Match | Refusal:
    """The form a function computes, whatever the dtypes of q and cos and wherever the heads are."""
    if not inspect.isfunction(function):
        return Refusal(NAME, f"is a {type(function).__name__}, not a function: another library may have replaced it")
    parameters = list(inspect.signature(function).parameters)
    if tuple(parameters[:4]) != _INPUTS or not set(parameters[4:]) <= _OPTIONS:
        return Refusal(NAME, f"takes other arguments than a half rotation ({', '.join(parameters)})")
    with probe.probing():
        try:
            return _verify(function, parameters[4:])
        except Exception as problem:  # any code of any model may run here
            return Refusal(NAME, f"cannot be run ({type(problem).__name__}: {problem})".splitlines()[0])


def _verify(function, options):
    worst, kept = 0.0, set()
    for heads_at in (1, 2) if "unsqueeze_dim" in options else (1,):
        named = {"unsqueeze_dim": heads_at} if heads_at != 1 else {}
        if "position_ids" in options:
            named["position_ids"] = torch.arange(_SHAPE["seq"])[None]
        for dtype, table in ((torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)):
            inputs = _inputs(heads_at, dtype, table)
            wanted = reference(*inputs, heads_at)
            found = function(*inputs, **named)
            if found[0].dtype is not wanted[0].dtype:
                kept.add(True)
                wanted = tuple(w.to(x.dtype) for w, x in zip(wanted, inputs, strict=False))
            elif dtype is not table:
                kept.add(False)
            for f, w in zip(found, wanted, strict=True):
                error = probe.error(f, w)
                if dtype is torch.float32:
                    worst = max(worst, error)
                if (dtype is torch.float32 and error > MAX_ERROR) or probe.same(f, w) < MIN_SAME:
                    return Refusal(NAME, f"fits no known rotation (difference {error:.0e} in {dtype})")
    form = Rope(kept == {True})
    return Match(NAME, NAME, "rope half" + (" keeps dtype" if form.keeps_dtype else ""), form, worst)


def _inputs(heads_at, dtype, table_dtype):
    batch, seq, dim = _SHAPE["batch"], _SHAPE["seq"], _SHAPE["dim"]
    q, k = (
        probe.random(batch, heads, seq, dim, seed=heads, dtype=dtype).transpose(1, heads_at)
        for heads in (_SHAPE["q_heads"], _SHAPE["k_heads"])
    )
    cos, sin = (probe.random(batch, seq, dim, seed=s, dtype=table_dtype) for s in (8, 9))
    return q, k, cos, sin


def _replacement(original, form: Rope):
    options = list(inspect.signature(original).parameters)[4:]

    @functools.wraps(original)
    def rope(q, k, cos, sin, *args, **kwargs):
        heads_at = dict(zip(options, args), **kwargs).get("unsqueeze_dim", 1)
        if cos.dim() != 3 or cos.requires_grad or q.dim() != 4:
            return original(q, k, cos, sin, *args, **kwargs)
        if form.keeps_dtype and cos.dtype is not q.dtype:
            return ops.LigerRopeFunction.apply(q, k, cos, sin, None, heads_at, None, True)
        return functional.liger_rope(q, k, cos, sin, None, heads_at)

    return rope


def original(place: Place) -> Any:
    """What stands in a place when nothing of ours does."""
    entry = _replaced.get(place.label)
    found = place.scope[place.name]
    return entry.original if entry is not None and found is entry.replacement else found


def replace(place: Place, match: Match, model: nn.Module) -> None:
    """Put our function in a place, and remember that `model` uses it."""
    entry = _replaced.get(place.label)
    if entry is None or place.scope[place.name] is not entry.replacement:
        function = place.scope[place.name]
        entry = _replaced[place.label] = _Replaced(place, function, _replacement(function, match.variant))
        place.scope[place.name] = entry.replacement
    entry.users.add(model)


def release(model: nn.Module, place: Place | None = None) -> None:
    """Forget that `model` uses a place (default: every one); where nobody is left, the original comes back."""
    for label, entry in list(_replaced.items()):
        if place is None or place.label == label:
            entry.users.discard(model)
        if not entry.users:
            if entry.place.scope.get(entry.place.name) is entry.replacement:
                entry.place.scope[entry.place.name] = entry.original
            del _replaced[label]
