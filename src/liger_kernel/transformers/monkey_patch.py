"""The interface other projects know: a function per model type, and the mapping that finds it.

Every function calls the one engine in patch.py; models.py says which flags it shows.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, MutableMapping
from types import MethodType
from typing import Any

from torch import nn

from liger_kernel.transformers import arrange, patch
from liger_kernel.transformers.models import APPLY_PREFIX, FAMILY, MLP_FLAGS, Model, function_name, row_of

logger = logging.getLogger(__name__)


def _function_for(model_type: str) -> Callable:
    """The function of a type, apply_liger_kernel_to_<type>, with the flags of its row."""
    return _make_function(model_type, row_of(model_type))


@functools.cache
def _make_function(model_type: str, row: Model) -> Callable:
    parameters = [p.replace(annotation=nn.Module if p.name == "model" else bool) for p in row.parameters()]
    signature = inspect.Signature(parameters)
    mlp_flags = [flag for flag in MLP_FLAGS if flag in signature.parameters]
    name = function_name(model_type)

    def apply(*args, **kwargs):
        try:
            given = signature.bind(*args, **kwargs).arguments  # only what the caller named: a default is no demand
        except TypeError as problem:
            raise TypeError(f"{name}() {problem}") from None
        model = given.pop("model", None)
        named = [flag for flag in mlp_flags if flag in given]
        if len(named) == 1:
            given |= dict.fromkeys(MLP_FLAGS, given[named[0]])
        if model is None:
            return arrange.arrange(model_type, **given)
        _warn_of_another_type(model, model_type, name)
        return patch.apply_liger_kernel(model, **given)

    flags = [flag for flag in signature.parameters if flag != "model"]
    apply.__name__ = apply.__qualname__ = name
    apply.__signature__ = signature  # type: ignore[attr-defined]
    apply.__doc__ = f"""Patch a {model_type} model, or without `model` every one in this process, built or to be built.

    Flags: {", ".join(flags)}. Everything verified is on by default; None means the default.
    Returns the Report for a given model. Raises as `apply_liger_kernel` does, TypeError for an unknown flag, ValueError
    without `model` for a type that the installed transformers does not know.
    """
    return apply


def _warn_of_another_type(model: Any, model_type: str, name: str) -> None:
    """A model with nothing of this type in it is patched all the same, because what is patched is verified."""
    if not isinstance(model, nn.Module) or patch.disabled():
        return
    configs = (getattr(part, "config", None) for part in patch.unwrap(model).modules())
    types = [config.model_type for config in configs if config is not None and hasattr(config, "model_type")]
    if types and model_type not in [FAMILY.get(found, found) for found in types]:
        logger.warning("%s is given a %s model: it is patched all the same", name, types[0])


class _Functions(MutableMapping):
    """model type -> function: those of models.py, those of the installed transformers, and what a user puts here."""

    def __init__(self):
        self._given: dict[str, Callable] = {}
        self._removed: set[str] = set()

    def _is_known(self, model_type: Any) -> bool:
        return model_type in FAMILY or model_type in _types_of_transformers()

    def __contains__(self, model_type: Any) -> bool:
        return model_type in self._given or (model_type not in self._removed and self._is_known(model_type))

    def __getitem__(self, model_type: str) -> Callable:
        if model_type not in self:
            raise KeyError(model_type)
        return self._given.get(model_type) or _function_for(FAMILY.get(model_type, model_type))

    def __setitem__(self, model_type: str, function: Callable) -> None:
        self._given.pop(model_type, None)
        self._removed.discard(model_type)
        if self.get(model_type) is not function:
            self._given[model_type] = function

    def __delitem__(self, model_type: str) -> None:
        if model_type not in self:
            raise KeyError(model_type)
        self._given.pop(model_type, None)
        self._removed.add(model_type)

    def __iter__(self) -> Iterator[str]:
        known = dict.fromkeys([*FAMILY, *_types_of_transformers()])
        yield from (t for t in known if t not in self._removed)
        yield from (t for t in self._given if t not in known)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"<functions for {len(self)} model types; set by hand: {sorted(self._given)}>"


@functools.cache
def _types_of_transformers() -> frozenset[str]:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return frozenset(CONFIG_MAPPING_NAMES)


MODEL_TYPE_TO_APPLY_LIGER_FN: MutableMapping[str, Callable] = _Functions()
globals().update({APPLY_PREFIX + part: _function_for(name) for part, name in FAMILY.items()})


def __getattr__(name: str) -> Callable:
    """The functions of the types that transformers knows and models.py does not."""
    if name.startswith(APPLY_PREFIX):
        for model_type in _types_of_transformers():
            if function_name(model_type) == name:
                return _function_for(model_type)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _apply_liger_kernel(model_type: str, **kwargs: Any) -> None:
    """Arrange the patching of every model of a type; unknown types are passed over, unknown flags dropped."""
    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        logger.info("no kernels are known for model type %r: nothing is applied", model_type)
        return
    function = MODEL_TYPE_TO_APPLY_LIGER_FN[model_type]
    function(**_known(function, kwargs))


def _apply_liger_kernel_to_instance(model: nn.Module, **kwargs: Any) -> None:
    """Patch a live model by its config.model_type; unknown types are passed over, unknown flags dropped.

    A model of transformers' base class is patched whatever its type, so also one whose code is not in transformers.
    """
    model_type: Any = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in MODEL_TYPE_TO_APPLY_LIGER_FN:
        function = MODEL_TYPE_TO_APPLY_LIGER_FN[model_type]
    elif _is_pretrained(model):
        function = patch.apply_liger_kernel
    else:
        logger.info("no kernels are known for model type %r: nothing is applied", model_type)
        return
    function(model=model, **_known(function, kwargs))


def _is_pretrained(model: Any) -> bool:
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)


def _known(function: Callable, flags: dict) -> dict:
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in flags.items() if name in parameters and name not in ("model", "strict")}


# Patching one module by hand, as functions of other projects for their own models do


def _bind_method_to_module(module: nn.Module, method_name: str, new_method: Callable) -> None:
    """Give one instance a method of its own."""
    module.__dict__[method_name] = MethodType(new_method, module)


def _in_every_part(patch_module: Callable) -> Callable:
    """Also where PEFT's modules_to_save keeps the module and a trained copy of it."""

    @functools.wraps(patch_module)
    def patched(module: nn.Module, *args: Any, **kwargs: Any) -> None:
        parts = [module]
        if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
            parts = [module.original_module, *module.modules_to_save.values()]  # type: ignore[list-item, operator, union-attr]
        for part in parts:
            patch_module(part, *args, **kwargs)

    return patched


