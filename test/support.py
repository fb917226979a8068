"""Helpers that tests share."""

import torch


def dtypes(impl: str, device: torch.device) -> list[torch.dtype]:
    """What an implementation computes in: Triton's interpreter has no bf16 arithmetic."""
    interpreted = impl == "triton" and device.type == "cpu"
    return [torch.float32, torch.float16] if interpreted else [torch.float32, torch.float16, torch.bfloat16]
