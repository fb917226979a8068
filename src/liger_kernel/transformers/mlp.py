"""Gated MLPs under upstream's second set of names. They call their linears, so adapters on them keep working."""

from __future__ import annotations

from liger_kernel.transformers.swiglu import LigerFalconH1SwiGLUMLP, LigerSwiGLUMLP


class LigerMLP(LigerSwiGLUMLP):
    """LigerSwiGLUMLP."""

    def __init__(self, config):
        super().__init__(config)


class LigerFalconH1MLP(LigerFalconH1SwiGLUMLP):
    """LigerFalconH1SwiGLUMLP."""
