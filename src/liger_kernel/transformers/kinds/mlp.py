"""Gated MLPs: down(act(gate(x)) * up(x)), with gate and up separate or packed in one linear.

The child linears are called, never read, so PEFT, quantised and sharded linears keep their own forward.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from liger_kernel import ops
from liger_kernel.ops.sharded import is_dtensor
from liger_kernel.ops.spare import hooked
from liger_kernel.transformers import functional
from liger_kernel.transformers.kinds import probe, sharded
from liger_kernel.transformers.kinds.probe import MAX_ERROR, MIN_SAME, Match, Refusal

NAME = "mlp"
ROWS = (4, 7)
KEEP = "LIGER_KERNEL_KEEP_MLP_PRODUCT"

# activation -> (flag, what torch computes)
ACTIVATIONS: dict[str, tuple[str, Callable]] = {
    "silu": ("swiglu", F.silu),
    "gelu_tanh": ("geglu", functools.partial(F.gelu, approximate="tanh")),
    "gelu": ("geglu", F.gelu),
}


@dataclass(frozen=True)
class MLP:
    """A gated MLP's form, by the names of its children; gate == up where they are packed in one linear."""

    gate: str
    up: str
    down: str
    activation: str
    gate_first: bool = True
    wide: bool = False  # act and product in fp32, rounded once


