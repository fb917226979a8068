"""`liger_kernel.transformers.model.<name>.lce_forward`, upstream's patched forwards, all served by one function.

A model's own class forward runs, with its head fused for that call, so there is nothing per model to keep here.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

_FORWARDS = {
    "gemma3": ("causal_forward", "multimodal_forward"),
    "gemma4": ("causal_forward", "multimodal_forward"),
    "qwen3_5": ("lce_forward", "lce_forward_for_multimodal"),
    "qwen3_5_moe": ("lce_forward", "lce_forward_conditional_generation"),
}
_NAMES = (
    "deepseek_v2", "deepseek_v3", "deepseek_v4", "exaone4", "falcon_h1", "gemma", "gemma2", "gemma3", "gemma4", "glm4",
    "glm4v", "glm4v_moe", "gpt_oss", "granite", "hunyuan_v1", "internvl", "llama", "llama4", "llava", "ministral",
    "mistral", "mixtral", "mllama", "muse_glimmer", "nemotron", "olmo2", "olmo3", "paligemma", "phi3", "qwen2",
    "qwen2_5_vl", "qwen2_vl", "qwen3", "qwen3_5", "qwen3_5_moe", "qwen3_moe", "qwen3_next", "qwen3_vl", "qwen3_vl_moe",
    "smollm3", "smolvlm",
)  # fmt: skip


class _ModelModule(ModuleType):
    def __getattr__(self, name: str):
        if name in _FORWARDS.get(self.__name__.rpartition(".")[2], ("lce_forward",)):
            return importlib.import_module("liger_kernel.transformers.head").lce_forward
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


for _name in _NAMES:  # the import system looks into sys.modules after it has imported the parent
    _module = _ModelModule(f"{__name__}.{_name}", "The fused forward of this model family.")
    _module.__spec__ = ModuleSpec(_module.__name__, None)
    sys.modules[_module.__name__] = globals()[_name] = _module
