"""Model outputs that also carry what a fused loss found: token_accuracy (0-d), predicted_tokens and entropy.

Each `Liger*OutputWithPast` is transformers' class of the same name without "Liger", with the three fields appended; one
whose parent this transformers does not have does not exist here.
"""

from __future__ import annotations

import importlib
from dataclasses import fields, make_dataclass
from functools import lru_cache
from typing import Any

import torch

_CORE = "transformers.modeling_outputs"
_PARENTS = {
    "CausalLMOutputWithPast": _CORE,
    "MoeCausalLMOutputWithPast": _CORE,
    "Gemma3CausalLMOutputWithPast": "gemma3",
    "Gemma4CausalLMOutputWithPast": "gemma4",
    "Glm4vMoeCausalLMOutputWithPast": "glm4v_moe",
    "InternVLCausalLMOutputWithPast": "internvl",
    "LlavaCausalLMOutputWithPast": "llava",
    "MuseGlimmerCausalLMOutputWithPast": "muse_glimmer",
    "PaliGemmaCausalLMOutputWithPast": "paligemma",
    "Qwen2VLCausalLMOutputWithPast": "qwen2_vl",
    "Qwen2_5_VLCausalLMOutputWithPast": "qwen2_5_vl",
    "Qwen3VLCausalLMOutputWithPast": "qwen3_vl",
    "Qwen3VLMoeCausalLMOutputWithPast": "qwen3_vl_moe",
    "Qwen3_5CausalLMOutputWithPast": "qwen3_5",
    "Qwen3_5MoeCausalLMOutputWithPast": "qwen3_5_moe",
}


@lru_cache(None)
def liger_output(parent) -> type:
    """The subclass of an output class with token_accuracy, predicted_tokens and entropy appended."""
    kinds = dict(token_accuracy=torch.FloatTensor, predicted_tokens=torch.LongTensor, entropy=torch.FloatTensor)
    extra = [(name, kind | None, None) for name, kind in kinds.items()]
    made = make_dataclass(f"Liger{parent.__name__}", extra, bases=(parent,))
    made.__module__ = __name__  # pickle finds it through __getattr__
    return made


def with_results(output, results: dict):
    """The model output (or tuple) with `results`, a part of the three fields, added."""
    if isinstance(output, tuple):
        return (*output, *results.values())
    parent: Any = type(output)
    return liger_output(parent)(**{f.name: getattr(output, f.name) for f in fields(output)}, **results)


def __getattr__(name: str):
    parent = name.removeprefix("Liger")
    if parent == name or parent not in _PARENTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _PARENTS[parent]
    home = home if home == _CORE else f"transformers.models.{home}.modeling_{home}"
    try:
        return liger_output(getattr(importlib.import_module(home), parent))
    except (ImportError, AttributeError) as error:
        raise AttributeError(f"{name} needs {home}.{parent}, which this transformers does not have") from error
