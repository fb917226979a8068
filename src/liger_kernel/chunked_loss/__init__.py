"""Alignment and distillation losses over a fused LM head."""

from liger_kernel._lazy import lazy_names

__all__, __getattr__ = lazy_names(
    __name__,
    {},
    not_built=(
        "LigerFusedLinearCPOLoss", "LigerFusedLinearCosineSimilarityLoss", "LigerFusedLinearDPOLoss",
        "LigerFusedLinearGRPOLoss", "LigerFusedLinearJSDLoss", "LigerFusedLinearKTOLoss",
        "LigerFusedLinearORPOLoss", "LigerFusedLinearSimPOLoss",
    ),
)  # fmt: skip
