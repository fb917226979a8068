"""Rotary embedding whose cos and sin come in three planes (time, height, width), as Qwen2-VL's: a layout of rope.

Wang et al. 2024, Qwen2-VL, arXiv:2409.12191, section 2.1.
"""

from __future__ import annotations

import torch

from liger_kernel.ops.core import kernels
from liger_kernel.ops.rope import LigerRopeFunction, prepare


class LigerQwen2VLMRopeFunction:
    """apply(q, k, cos, sin, mrope_section, unsqueeze_dim=1) -> (q, k) rotated."""

    @staticmethod
    def apply(q, k, cos, sin, mrope_section, unsqueeze_dim=1):
        sections = sections_of(mrope_section, cos)
        return LigerRopeFunction.apply(q, k, cos, sin, None, unsqueeze_dim, None, False, "half", sections)


def liger_qwen2vl_mrope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    mrope_section: list[int],
    unsqueeze_dim: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (B, Hq, S, D) and k (B, Hk, S, D), any float dtype and memory layout, rotated by three positions each.

    cos, sin: (3, B or 1, S, D). mrope_section (a, b, c), a + b + c = D / 2: how many columns of a half are turned by
    the position in time, in height and in width. unsqueeze_dim=2 is for (B, S, H, D).
    Raises ValueError as `liger_rope` does, and for sections that do not fit.
    """
    return LigerQwen2VLMRopeFunction.apply(q, k, cos, sin, mrope_section, unsqueeze_dim)


def sections_of(mrope_section, cos):
    """The three sections, also where they are given twice, once for each half."""
    sections = tuple(mrope_section)
    return sections[:3] if sections[3:] == sections[:3] and 2 * sum(sections[:3]) == cos.shape[-1] else sections


def qwen2vl_mrope_forward(q, k, cos, sin, mrope_section):
    """-> (q, k, cos, sin), q and k rotated."""
    with torch.no_grad():
        return *LigerQwen2VLMRopeFunction.apply(q, k, cos, sin, mrope_section), cos, sin


def qwen2vl_mrope_backward(dq, dk, cos, sin, mrope_section):
    """-> (dq, dk)."""
    dq, dk, cos, sin, options = prepare(dq, dk, cos, sin, sections=sections_of(mrope_section, cos))
    return kernels("rope", dq).backward(dq, dk, cos, sin, *options[:4], dq.dtype, dk.dtype)
