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
from types import CodeType, MethodType
from typing import Any

from torch import nn

from liger_kernel.transformers.kinds import probe, rotation
from liger_kernel.transformers.kinds.probe import Match, Refusal
from liger_kernel.transformers.kinds.rotation import NAME


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
    """Where the model's own code finds rotary functions, each place once.

    One that is no known rotation but calls others, as Gemma 4's of two dimensions does, stands for these.
    """
    found: dict[str, Place] = {}
    for cls in dict.fromkeys(type(m) for m in model.modules()):
        for method in _methods(cls):
            for place in _called(method):
                if place.label not in found:
                    function = _plain(original(place))
                    within = list(_called(function)) if isinstance(verify(original(place)), Refusal) else []
                    found |= {p.label: p for p in within or [place]}
    yield from found.values()


def _called(function: Any) -> Iterator[Place]:
    """The rotary functions that a function's code names."""
    scope = getattr(function, "__globals__", {})
    for name in _names(getattr(function, "__code__", None)):
        if callable(scope.get(name)) and _is_rotary(scope[name]):
            yield Place(scope, name)


def _names(code: Any) -> Iterator[str]:
    """Every name in a code object and in those inside it: comprehensions have one of their own."""
    if isinstance(code, CodeType):
        yield from code.co_names
        for constant in code.co_consts:
            yield from _names(constant)


def _methods(cls: type) -> Iterator[Any]:
    """A module class's own functions, without their decorators."""
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        yield from (
            f for f in map(inspect.unwrap, filter(inspect.isfunction, vars(base).values())) if hasattr(f, "__code__")
        )


def _is_rotary(function: Any) -> bool:
    """Whether its parameters say so; a class, and what has no signature, is none."""
    function = function.forward if isinstance(function, nn.Module) else function
    try:
        names = set() if isinstance(function, type) else set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return False
    return {"cos", "sin"} <= names or "freqs_cis" in names


@functools.cache
def verify(function: Any) -> Match | Refusal:
    """The form a function computes (rotation.py), or why it is left alone."""
    plain = _plain(function)
    if not inspect.isfunction(plain):
        return Refusal(NAME, f"is a {type(function).__name__}, not a function: another library may have replaced it")
    with probe.probing():
        return rotation.verify(plain)


@functools.cache
def _plain(function: Any) -> Any:
    """The function itself, where transformers made a module of it, as it does if the kernels package is installed."""
    if not isinstance(function, nn.Module) or not hasattr(type(function), "kernel_layer_name"):
        return function
    own = MethodType(type(function).forward, function)

    def plain(*args, **kwargs):
        return own(*args, **kwargs)

    plain.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
    plain.kernel_layer_name = type(function).kernel_layer_name  # type: ignore[attr-defined]  # asked for at imports
    return plain


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
        replacement = rotation.replacement(_plain(function), match.variant)
        entry = _replaced[place.label] = _Replaced(place, function, replacement)
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
