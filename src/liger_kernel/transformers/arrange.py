"""Patching by model type: every instance of a type, built later or already alive, without being handed one.

The classes of the type, and those made from them, get two thin wrappers: an instance is patched when its outermost
constructor ends, one that was there before at its first forward. `withdraw` takes the wrappers off again.
"""

from __future__ import annotations

import functools
import importlib
import threading
import weakref
from dataclasses import dataclass, field

import torch
from torch import nn

from liger_kernel.transformers import patch
from liger_kernel.transformers.models import MODELS

_building = threading.local()  # how many constructors of arranged classes are running


@dataclass
class _Arrangement:
    flags: dict
    originals: list[tuple[type, str, object]] = field(default_factory=list)
    wrappers: set = field(default_factory=set)
    models: weakref.WeakSet = field(default_factory=weakref.WeakSet)

    def wrap(self, cls: type) -> None:
        """Wrap what a class does not have from a wrapped one."""
        for name, wrapper in (("__init__", _patching_init), ("forward", _patching_forward)):
            if getattr(cls, name) not in self.wrappers:
                wrapped = wrapper(getattr(cls, name), self)
                self.wrappers.add(wrapped)
                self.replace(cls, name, wrapped)

    def replace(self, cls: type, name: str, value: object) -> None:
        """Set an attribute of a class until the arrangement is withdrawn."""
        self.originals.append((cls, name, cls.__dict__.get(name)))
        setattr(cls, name, value)

    def patch(self, model: nn.Module) -> None:
        self.models.add(model)
        patch.apply_liger_kernel(model, **self.flags)


_arranged: dict[str, _Arrangement] = {}


def arrange(model_type: str, **flags) -> None:
    """Patch every instance of a model type with these flags from now on; again with others: these count.

    Raises ValueError for a type transformers does not know, and for both loss flags at once.
    """
    patch._choose({f: flags.get(f) for f in patch.FLAGS})
    if patch.disabled():
        patch.logger.info("LIGER_KERNEL_DISABLE is set: nothing is arranged for %s", model_type)
        return
    known = _arranged.get(model_type)
    if known is not None:
        known.flags = flags
        for model in filter(patch.is_patched, list(known.models)):
            known.patch(model)
        return
    arrangement = _Arrangement(flags)
    for cls in classes_of(model_type):
        for one in _family(cls):
            arrangement.wrap(one)
        arrangement.replace(cls, "__init_subclass__", _wrapping_subclasses(cls, arrangement))
    _arranged[model_type] = arrangement


def withdraw(model_type: str) -> None:
    """Undo `arrange`: the classes as they were, and the models that it patched reverted."""
    if model_type not in _arranged:
        raise ValueError(f"nothing is arranged for model type {model_type!r}; arranged: {sorted(_arranged)}")
    arrangement = _arranged.pop(model_type)
    for model in list(arrangement.models):  # first: what they displaced may be the wrappers below
        patch.take_off(patch.unwrap(model))
    for cls, name, original in arrangement.originals:
        if original is None:
            delattr(cls, name)
        else:
            setattr(cls, name, original)


def classes_of(model_type: str) -> list[type]:
    """The model classes that take the configuration of a type, or of a part of it that has a type of its own."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"transformers knows no model type {model_type!r}")
    parts = MODELS[model_type].parts if model_type in MODELS else ()
    configs = [CONFIG_MAPPING[part] for part in (model_type, *parts) if part in CONFIG_MAPPING]
    return [cls for config in configs for cls in _classes_with(config)]


def _classes_with(config: type) -> list[type]:
    from transformers import PreTrainedModel

    modeling = importlib.import_module(config.__module__.replace(".configuration_", ".modeling_"))
    return [
        cls
        for cls in vars(modeling).values()
        if isinstance(cls, type)
        and issubclass(cls, PreTrainedModel)
        and cls.__module__ == modeling.__name__
        and cls.config_class is config
        and not cls.__name__.endswith("PreTrainedModel")
    ]


def _family(cls):
    """A class and all that are made from it, each after its bases."""
    yield cls
    for made in cls.__subclasses__():
        yield from _family(made)


def _wrapping_subclasses(cls, arrangement):
    own = cls.__dict__.get("__init_subclass__")

    def __init_subclass__(made, **kwargs):
        if own is None:
            super(cls, made).__init_subclass__(**kwargs)
        else:
            own.__get__(None, made)(**kwargs)
        arrangement.wrap(made)

    return classmethod(__init_subclass__)


def _patching_init(original, arrangement):
    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        _building.depth = getattr(_building, "depth", 0) + 1
        try:
            original(self, *args, **kwargs)
        finally:
            _building.depth -= 1
        if not _building.depth:  # the model, not the parts it builds of itself
            arrangement.patch(self)

    return __init__


def _patching_forward(original, arrangement):
    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        if not torch.compiler.is_compiling() and not patch.is_settled(self):
            arrangement.patch(self)
            if "forward" in self.__dict__:
                return self.forward(*args, **kwargs)
        return original(self, *args, **kwargs)

    return forward
