"""Gated MLPs that keep their input alone for the backward."""

from __future__ import annotations

from liger_kernel.ops.tiled_mlp import apply_tiled_mlp
from liger_kernel.transformers.geglu import LigerGEGLUMLP
from liger_kernel.transformers.swiglu import LigerSwiGLUMLP


class LigerTiledSwiGLUMLP(LigerSwiGLUMLP):
    """LigerSwiGLUMLP in num_shards pieces of the sequence (default: ceil(S / hidden_size)), see apply_tiled_mlp."""

    def __init__(self, config, num_shards: int | None = None):
        super().__init__(config)
        self.num_shards = num_shards

    def forward(self, x):
        return apply_tiled_mlp(LigerSwiGLUMLP.forward, self, x, self.num_shards)


class LigerTiledGEGLUMLP(LigerGEGLUMLP):
    """LigerGEGLUMLP in num_shards pieces of the sequence (default: ceil(S / hidden_size)), see apply_tiled_mlp."""

    def __init__(self, config, num_shards: int | None = None):
        super().__init__(config)
        self.num_shards = num_shards

    def forward(self, x):
        return apply_tiled_mlp(LigerGEGLUMLP.forward, self, x, self.num_shards)
