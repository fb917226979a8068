"""Fused kernels for LLM training. Importing the package imports no kernel, no transformers and no device runtime."""

from __future__ import annotations

import importlib

from liger_kernel._version import __version__

_DISPATCH = ("available_impls", "get_impl", "set_impl")  # which implementation runs an op: liger_kernel.ops.core
__all__ = ["__version__", *_DISPATCH]


def __getattr__(name: str):
    if name in _DISPATCH:
        return getattr(importlib.import_module("liger_kernel.ops.core"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
