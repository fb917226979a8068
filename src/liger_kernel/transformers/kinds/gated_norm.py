"""Norms with a gate: two inputs, at most a weight; what verify of norm.py asks for a norm that takes two inputs."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from liger_kernel.ops.gated_rms_norm import ACTIVATIONS, CASTING
from liger_kernel.ops.gated_rms_norm import reference as gated_rms_norm
from liger_kernel.ops.sharded import is_dtensor
from liger_kernel.transformers import functional
from liger_kernel.transformers.kinds import probe
from liger_kernel.transformers.kinds.probe import MAX_ERROR, MIN_SAME, Match, Refusal

_LOW, _HIGH = torch.bfloat16, torch.float32
# Dtypes of the input, the gate and the weight that meet in training: all bf16, and the mixtures around a scan in fp32.
_MIXTURES = ((_LOW, _LOW, _LOW), (_LOW, _LOW, _HIGH), (_HIGH, _LOW, _LOW), (_LOW, _HIGH, _LOW))


@dataclass(frozen=True)
class GatedNorm:
    """A gated norm's form. weight is a parameter's name, gate an input's; eps is an attribute's name or a constant."""

    weight: str | None
    gate: str
    eps: str | float
    gate_first: bool
    activation: str
    casting: str
    groups: int
    promotes: bool = False  # an fp32 weight makes the result of a bf16 input fp32


def takes_a_gate(module: nn.Module) -> bool:
    """Two inputs, and whatever else has a default; at most one parameter."""
    names = [p.name for p in probe.inputs(module)]
    parameters = [p for p in module._parameters.values() if p is not None]
    return len(names) >= 2 and set(probe.required_inputs(module)) <= set(names[:2]) and len(parameters) <= 1


def _group_counts(module: nn.Module, width: int) -> list[int]:
    """1, and what the module's whole numbers may mean: a number of groups, or the size of one."""
    sizes = {v for v in probe.settings(module).values() if type(v) is int and 1 < v < width and width % v == 0}
    return sorted({1} | sizes | {width // v for v in sizes})


def _forms(weight: str | None, gate: str, eps: list[str | float], groups: list[int]) -> Iterator[GatedNorm]:
    for e, first, act, casting, g in itertools.product(eps, (False, True), ACTIVATIONS, CASTING, groups):
        yield GatedNorm(weight, gate, e, first, act, casting, g)


def _formula(form: GatedNorm, x, gate, values, eps, out_dtype=None):
    w = values.get(form.weight)
    return gated_rms_norm(x, gate, w, eps, form.gate_first, form.activation, form.casting, form.groups, out_dtype)


def verify(module: nn.Module, kind: str, x, values, attributes, eps) -> Match | Refusal | None:
    """The form a candidate computes of rows x with parameters `values`; None for what is no norm of x with a gate."""
    gate = probe.random(*x.shape, seed=8) * torch.tensor([1.0, 4.0]).view(-1, 1, 1)
    original = functools.partial(_run, module, values)
    try:
        y = original(x, gate)
        if not _is_a_gated_norm(original, x, gate, y):
            return None
    except Exception:  # any code of any model may run here
        return None
    fits = []
    closest = float("inf")
    modes = [y, original(x, gate, training=False)]
    name = probe.inputs(module)[1].name
    for form in _forms(next(iter(values), None), name, eps, _group_counts(module, x.shape[-1])):
        value = attributes[form.eps] if isinstance(form.eps, str) else form.eps
        wanted = _formula(form, x, gate, values, value)
        found = max(probe.error(y, wanted) for y in modes)
        closest = min(closest, found)
        if found <= MAX_ERROR:
            fits.append((form, value, found))
    if not fits:
        return Refusal(kind, f"behaves like a gated norm but fits no known formula (closest: {closest:.0e})")
    return _rounding(kind, original, fits, x, gate, values)


def _run(module, values, x, gate, dtype=None, training=True):
    parameters = {n: v.to(dtype or v.dtype) for n, v in values.items()}
    return probe.run(probe.twin(module, parameters, {}, training=training), x, gate)


def _is_a_gated_norm(original, x, gate, y) -> bool:
    """Twice the input gives the same output (up to eps), and the output depends on the input and on the gate."""
    if not isinstance(y, torch.Tensor) or y.shape != x.shape:
        return False
    x, gate = x[:, :2], gate[:, :2]  # rows far above eps
    y = original(x, gate)
    others = original(x.flip(-1), gate), original(x, gate.flip(-1))
    return probe.error(original(2 * x, gate), y) < 1e-2 and not any(torch.equal(other, y) for other in others)


def _rounding(kind, original, fits, x, gate, values):
    """Among the forms that agree in fp32, the one that rounds where the module does, whatever dtypes meet in it."""
    runs = []
    for x_dtype, gate_dtype, w_dtype in _MIXTURES:
        given = x.to(x_dtype), gate.to(gate_dtype), {n: v.to(w_dtype) for n, v in values.items()}
        runs.append((*given, original(*given[:2], dtype=w_dtype)))
    promotes = bool(values) and runs[1][-1].dtype is _HIGH
    rates = []
    for form, value, found in fits:
        form = replace(form, promotes=promotes)
        rate = min(_agreement(y, _formula(form, *given, value, _out_dtype(form, *given))) for *given, y in runs)
        rates.append((rate, form, found))
    rate, form, found = max(rates, key=lambda r: r[0])
    if rate < MIN_SAME:
        return Refusal(kind, f"agrees in fp32 but rounds bf16 in another order ({rate:.0%} of the bits agree)")
    order = "gate_first" if form.gate_first else "norm_first"
    details = [form.activation, order, form.casting, f"groups {form.groups}" if form.groups > 1 else ""]
    details += [] if form.weight else ["no weight"]
    return Match(kind, "rms_norm", " ".join(["gated_rms_norm", *filter(None, details)]), form, found)


def _out_dtype(form: GatedNorm, x, gate, values):
    return torch.promote_types(x.dtype, values[form.weight].dtype) if form.promotes else x.dtype


def _agreement(found, wanted) -> float:
    """The part of the bits that agree; an fp32 result is as good within the error that two ways to divide have."""
    return max(probe.same(found, wanted), float(wanted.dtype is _HIGH and probe.error(found, wanted) <= MAX_ERROR))


@functools.cache
def forward(form: GatedNorm, name: str = "forward"):
    """The method that replaces a gated norm's forward; `name` is the attribute it is bound under (pickle needs it)."""

    def method(self, *args, **kwargs):
        inputs = (*args, kwargs[form.gate]) if kwargs.keys() == {form.gate} else args
        gate = inputs[1] if len(inputs) == 2 and len(args) + len(kwargs) == 2 else None
        if gate is None or gate.shape != inputs[0].shape or is_dtensor(gate) or is_dtensor(inputs[0]):
            return type(self).forward(self, *args, **kwargs)
        x = inputs[0]
        weight = None if form.weight is None else getattr(self, form.weight)
        eps = getattr(self, form.eps) if isinstance(form.eps, str) else form.eps
        out_dtype = torch.promote_types(x.dtype, weight.dtype) if form.promotes else x.dtype
        return functional.liger_gated_rms_norm(
            x, gate, weight, eps, gate_first=form.gate_first, activation=form.activation, casting_mode=form.casting,
            group_size=x.shape[-1] // form.groups, out_dtype=out_dtype,
        )  # fmt: skip

    method.__name__ = name
    return method
