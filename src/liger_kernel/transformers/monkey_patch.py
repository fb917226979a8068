"""The interface other projects know: a function per model type, and the mapping that finds it.

Every function comes from a row of models.py and calls the one engine in patch.py.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from liger_kernel.transformers import arrange, patch
from liger_kernel.transformers.models import APPLY_PREFIX, MODELS, Model

logger = logging.getLogger(__name__)


def _function_for(model_type: str, row: Model) -> Callable:
    """apply_liger_kernel_to_<model_type>, with the flags of its row."""
    defaults = row.flags()
    keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(f, keyword, default=d, annotation=bool) for f, d in defaults.items()]
    model = inspect.Parameter("model", keyword, default=None, annotation=nn.Module)
    signature = inspect.Signature([*parameters, model])

    def apply(*args, **kwargs):
        try:
            given = signature.bind(*args, **kwargs).arguments  # only what the caller named: a default is no demand
        except TypeError as problem:
            raise TypeError(f"{APPLY_PREFIX}{model_type}() {problem}") from None
        model = given.pop("model", None)
        if row.mlp in given:  # one flag for the model's MLP, whichever activation its configuration chose
            given["swiglu"] = given["geglu"] = given.pop(row.mlp)
        if model is None:
            return arrange.arrange(model_type, **given)
        _warn_of_another_type(model, model_type)
        return patch.apply_liger_kernel(model, **given)

    apply.__name__ = apply.__qualname__ = APPLY_PREFIX + model_type
    apply.__signature__ = signature  # type: ignore[attr-defined]
    apply.__doc__ = f"""Patch a {model_type} model, or without `model` every one in this process, built or to be built.

    Flags: {", ".join(defaults)}. Everything verified is on by default; None means the default.
    Returns the Report for a given model. Raises as `apply_liger_kernel` does, TypeError for an unknown flag.
    """
    return apply


def _warn_of_another_type(model: Any, model_type: str) -> None:
    """A model with nothing of this type in it is patched all the same, because what is patched is verified."""
    if not isinstance(model, nn.Module) or patch.disabled():
        return
    configs = (getattr(part, "config", None) for part in patch.unwrap(model).modules())
    types = [config.model_type for config in configs if config is not None and hasattr(config, "model_type")]
    if types and model_type not in types:
        logger.warning("%s%s is given a %s model: it is patched all the same", APPLY_PREFIX, model_type, types[0])


MODEL_TYPE_TO_APPLY_LIGER_FN: dict[str, Callable] = {name: _function_for(name, row) for name, row in MODELS.items()}
globals().update({APPLY_PREFIX + name: function for name, function in MODEL_TYPE_TO_APPLY_LIGER_FN.items()})


def _apply_liger_kernel(model_type: str, **kwargs: Any) -> None:
    """Arrange the patching of every model of a type; unknown types are passed over, unknown flags dropped."""
    function = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model_type)
    if function is None:
        logger.info("no kernels are known for model type %r: nothing is applied", model_type)
        return
    function(**_known(function, kwargs))


def _apply_liger_kernel_to_instance(model: nn.Module, **kwargs: Any) -> None:
    """Patch a live model by its config.model_type; unknown types are passed over, unknown flags dropped.

    A causal LM of transformers without a row of its own is patched by the engine with the same flags.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    function = MODEL_TYPE_TO_APPLY_LIGER_FN.get(str(model_type)) or _generic(model_type)
    if function is None:
        logger.info("no kernels are known for model type %r: nothing is applied", model_type)
        return
    function(model=model, **_known(function, kwargs))


def _generic(model_type: str | None) -> Callable | None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return patch.apply_liger_kernel if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else None


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
