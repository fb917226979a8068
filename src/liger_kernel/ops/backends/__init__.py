"""The table of implementations that other projects read; ours are found by liger_kernel.backends."""

from liger_kernel.ops.backends.registry import (
    IMPL_REGISTRY,
    LIGER_KERNEL_IMPL_ENV,
    ImplInfo,
    register_impl,
    select_impl,
)

__all__ = ["IMPL_REGISTRY", "LIGER_KERNEL_IMPL_ENV", "ImplInfo", "register_impl", "select_impl"]
