"""Adapters for Megatron-Core."""

from liger_kernel._lazy import lazy_names

__all__, __getattr__ = lazy_names(
    __name__,
    {},
    not_built=(
        "LigerMegatronCrossEntropy", "LigerMegatronRMSNorm", "LigerMegatronSwiGLU", "apply_liger_kernel_to_megatron",
    ),
)  # fmt: skip
