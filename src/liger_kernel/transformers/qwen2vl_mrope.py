"""Multimodal rotary position embedding with the signature of transformers' Qwen2-VL."""

from __future__ import annotations

import torch

from liger_kernel.transformers import functional


def liger_multimodal_rotary_pos_emb(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    mrope_section: list[int],
    unsqueeze_dim: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`liger_qwen2vl_mrope`: stands where a modeling file has apply_multimodal_rotary_pos_emb."""
    return functional.liger_qwen2vl_mrope(q, k, cos, sin, mrope_section, unsqueeze_dim)
