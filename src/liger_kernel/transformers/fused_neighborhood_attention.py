"""Neighbourhood attention in one dimension as modules."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from liger_kernel.ops.fused_neighborhood_attention import LigerFusedNeighborhoodAttentionFunction, check_window


class LigerFusedNeighborhoodAttention(nn.Module):
    """o_proj(attention of q_proj(x), k_proj(x), v_proj(x)), x (B, S, hidden_size), over the kernel_size positions
    around each, dilation apart (arXiv:2204.07143). dropout is applied to the result.

    Raises ValueError for num_heads that do not divide hidden_size, for a window without a middle, and for an
    attention_mask: who sees whom is the window's to say.
    """

    def __init__(self, hidden_size, num_heads, kernel_size=7, dilation=1, bias=True, dropout=0.0, scale=None):
        super().__init__()
        if num_heads < 1 or hidden_size % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide hidden_size={hidden_size}")
        check_window(kernel_size, dilation)
        self.hidden_size, self.num_heads, self.head_dim = hidden_size, num_heads, hidden_size // num_heads
        self.kernel_size, self.dilation, self.scale = kernel_size, dilation, scale
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states, attention_mask=None):
        if attention_mask is not None:
            raise ValueError("attention_mask must be None: neighbourhood attention takes no mask")
        q, k, v = (
            projection(hidden_states).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        o = LigerFusedNeighborhoodAttentionFunction.apply(q, k, v, self.kernel_size, self.dilation, self.scale)
        return self.dropout(self.o_proj(o.transpose(1, 2).flatten(2)))

    def extra_repr(self):
        return f"num_heads={self.num_heads}, kernel_size={self.kernel_size}, dilation={self.dilation}"


class LigerFusedNeighborhoodAttentionLayer(nn.Module):
    """x + attention(layer_norm(x)). Raises ValueError as LigerFusedNeighborhoodAttention does."""

    def __init__(
        self, hidden_size, num_heads, kernel_size=7, dilation=1, bias=True, dropout=0.0, layer_norm_eps=1e-5, scale=None
    ):
        super().__init__()
        self.attention = LigerFusedNeighborhoodAttention(
            hidden_size, num_heads, kernel_size, dilation, bias, dropout, scale
        )
        self.layer_norm = nn.LayerNorm(hidden_size, eps=layer_norm_eps)

    def forward(self, hidden_states, attention_mask=None):
        return hidden_states + self.attention(self.layer_norm(hidden_states), attention_mask)


@dataclass
class LigerFusedNeighborhoodAttentionConfig:
    """The arguments of a LigerFusedNeighborhoodAttentionLayer."""

    hidden_size: int = 768
    num_heads: int = 12
    kernel_size: int = 7
    dilation: int = 1
    bias: bool = True
    dropout: float = 0.0
    layer_norm_eps: float = 1e-5
    scale: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Its fields by name."""
        return asdict(self)
