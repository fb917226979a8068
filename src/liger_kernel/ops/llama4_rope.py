"""Rotary embedding by a complex factor per pair of elements, as Llama 4's: a layout of rope.

(y1 + i y2) = (x1 + i x2) * freqs        x1, x2 the even and the odd elements, in fp32
"""

from __future__ import annotations

import torch

from liger_kernel.ops.rope import LigerRopeFunction


class LigerLlama4RopeFunction:
    """apply(q, k, freqs_cis, BLOCK_SIZE=None) -> (q, k) rotated, each in its own dtype. BLOCK_SIZE has no effect.

    q (B, S, Hq, D), k (B, S, Hk, D); freqs_cis (B or 1, S, D / 2) or (S, D / 2), complex, or its real and imaginary
    parts in a last dim of 2. Raises ValueError as `liger_rope` does.
    """

    @staticmethod
    def apply(q, k, freqs_cis, BLOCK_SIZE=None):
        parts = torch.view_as_real(freqs_cis) if freqs_cis.is_complex() else freqs_cis
        dim = q.shape[-1]
        if parts.dim() not in (3, 4) or parts.shape[-2:] != (dim // 2, 2):
            raise ValueError(f"llama4_rope: freqs_cis of shape {tuple(freqs_cis.shape)} does not fit heads of {dim}")
        cos, sin = parts.unbind(-1)
        return LigerRopeFunction.apply(q, k, cos, sin, None, 2, dim, True, "interleaved")


def llama4_rope_forward(q, k, freqs_cis, BLOCK_SIZE=None, imag_sign=1.0):
    """-> (q, k) rotated; imag_sign=-1.0 rotates back."""
    with torch.no_grad():
        parts = torch.view_as_real(freqs_cis) if freqs_cis.is_complex() else freqs_cis
        if imag_sign != 1.0:
            parts = parts * parts.new_tensor([1.0, imag_sign])
        return LigerLlama4RopeFunction.apply(q, k, parts)
