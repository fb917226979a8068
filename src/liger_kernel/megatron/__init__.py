"""Adapters for Megatron-Core."""

from liger_kernel._lazy import lazy_names

__all__, __getattr__ = lazy_names(
    __name__,
    {
        f"{__name__}.cross_entropy": ("LigerMegatronCrossEntropy",),
        f"{__name__}.monkey_patch": ("apply_liger_kernel_to_megatron",),
        f"{__name__}.rms_norm": ("LigerMegatronRMSNorm",),
        f"{__name__}.swiglu": ("LigerMegatronSwiGLU",),
    },
)
