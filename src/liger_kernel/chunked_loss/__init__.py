"""Alignment and distillation losses over a fused LM head."""

from liger_kernel._lazy import lazy_names

_HERE = "liger_kernel.chunked_loss"

__all__, __getattr__ = lazy_names(
    __name__,
    {
        f"{_HERE}.cosine_similarity_loss": ("LigerFusedLinearCosineSimilarityLoss",),
        f"{_HERE}.cpo_loss": ("LigerFusedLinearCPOLoss",),
        f"{_HERE}.dpo_loss": ("LigerFusedLinearDPOLoss",),
        f"{_HERE}.grpo_loss": ("LigerFusedLinearGRPOLoss",),
        f"{_HERE}.jsd_loss": ("LigerFusedLinearJSDLoss",),
        f"{_HERE}.kto_loss": ("LigerFusedLinearKTOLoss",),
        f"{_HERE}.orpo_loss": ("LigerFusedLinearORPOLoss",),
        f"{_HERE}.simpo_loss": ("LigerFusedLinearSimPOLoss",),
    },
)
