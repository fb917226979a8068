"""Mixtures of experts that transformers runs through its ExpertsInterface: the gate between their two products.

Which products run, grouped or batched, stays what the user or transformers chose, and so do router and losses. Every
such implementation calls the module's `_apply_gate`; that is what is verified and bound. `register` adds one more,
experts_implementation="liger", which takes grouped products wherever torch has them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import torch
from torch import nn

from liger_kernel.transformers.kinds import mlp, probe
from liger_kernel.transformers.kinds.mlp import ACTIVATIONS, MLP
from liger_kernel.transformers.kinds.probe import MAX_ERROR, Match, Refusal

NAME = "experts"
SLOT = "_apply_gate"  # the method that is bound, where other kinds bind the forward
IMPLEMENTATION = "liger"
INSIDE = "their gate is inside their forward, not a method of its own as in those of transformers' ExpertsInterface"
ALONE = "one of a list of experts, which are run one by one; transformers 5 keeps them in one module"


def candidate(module: nn.Module) -> bool:
    """All experts' gate and up in one parameter, with the method between the products or a second parameter."""
    tensors = [module._parameters.get(name) for name in ("gate_up_proj", "down_proj")]
    if tensors[0] is not None and callable(getattr(type(module), SLOT, None)):
        return True
    return all(t is not None and len(probe.shape_of(t)) == 3 for t in tensors)


def separate(model: nn.Module) -> Iterator[nn.Module]:
    """Experts that are modules of their own, as transformers 4 keeps them."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and name.rpartition(".")[2] == "experts":
            yield from module


def verify(module: nn.Module) -> Match | Refusal:
    """The form of a module's gate, where it has one and its implementation asks for it at all."""
    if not callable(getattr(type(module), SLOT, None)):
        return Refusal(NAME, INSIDE)
    chosen = getattr(getattr(module, "config", None), "_experts_implementation", None)
    if chosen in (None, "eager"):
        return Refusal(NAME, f"experts_implementation={chosen!r} runs them one by one, past their gate")
    return _verify(module)


@probe.verified_once
def _verify(module: nn.Module) -> Match | Refusal:
    made = probe.twin(module, {}, {})
    x = 2 * probe.random(9, 48, seed=7)
    try:
        found = {dtype: getattr(type(made), SLOT)(made, x.to(dtype)) for dtype in (torch.float32, torch.bfloat16)}
    except Exception as problem:  # any code of any model may run here
        return Refusal(NAME, f"their gate cannot be run ({type(problem).__name__}: {problem})".splitlines()[0])
    closest = float("inf")
    for activation, first in itertools.product(ACTIVATIONS, (True, False)):
        form = MLP("gate_up_proj", "gate_up_proj", "down_proj", activation, first)
        error = probe.error(found[torch.float32], mlp.gated(form, x.chunk(2, -1)))
        closest = min(closest, error)
        if error <= MAX_ERROR:
            low = functools.partial(mlp.gated, pair=x.bfloat16().chunk(2, -1))
            return mlp.as_it_rounds(NAME, form, error, found[torch.bfloat16], low)
    return Refusal(NAME, f"their gate fits no known formula (closest: {closest:.0e})")


@functools.cache
def forward(form: MLP, name: str = SLOT):
    """The method that replaces a module's gate; `name` is the attribute it is bound under (pickle needs it)."""

    def method(self, gate_up):
        return mlp.product(form, gate_up, None)

    method.__name__ = name
    return method


def register() -> None:
    """Make experts_implementation="liger" known to transformers, where it has the interface (5.0 and later)."""
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:
        return
    if IMPLEMENTATION not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _run)


def _run(self, hidden_states, top_k_index, top_k_weights):
    """The experts of hidden_states (T, H) that top_k_index (T, K) names, summed with top_k_weights (T, K)."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if hidden_states.dtype is torch.float64:  # torch has no grouped product in fp64
        return type(self).forward.__wrapped__(self, hidden_states, top_k_index, top_k_weights)
    return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)
