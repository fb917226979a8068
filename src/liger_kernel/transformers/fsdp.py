"""Running a function on a sharded module's weights, with its FSDP hooks around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class _FSDPForwardRedirection:
    """Calls a method of a module wrapped by FSDP as if it were the module's forward.

    FSDP gathers parameters in forward only: the wrapped module's forward is replaced for one call, so that
    `method(*args, **kwargs)` runs with them gathered and its backward gathers them again.
    """

    def __call__(self, fsdp_module: nn.Module, method: Callable, *args, **kwargs) -> Any:
        """What method(*args, **kwargs) returns, run inside fsdp_module's call."""
        module = fsdp_module.module if hasattr(fsdp_module, "module") else fsdp_module
        had_own = "forward" in module.__dict__
        own = module.__dict__.get("forward")

        def redirected(*inner_args, **inner_kwargs):
            restore()  # the method may call the module's own forward
            return method(*inner_args, **inner_kwargs)

        def restore():
            if had_own:
                module.__dict__["forward"] = own
            else:
                module.__dict__.pop("forward", None)

        module.__dict__["forward"] = redirected
        try:
            return fsdp_module(*args, **kwargs)
        finally:
            restore()
