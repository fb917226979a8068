"""An MLP run over pieces of its sequence, so that only one piece's activations exist at a time (Arctic Long Sequence
Training, arXiv:2506.13996, section 3.2).

The forward keeps the input alone; the backward runs each piece again, for 8 instead of 6 flops per weight and token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def apply_tiled_mlp(
    fn: Callable,
    mlp_module: nn.Module,
    x: torch.Tensor,
    num_shards: int | None = None,
    compute_params: list | None = None,
) -> torch.Tensor:
    """fn(mlp_module, piece) over num_shards pieces of x (..., S, H) along S, put together again.

    num_shards: default ceil(S / H). Pieces are as even as S allows. compute_params, where given, are the parameters
    that fn uses; it has no effect, because autograd finds them. Raises ValueError for num_shards below 1.
    """
    seq = x.shape[-2]
    if num_shards is None:
        num_shards = -(-seq // x.shape[-1])
    if num_shards < 1:
        raise ValueError(f"tiled_mlp: num_shards must be at least 1, got {num_shards}")
    pieces = x.tensor_split(min(num_shards, max(seq, 1)), dim=-2)
    # MLPs draw no random numbers; where one does, a piece run again must draw the same ones
    return torch.cat([checkpoint(fn, mlp_module, piece, use_reentrant=False) for piece in pieces], dim=-2)


class LigerTiledMLPFunction:
    """apply(fn, mlp_module, x, shards, compute_params=None) -> y."""

    @staticmethod
    def apply(fn, mlp_module, x, shards, compute_params=None):
        return apply_tiled_mlp(fn, mlp_module, x, shards, compute_params)
