"""Llama 4's rotary embeddings, text and vision, with the signatures of its modeling file."""

from __future__ import annotations

from types import ModuleType

import torch

from liger_kernel.ops.llama4_rope import LigerLlama4RopeFunction


def liger_llama4_text_rotary_pos_emb(
    xq: torch.Tensor, xk: torch.Tensor, freqs_cis: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """xq (B, S, Hq, D), xk (B, S, Hk, D) times freqs_cis (B or 1, S, D / 2), complex: stands for apply_rotary_emb.

    Computed in fp32, results in the dtypes of xq and xk. Raises ValueError as liger_rope does.
    """
    return LigerLlama4RopeFunction.apply(xq, xk, freqs_cis)


def liger_llama4_vision_rotary_pos_emb(
    query: torch.Tensor, key: torch.Tensor, freqs_ci: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with freqs_ci (S, 1, D / 2) or (S, D / 2) on any device: stands for vision_apply_rotary_emb."""
    if freqs_ci.dim() == 3 and freqs_ci.shape[1] == 1:
        freqs_ci = freqs_ci.squeeze(1)
    return LigerLlama4RopeFunction.apply(query, key, freqs_ci.to(query.device))


def apply_liger_llama4_rope_full(modeling_module: ModuleType) -> None:
    """Put both functions into a modeling module of Llama 4, unverified."""
    modeling_module.apply_rotary_emb = liger_llama4_text_rotary_pos_emb  # type: ignore[attr-defined]
    modeling_module.vision_apply_rotary_emb = liger_llama4_vision_rotary_pos_emb  # type: ignore[attr-defined]
