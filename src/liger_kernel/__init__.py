"""Fused kernels for LLM training. Importing the package imports no kernel, no transformers and no device runtime."""

from __future__ import annotations

import importlib

from liger_kernel._version import __version__

_DISPATCH = ("available_impls", "get_impl", "set_impl")  # which implementation runs an op: liger_kernel.ops.core
_OLDER = {"available_backends": "available_impls", "get_backend": "get_impl", "set_backend": "set_impl"}
__all__ = ["__version__", *_DISPATCH, *_OLDER]


def __getattr__(name: str):
    if name in _DISPATCH or name in _OLDER:
        return getattr(importlib.import_module("liger_kernel.ops.core"), _OLDER.get(name, name))
    if name == "functional":
        return importlib.import_module("liger_kernel.functional")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
