"""RMS and layer norms: one input, at most a weight and a bias of one dimension, found by what they compute.

The forms are data: which base, whether the weight is offset by one, and where the result is rounded. The cast order is
told apart in bf16, the output dtype with an fp32 weight on a bf16 input. A second input may be a gate (gated_norm.py).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from liger_kernel import ops
from liger_kernel.ops.rms_norm import reference as rms_norm
from liger_kernel.ops.sharded import is_dtensor
from liger_kernel.transformers import functional
from liger_kernel.transformers.kinds import gated_norm, probe, sharded
from liger_kernel.transformers.kinds.gated_norm import GatedNorm
from liger_kernel.transformers.kinds.probe import MAX_ERROR, MIN_SAME, Match, Refusal

NAME = "norm"
_EPS = (1e-6, 1e-5, 1e-12, 1e-8)  # where no attribute holds it
_SCALES = (1.0, 4.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-6)  # of the rows: small ones show where and how eps is added
_WIDTH = 64  # of a norm without a parameter or an attribute that gives it


@dataclass(frozen=True)
class Norm:
    """A norm's form. weight and bias are parameter names; eps is an attribute's name or a constant."""

    base: str  # "rms" or "layer"
    weight: str | None
    bias: str | None
    eps: str | float
    offset: float = 0.0
    casting: str = "gemma"
    promotes: str | None = None  # the casting where an fp32 weight makes the result of a bf16 input fp32
    autocasts: bool = False  # calls a torch op that autocast runs in fp32 on accelerators
    narrows: bool = False  # itself casts to the dtype of autocast


def candidate(module: nn.Module) -> bool:
    """No children, at most two parameters, all one-dimensional and of one size, as buffers are."""
    if module._modules:
        return False
    tensors = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    shapes = {tuple(probe.shape_of(t)) for t in tensors}
    return len(module._parameters) <= 2 and len(shapes) <= 1 and all(len(s) == 1 and s[0] > 1 for s in shapes)


def _forms(parameters: list[str], eps: list[str | float]) -> Iterator[Norm]:
    """Every form these parameters allow, the common ones first."""
    padded = [*parameters, None, None][:2]
    pairs = itertools.permutations(padded) if len(parameters) == 2 else [padded]
    for (weight, bias), e in itertools.product(pairs, eps):
        if bias is None:
            castings = ("llama", "gemma", "none") if weight else ("gemma", "none")
            offsets = (0.0, 1.0) if weight else (0.0,)
            for offset, casting in itertools.product(offsets, castings):
                yield Norm("rms", weight, None, e, offset, casting)
        for offset in (0.0, 1.0) if weight else (0.0,):
            yield Norm("layer", weight, bias, e, offset)


def _formula(form: Norm, x, values, eps, out_dtype=None):
    w, b = values.get(form.weight), values.get(form.bias)
    if form.base == "rms":
        return rms_norm(x, w, eps, form.offset, form.casting, out_dtype)
    w = w + form.offset if form.offset else w
    w, b = (t if t is None else t.float() for t in (w, b))
    return F.layer_norm(x.float(), x.shape[-1:], w, b, eps).to(out_dtype or x.dtype)


def _width(module: nn.Module) -> int:
    for p in module._parameters.values():
        if p is not None:
            return probe.shape_of(p)[0]
    for value in probe.settings(module).values():  # normalized_shape, hidden_size, dim
        value = value[-1] if isinstance(value, (tuple, list, torch.Size)) and value else value
        if isinstance(value, int) and not isinstance(value, bool) and value > 1:
            return value
    return _WIDTH


class _Calls(TorchFunctionMode):
    """Records which torch functions are called."""

    def __init__(self):
        self.seen = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.add(function)
        return function(*args, **(kwargs or {}))


@probe.verified_once
def verify(module: nn.Module) -> Match | Refusal | None:
    """The form a candidate computes; None for what does not behave like a norm at all."""
    if isinstance(module, nn.GroupNorm):
        return Refusal(NAME, "normalises groups of channels, not the last dimension")
    names = [n for n, p in module._parameters.items() if p is not None]
    width = _width(module)
    values = {n: 0.5 * probe.random(width, seed=i) + 0.3 for i, n in enumerate(names)}
    x = probe.random(2, len(_SCALES), width, seed=7) * torch.tensor(_SCALES).unsqueeze(-1)
    attributes = {k: v for k, v in probe.settings(module).items() if isinstance(v, float)}
    eps: list[str | float] = [*attributes, *(e for e in _EPS if e not in attributes.values())]
    if gated_norm.takes_a_gate(module):
        gated = gated_norm.verify(module, NAME, x, values, attributes, eps)
        if gated is not None:
            return gated

    original = functools.partial(_run, module, values)
    try:
        with _Calls() as calls:
            y = original(x)
        behaves = isinstance(y, torch.Tensor) and y.shape == x.shape and _ignores_scale(original, x)
    except Exception as problem:  # any code of any model may run here
        kind = f"{type(problem).__name__}: {problem}".splitlines()[0]
        return Refusal(NAME, f"cannot be run on one tensor ({kind})") if names else None
    if not behaves:
        return None
    if len(inputs := probe.inputs(module)) > 1:
        return Refusal(NAME, f"takes more than one input ({', '.join(p.name for p in inputs)})")

    fits = []
    closest = float("inf")
    for form in _forms(names, eps):
        value = attributes[form.eps] if isinstance(form.eps, str) else form.eps
        found = max(probe.error(original(x, training=t), _formula(form, x, values, value)) for t in (True, False))
        closest = min(closest, found)
        if found <= MAX_ERROR:
            fits.append((form, value, found))
    if not fits:
        return Refusal(NAME, f"behaves like a norm but fits no known formula (closest: {closest:.0e})")
    with torch.autocast("cpu", torch.bfloat16):
        narrows = original(x).dtype is torch.bfloat16
    autocasts = not narrows and bool(calls.seen & {F.layer_norm, F.rms_norm})
    return _rounding(original, fits, x, values, autocasts=autocasts, narrows=narrows)


def _run(module, values, x, dtype=None, training=True):
    parameters = {n: v.to(dtype or v.dtype) for n, v in values.items()}
    return probe.run(probe.twin(module, parameters, {}, training=training), x)


def _ignores_scale(original, x) -> bool:
    """What makes a norm one: twice the input gives the same output (up to eps), and the output depends on the input."""
    top = x[:, :2]  # rows far above eps
    y = original(top)
    return probe.error(original(2 * top), y) < 1e-2 and not torch.equal(original(top.flip(-1)), y)


def _rounding(original, fits, x, values, **autocast):
    """Among the forms that agree in fp32, the one that rounds where the module does."""
    low = torch.bfloat16
    x, lows = x.to(low), {n: v.to(low) for n, v in values.items()}
    y, mixed = original(x, low), original(x) if values else None
    promotes = mixed is not None and mixed.dtype is torch.float32
    rates = []
    for form, value, found in fits:
        rate = probe.same(y, _formula(form, x, lows, value))
        # T5's kind rounds before a weight of half precision only
        for casting in dict.fromkeys([form.casting, "gemma"] if promotes else [form.casting]):
            one = replace(form, promotes=casting if promotes else None)
            agreed = 1.0
            if mixed is not None:
                wanted = _formula(replace(one, casting=casting), x, values, value, mixed.dtype)
                agreed = probe.same(mixed, wanted)
            rates.append((min(rate, agreed), one, found))
    rate, form, found = max(rates, key=lambda r: r[0])
    if rate < MIN_SAME:
        return Refusal(NAME, f"agrees in fp32 but rounds bf16 in another order ({rate:.0%} of the bits agree)")
    form = replace(form, **autocast)
    flag = f"{form.base}_norm"
    details = [form.casting] if form.base == "rms" else []
    details += [f"offset {form.offset:g}"] if form.offset else []
    details += [] if form.weight else ["no weight"]
    return Match(NAME, flag, " ".join([flag, *details]), form, found)


@functools.cache
def forward(form: Norm | GatedNorm, name: str = "forward"):
    """The method that replaces a norm's forward; `name` is the attribute it is bound under (pickle needs it)."""
    if isinstance(form, GatedNorm):
        return gated_norm.forward(form, name)

    def method(self, *args, **kwargs):
        if len(args) != 1 or kwargs:
            return type(self).forward(self, *args, **kwargs)
        x = args[0]
        weight, bias = (None if n is None else getattr(self, n) for n in (form.weight, form.bias))
        eps = getattr(self, form.eps) if isinstance(form.eps, str) else form.eps
        made = None
        if not is_dtensor(x):
            made = _run_kernel(form, x, weight, bias, eps)
        elif (rows := sharded.own_rows(x, (weight, bias))) is not None:
            own, (weight, bias), back = rows
            made = _run_kernel(form, own, weight, bias, eps)
            made = made if made is None else back(made)
        return type(self).forward(self, x) if made is None else made

    method.__name__ = name
    return method


def _run_kernel(form: Norm, x, weight, bias, eps):
    """The norm of plain tensors; None for a mix of dtypes that the module itself computes another way."""
    if form.autocasts and x.device.type != "cpu" and torch.is_autocast_enabled(x.device.type):
        x = x.float()
    if form.narrows and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if form.base == "layer":
        weight = weight + form.offset if form.offset else weight
        if form.promotes:
            x = x.to(torch.promote_types(x.dtype, weight.dtype))
        return functional.liger_layer_norm(x, weight, bias, eps)
    if form.promotes and weight.dtype is not x.dtype:
        if form.promotes != form.casting and x.dtype is torch.float32:
            return None  # T5's kind rounds to the weight's dtype here
        out = torch.promote_types(x.dtype, weight.dtype)
        function = ops.LigerRMSNormFunction
        return function.apply(x, weight, eps, form.offset, form.promotes, False, None, out)
    return functional.liger_rms_norm(x, weight, eps, form.offset, form.casting, False)
