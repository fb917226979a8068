"""Triton's own behaviour, changed on request. Importing this imports no Triton."""

from liger_kernel._lazy import lazy_names

__all__, __getattr__ = lazy_names(__name__, {f"{__name__}.monkey_patch": ("apply_liger_triton_cache_manager",)})