def _own_eps(module: nn.Module, eps: float) -> float:
    found = (getattr(module, name, None) for name in ("variance_epsilon", "eps"))
    return next((value for value in found if value is not None), eps)


@_in_every_part
def _patch_rms_norm_module(
    module: nn.Module,
    offset: float = 0.0,
    eps: float = 1e-6,
    casting_mode: str = "llama",
    in_place: bool = True,
    row_mode: bool | None = None,
) -> None:
    """Make an RMSNorm module run ours with these options, unverified; its own eps counts before `eps`."""
    from liger_kernel.transformers.rms_norm import LigerRMSNorm

    options = dict(offset=offset, casting_mode=casting_mode, in_place=in_place, row_mode=row_mode)
    vars(module).update(options, variance_epsilon=_own_eps(module, eps))
    for method in ("forward", "extra_repr"):
        _bind_method_to_module(module, method, getattr(LigerRMSNorm, method))


@_in_every_part
def _patch_layer_norm_module(module: nn.Module, eps: float = 1e-6) -> None:
    """Make a LayerNorm module run ours, unverified; its own eps counts before `eps`."""
    from liger_kernel.transformers.layer_norm import LigerLayerNorm

    width = getattr(module, "hidden_size", None) or getattr(module, "normalized_shape", None)
    vars(module).update(variance_epsilon=_own_eps(module, eps), hidden_size=width)
    for method in ("forward", "extra_repr"):
        _bind_method_to_module(module, method, getattr(LigerLayerNorm, method))


@_in_every_part
def _patch_swiglu_module(module: nn.Module, liger_module: type[nn.Module]) -> None:
    """Make an MLP run the forward of one of ours, unverified."""
    _bind_method_to_module(module, "forward", liger_module.forward)


@_in_every_part
def _patch_geglu_module(module: nn.Module) -> None:
    """Make an MLP run LigerGEGLUMLP's forward, unverified."""
    from liger_kernel.transformers.geglu import LigerGEGLUMLP

    _bind_method_to_module(module, "forward", LigerGEGLUMLP.forward)


def _patch_muse_glimmer_scale_free_rms_norm_module(module: nn.Module, eps: float = 1e-6) -> None:
    """Make a norm without a weight run ours, unverified."""
    _patch_rms_norm_module(module, eps=eps, casting_mode="gemma", in_place=False)


def _patch_muse_glimmer_text_centered_rms_norm_module(module: nn.Module, eps: float = 1e-6) -> None:
    """Make a norm whose weight is kept as its distance from 1 run ours, unverified."""
    _patch_rms_norm_module(module, offset=1.0, eps=eps, casting_mode="gemma", in_place=False)
