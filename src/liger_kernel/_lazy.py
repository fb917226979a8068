"""Modules whose public names are resolved at first use, so that importing the package imports no kernel."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping
from typing import Any


def lazy_names(module: str, homes: Mapping[str, Collection[str]]) -> tuple[list[str], Callable[[str], Any]]:
    """(__all__, __getattr__) of a module: `homes` maps a module's full name to the public names it defines."""
    home = {name: source for source, names in homes.items() for name in names}

    def __getattr__(name: str):
        if name in home:
            # import_module, not `from . import x`: the latter asks this very function for "x" and never returns
            return getattr(importlib.import_module(home[name]), name)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return sorted(home), __getattr__
