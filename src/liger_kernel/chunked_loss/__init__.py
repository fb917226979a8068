"""Alignment and distillation losses over a fused LM head."""

from liger_kernel._lazy import lazy_names

_HERE = "liger_kernel.chunked_loss"

__all__, __getattr__ = lazy_names(
    __name__,
    {
        f"{_HERE}.dpo_loss": ("LigerFusedLinearDPOLoss",),
        f"{_HERE}.grpo_loss": ("LigerFusedLinearGRPOLoss",),
    },
    not_built=(
        "LigerFusedLinearCPOLoss", "LigerFusedLinearCosineSimilarityLoss", "LigerFusedLinearJSDLoss",
        "LigerFusedLinearKTOLoss", "LigerFusedLinearORPOLoss", "LigerFusedLinearSimPOLoss",
    ),
)  # fmt: skip
