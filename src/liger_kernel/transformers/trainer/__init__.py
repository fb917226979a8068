"""Trainers of other projects with the fused losses in them."""

from liger_kernel._lazy import lazy_names

__all__, __getattr__ = lazy_names(__name__, {f"{__name__}.orpo": ("LigerORPOTrainer",)})
