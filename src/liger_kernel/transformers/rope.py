"""Rotary position embeddings with the signatures of transformers' modeling files."""

from __future__ import annotations

import torch

from liger_kernel.ops.rope import LigerRopeFunction
from liger_kernel.transformers import functional


def liger_rotary_pos_emb(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    unsqueeze_dim: int = 1,
    rotary_dim: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`liger_rope`: stands where a modeling file has apply_rotary_pos_emb (half rotation, full or partial)."""
    return functional.liger_rope(q, k, cos, sin, position_ids, unsqueeze_dim, rotary_dim)


def liger_rotary_pos_emb_vision(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """q, k (S, H, D) or (B, S, H, D), cos and sin (S, D): computed in fp32, results in the dtypes of q and k.

    Raises ValueError as liger_rope does.
    """
    packed = q.dim() == 3
    if packed:
        q, k = q.unsqueeze(0), k.unsqueeze(0)
    q, k = LigerRopeFunction.apply(q, k, cos.float(), sin.float(), None, 2, None, True)
    return (q.squeeze(0), k.squeeze(0)) if packed else (q, k)


def liger_rotary_pos_emb_gpt_oss(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """liger_rope with cos and sin of half a head's width, each element for both halves, as GPT-OSS keeps them."""
    return functional.liger_rope(q, k, cos, sin, None, unsqueeze_dim, 2 * cos.shape[-1])
