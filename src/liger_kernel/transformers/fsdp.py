"""Running a function on a sharded module's weights, with its FSDP hooks around it; which modules are sharded."""

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


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 has given this module a class of its own, derived of FSDPModule and of the module's."""
    bases = type(module).__bases__
    return len(bases) == 2 and bases[0].__name__ == "FSDPModule" and bases[0].__module__.startswith("torch.")


def unwrapped(module: Any) -> Any:
    """The module that FSDP1 has wrapped, or the module."""
    kind = type(module)
    if kind.__name__ == "FullyShardedDataParallel" and kind.__module__.startswith("torch."):
        return module.module
    return module


def call_again(module: Any, *args, split: bool = False, **kwargs) -> Any:
    """module(*args, **kwargs), a further time in one forward.

    Past the hooks where none of them brings the weight: whoever watches a module's calls (torch's CommDebugMode) takes
    no second one within the first. split: tensor parallelism splits the weight, and its hooks bring nothing.
    Of modules that FSDP2 shards as one unit (a head and the embedding it is tied to), the unit's hooks take a second
    call for the start of a new forward, and then do not reduce the gradient of the first. So it is made past them, on
    weights that stay gathered until the backward has used them.
    """
    if not is_fully_sharded(module):
        hooked = unwrapped(module) is not module or (module._forward_pre_hooks and not split)
        return (module if hooked else module.forward)(*args, **kwargs)
    if len(module._get_fsdp_state()._modules) == 1:
        return module(*args, **kwargs)
    module.unshard()
    return module.forward(*args, **kwargs)
