"""AutoModelForCausalLM with the kernels applied."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM

from liger_kernel.transformers import monkey_patch, patch


class AutoLigerKernelForCausalLM(AutoModelForCausalLM):
    """Loads or builds a causal LM and patches it. Keywords that name an op's flag are ours, all others go through.

    AutoModelForCausalLM itself is called: models that come with their code name it in their configuration.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As AutoModelForCausalLM.from_pretrained, patched; takes the flags of `apply_liger_kernel` too."""
        flags = _take_flags(kwargs)
        return _patched(
            AutoModelForCausalLM.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs), flags
        )

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> Any:
        """As AutoModelForCausalLM.from_config, patched; takes the flags of `apply_liger_kernel` too."""
        flags = _take_flags(kwargs)
        return _patched(AutoModelForCausalLM.from_config(config, **kwargs), flags)


def _take_flags(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: kwargs.pop(name) for name in patch.FLAGS if name in kwargs}


def _patched(model, flags):
    monkey_patch._apply_liger_kernel_to_instance(model, **flags)
    return model
