"""nn.DataParallel: its replicas of a patched module run what is bound to that module, on their own parameters."""

from __future__ import annotations

from types import MethodType

from torch import nn

_NAME = "_replicate_for_data_parallel"  # what torch.nn.parallel.replicate calls on each module


class _Replicate:
    """The module's own way to replicate itself, then its bound methods bound to the replica."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self) -> nn.Module:
        replica = getattr(type(self.module), _NAME)(self.module)
        for name, value in self.module.__dict__.items():
            if isinstance(value, MethodType) and value.__self__ is self.module:
                replica.__dict__[name] = MethodType(value.__func__, replica)
            elif hasattr(value, "replicated"):
                replica.__dict__[name] = value.replicated(replica)
        return replica


def bind_replicas(module: nn.Module) -> None:
    """Make replicas of this module take its bound methods with them, and what it holds with a method `replicated`."""
    module.__dict__[_NAME] = _Replicate(module)


def unbind_replicas(module: nn.Module) -> None:
    """Undo bind_replicas."""
    module.__dict__.pop(_NAME, None)
