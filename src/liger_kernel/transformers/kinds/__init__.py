"""The kinds of modules the engine finds by structure, identifies by running and binds a forward to."""

from __future__ import annotations

from torch import nn

from liger_kernel.transformers.kinds import experts, mlp, norm, relu_squared
from liger_kernel.transformers.kinds.probe import Match, Refusal

MODULES = {kind.NAME: kind for kind in (norm, mlp, relu_squared, experts)}


def identify(module: nn.Module) -> Match | Refusal | None:
    """What a module computes, why one that looks like a known kind is left alone, or None for everything else."""
    for kind in MODULES.values():
        if kind.candidate(module) and (found := kind.verify(module)) is not None:
            return found
    return None