def _linears(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Child linears of any make, as name -> (in, out)."""
    found = {}
    for name, child in module._modules.items():
        inner, outer = getattr(child, "in_features", None), getattr(child, "out_features", None)
        if isinstance(inner, int) and isinstance(outer, int):
            found[name] = inner, outer
    return found


def _roles(linears: dict[str, tuple[int, int]]) -> Iterator[tuple[str, str, str]]:
    """Ways to read the linears as (gate, up, down) by their sizes."""
    for down, (inner, outer) in linears.items():
        rest = [n for n in linears if n != down]
        if len(rest) == 2 and all(linears[n] == (outer, inner) for n in rest):
            yield from ((gate, up, down) for gate, up in itertools.permutations(rest))
        elif len(rest) == 1 and linears[rest[0]] == (outer, 2 * inner):
            yield rest[0], rest[0], down


def candidate(module: nn.Module) -> bool:
    """Two or three linears of matching sizes, nothing else that holds a tensor, and one input."""
    if len(module._modules) < 2 or any(p is not None for p in module._parameters.values()) or module._buffers:
        return False
    linears = _linears(module)
    others = [c for n, c in module._modules.items() if n not in linears and c is not None]
    if any(True for c in others for _ in c.parameters()) or not any(True for _ in _roles(linears)):
        return False
    return len(probe.required_inputs(module)) == 1


def _sizes(hidden: int, inner: int) -> dict[int, int]:
    """Small stand-ins that keep which sizes are equal: attributes that hold a size are changed with the linears."""
    small = 16
    same = {hidden: small, 2 * hidden: 2 * small, hidden // 2: small // 2}
    small_inner = same.get(inner, 24)
    return {2 * inner: 2 * small_inner, inner: small_inner, hidden: small}


def _twin(module, linears, small, dtype, training):
    children = {}
    for seed, (name, (inner, outer)) in enumerate(linears.items()):
        has_bias = getattr(module._modules[name], "bias", None) is not None
        linear = nn.Linear(small[inner], small[outer], bias=has_bias, device="cpu", dtype=dtype)
        for i, (parameter, p) in enumerate(linear.named_parameters()):
            value = 0.4 * probe.random(*p.shape, seed=10 * seed + i, dtype=dtype)
            # past register_parameter: accelerate redirects that to meta while a model is built
            linear._parameters[parameter] = nn.Parameter(value, requires_grad=False)
        children[name] = linear
    changed = {
        k: small[v] for k, v in probe.settings(module).items() if type(v) is int and v in small and v > max(ROWS)
    }
    return probe.twin(module, {}, children, changed, training)


def _formula(form: MLP, made: nn.Module, x):
    gate, up, down = (made.get_submodule(name) for name in (form.gate, form.up, form.down))
    return down(gated(form, gate(x).chunk(2, -1) if gate is up else (gate(x), up(x))))


def gated(form: MLP, pair) -> torch.Tensor:
    """What torch computes of gate and up, which lie in this order where they are packed and the gate is first."""
    gate, up = pair if form.gate_first else reversed(pair)
    if form.wide:
        return gated(replace(form, gate_first=True, wide=False), (gate.float(), up.float())).to(gate.dtype)
    return ACTIVATIONS[form.activation][1](gate) * up


def _forms(linears) -> Iterator[MLP]:
    for gate, up, down in _roles(linears):
        orders = (True, False) if gate == up else (True,)
        for activation, first in itertools.product(ACTIVATIONS, orders):
            yield MLP(gate, up, down, activation, first)


@probe.verified_once
def verify(module: nn.Module) -> Match | Refusal | None:
    """The form a candidate computes in training and evaluation, in fp32 and to the bit in bf16.

    None for what returns something else than a tensor of its input's shape and dtype, as an attention does.
    """
    linears = _linears(module)
    _, _, down = next(_roles(linears))
    inner, hidden = linears[down]
    small = _sizes(hidden, inner)
    x = probe.random(*ROWS, small[hidden], seed=7)
    modes = ((torch.float32, True), (torch.float32, False), (torch.bfloat16, True))
    closest = float("inf")
    try:
        twins = [_twin(module, linears, small, dtype, training) for dtype, training in modes]
        originals = [probe.run(t, x.to(dtype)) for t, (dtype, _) in zip(twins, modes, strict=True)]
    except Exception:  # an attention's projections can have an MLP's sizes; its code then wants heads, not rows
        return None
    for form in _forms(linears):
        ours = [_formula(form, t, x.to(dtype)) for t, (dtype, _) in zip(twins, modes, strict=True)]
        found = max(probe.error(o, w) for o, w in zip(originals[:2], ours, strict=False))
        closest = min(closest, found)
        if found <= MAX_ERROR:
            low = functools.partial(_formula, made=twins[2], x=x.to(torch.bfloat16))
            return as_it_rounds(NAME, form, found, originals[2], low)
    if closest == float("inf"):
        return None
    return Refusal(NAME, f"has the linears of a gated MLP but fits no known formula (closest: {closest:.0e})")


def as_it_rounds(kind: str, form: MLP, error: float, found: torch.Tensor, formula: Callable) -> Match | Refusal:
    """The form that rounds where the bf16 result `found` was rounded; formula(form) is what it would be."""
    rates = {}
    for one in (form, replace(form, wide=True)):
        rates[one] = probe.same(found, formula(one))
        if rates[one] >= MIN_SAME:
            flag = ACTIVATIONS[form.activation][0]
            kinds = [flag, form.activation, *["packed"] * (form.gate == form.up), *["in fp32"] * one.wide]
            return Match(kind, flag, " ".join(kinds), one, error)
    best = max(rates.values())
    return Refusal(kind, f"agrees in fp32 but rounds bf16 in another order ({best:.0%} of the bits agree)")


def _down(linear: nn.Module, product: torch.Tensor, remake: Callable[[], torch.Tensor]) -> torch.Tensor:
    """linear(product), whose backward makes the product again from what is kept anyway instead of keeping it too.

    The linear is called, so whatever it is, it keeps its own forward; only the copy of its input is not stored.
    H100, a step of a 1B LLaMA at 8x2048: 27.2 -> 23.2 GiB for 1.8 % of its time.
    """
    if type(product) is not torch.Tensor or not _may_remake():
        return linear(product)
    start, size = product.data_ptr(), product.numel()

    def pack(kept):
        if kept.data_ptr() == start and kept.numel() == size and kept.dtype == dtype and kept.is_contiguous():
            return kept.shape
        return kept

    def unpack(kept):
        return remake().view(kept) if isinstance(kept, torch.Size) else kept

    dtype = product.dtype
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return linear(product)


def _may_remake() -> bool:
    """Not where nothing is kept, where somebody else decides what is (checkpointing, offloading), or while tracing."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or os.environ.get(KEEP, "0") not in ("", "0"):
        return False
    hooks: Any = torch._C._autograd
    recomputing = torch._C._current_graph_task_id() != -1
    return (
        not recomputing
        and hooks._saved_tensors_hooks_is_enabled()  # type: ignore[attr-defined]
        and not hooked()
    )


def product(form: MLP, gate: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
    """act(gate) * up, the two packed in one tensor where up is None."""
    if is_dtensor(gate):
        found = None if up is None else sharded.elementwise(functools.partial(product, form), gate, up)
        return found if found is not None else gated(form, gate.chunk(2, -1) if up is None else (gate, up))
    if form.wide and gate.dtype not in (torch.float32, torch.float64):
        return product(replace(form, wide=False), gate.float(), None if up is None else up.float()).to(gate.dtype)
    if up is None:
        if form.activation == "silu" and form.gate_first:
            return ops.LigerFusedGateUpSiLUMulFunction.apply(gate)
        gate, up = gate.chunk(2, -1) if form.gate_first else reversed(gate.chunk(2, -1))
    if form.activation == "silu":
        return functional.liger_swiglu(gate, up)
    if form.activation == "gelu_tanh":
        return functional.liger_geglu(gate, up)
    return ops.LigerGELUMulFunction.apply(gate, up, "none")


@functools.cache
def forward(form: MLP, name: str = "forward"):
    """The method that replaces an MLP's forward; `name` is the attribute it is bound under (pickle needs it)."""
    packed = form.gate == form.up

    def method(self, *args, **kwargs):
        if len(args) != 1 or kwargs:
            return type(self).forward(self, *args, **kwargs)
        x = args[0]
        gate = getattr(self, form.gate)(x)
        up = None if packed else getattr(self, form.up)(x)

        def remake():
            with torch.no_grad():
                return product(form, gate, up)

        return _down(getattr(self, form.down), product(form, gate, up), remake)

    method.__name__ = name
    return method
