"""Helpers that tests share."""

import torch


def dtypes(impl: str, device: torch.device) -> list[torch.dtype]:
    """What an implementation computes in: Triton's interpreter has no bf16 arithmetic."""
    interpreted = impl == "triton" and device.type == "cpu"
    return [torch.float32, torch.float16] if interpreted else [torch.float32, torch.float16, torch.bfloat16]


def tiny_model(model_type: str, layers: int = 2, **config) -> torch.nn.Module:
    """A small model of a type with a row, in training mode, its norms' weights away from their initial value."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from liger_kernel.transformers.models import MODELS, TINY

    row = MODELS[model_type].tiny if model_type in MODELS else {}
    config = CONFIG_MAPPING[model_type](**(TINY | row | {"num_hidden_layers": layers} | config))
    model = AutoModelForCausalLM.from_config(config).train()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn_like(p))
    return model


def patched_names(model: torch.nn.Module) -> set[str]:
    """The modules of a model that have a forward of ours."""
    from liger_kernel.transformers.kinds.probe import RECORD

    return {name for name, module in model.named_modules() if RECORD in module.__dict__}
