"""The head's engine around the Triton row kernel of cross_entropy."""

from liger_kernel.ops.fused_linear_cross_entropy import TORCH as KERNELS

__all__ = ["KERNELS"]
