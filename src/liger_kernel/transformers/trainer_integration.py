"""The name under which older trainers look for the patching by model type."""

from liger_kernel.transformers.monkey_patch import _apply_liger_kernel

__all__ = ["_apply_liger_kernel"]
