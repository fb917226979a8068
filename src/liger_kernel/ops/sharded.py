"""Weights that a sharding engine holds in parts, recognised before they are taken for whole ones."""

from __future__ import annotations

from typing import Any

import torch


def is_dtensor(x: Any) -> bool:
    """Whether x is torch's DTensor, whose module takes long to import and is not imported for this."""
    return type(x).__name__ == "DTensor" and type(x).__module__.startswith("torch.")


def why_not_whole(weight: torch.Tensor) -> str | None:
    """Which engine holds this weight (V, H) in parts at this moment, and what to do; None for an ordinary tensor."""
    if is_dtensor(weight):
        return (
            f"is a DTensor {tuple(weight.placements)}, sharded by FSDP2 or tensor parallelism: {_REMEDY}, or pass "  # type: ignore[attr-defined]
            "weight.full_tensor()"
        )
    if hasattr(weight, "ds_id") and weight.numel() == 0:
        return f"is empty, sharded by DeepSpeed ZeRO-3: {_REMEDY}, or use deepspeed.zero.GatheredParameters"
    if weight.dim() == 1:
        return f"has one dimension, as FSDP1 (FullyShardedDataParallel) keeps its part of one: {_REMEDY}"
    if weight.dim() == 2 and weight.numel() == 0 and weight.shape[1] == 0:
        return f"is empty, as an engine leaves what it has sharded: {_REMEDY}"
    return None


_REMEDY = (
    "let the loss be computed within the model's forward (a patched model does, or outputs.logits.reduce(...), see "
    "docs/multi_gpu.md)"
)
