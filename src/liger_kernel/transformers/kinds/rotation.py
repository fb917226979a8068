"""What a rotary function computes, in terms of ops/rope.py, and one of ours that computes the same.

A function takes q and k or one tensor, and cos and sin or both as complex numbers. The forms are data: which elements
make a pair, how wide the table is, and where the result is rounded.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from liger_kernel import ops
from liger_kernel.ops.rope import STYLES, reference
from liger_kernel.ops.sharded import is_dtensor
from liger_kernel.transformers import functional
from liger_kernel.transformers.kinds import probe
from liger_kernel.transformers.kinds.probe import MAX_ERROR, MIN_SAME, Match, Refusal

NAME = "rope"
_OPTIONS = {"position_ids", "unsqueeze_dim", "mrope_section"}
_BATCH, _SEQ, _DIM, _Q_HEADS, _K_HEADS = 2, 5, 16, 4, 3
_SECTIONS = {_DIM: [2, 3, 3], _DIM // 2: [1, 1, 2]}  # of an mrope table, by its width
_LOW, _HIGH = torch.bfloat16, torch.float32
# Layouts: the dim that counts the heads among four, or none of them, (S, H, D) with a table of (S, W)
_PACKED = 0
_HEADS_AT = {1: 1, 2: 2, _PACKED: 1}
_SEQ_AT = {1: 2, 2: 1, _PACKED: 0}


@dataclass(frozen=True)
class Call:
    """A function's parameters by their part: what is rotated, the tables, and which of _OPTIONS it has."""

    rotated: tuple[str, ...]
    tables: tuple[str, ...]
    options: tuple[str, ...]

    @property
    def multimodal(self) -> bool:
        return "mrope_section" in self.options

    @property
    def complex(self) -> bool:
        return len(self.tables) == 1


@dataclass(frozen=True)
class Rope:
    """A rotation's form. layouts: where heads may be; the first is the one without unsqueeze_dim."""

    call: Call
    style: str  # see STYLES of ops/rope.py
    table: str  # "full": as wide as what is rotated; "half": half of it; "doubled": full, its second half unread
    layouts: tuple[int, ...]
    partial: bool  # may rotate some elements of a head only: the first
    last: bool = False  # the last instead
    backwards: bool = False  # by the negative angle
    wide: bool = False  # computed in fp32
    keeps_dtype: bool = False  # the result has the dtype of what is rotated, whatever the table's


def call_of(function: Any) -> Call | None:
    """How a function takes its arguments, or None where they are not those of a rotation."""
    names = tuple(inspect.signature(function).parameters)
    tables = tuple(n for n in names if n in ("cos", "sin")) or tuple(n for n in names if n == "freqs_cis")
    options = tuple(n for n in names if n in _OPTIONS)
    rotated = names[: len(names) - len(tables) - len(options)]
    if len(rotated) not in (1, 2) or names != rotated + tables + options or tables in (("cos",), ("sin",)):
        return None
    return Call(rotated, tables, options)


def verify(function: Any) -> Match | Refusal:
    """The form a function computes, whatever the dtypes of q and cos and wherever the heads are."""
    call = call_of(function)
    if call is None:
        names = ", ".join(inspect.signature(function).parameters)
        return Refusal(NAME, f"takes other arguments than a rotation ({names})")
    layouts = [1, 2] if "unsqueeze_dim" in call.options else [1, 2, _PACKED]
    layouts = [n for n in layouts if any(_try(function, call, n, t, _DIM) is not None for t in _WIDTHS)]
    if not layouts:
        return Refusal(NAME, "cannot be run on q, k, cos and sin of any known layout")
    closest = float("inf")
    for last, backwards, style, table in itertools.product((False, True), (False, True), STYLES, _WIDTHS):
        form = Rope(call, style, table, tuple(layouts), False, last, backwards)
        partly = [_error(function, form, n, _DIM // 2) for n in layouts]
        form = replace(form, partial=None not in partly)
        found = max(e for e in (*(_error(function, form, n, _DIM) for n in layouts), *partly) if e is not None)
        closest = min(closest, found)
        if found <= MAX_ERROR:
            return _rounding(function, form, found)
    return Refusal(NAME, f"fits no known rotation (closest: {closest:.0e})")


_WIDTHS = {"full": 1.0, "half": 0.5, "doubled": 1.0}  # of a table, relative to what is rotated


def _rounding(function: Callable, form: Rope, error: float) -> Match | Refusal:
    """The form that rounds where the function does, with a table in bf16 and in fp32."""
    best = 0.0
    for wide, keeps in itertools.product((False, True), repeat=2):
        one = replace(form, wide=wide, keeps_dtype=keeps)
        mixtures = itertools.product(form.layouts, (_LOW, _HIGH))
        rate = min(_agreement(function, one, layout, table_dtype) for layout, table_dtype in mixtures)
        if rate >= MIN_SAME:
            return Match(NAME, NAME, _description(one), one, error)
        best = max(best, rate)
    return Refusal(NAME, f"agrees in fp32 but rounds bf16 in another order ({best:.0%} of the bits agree)")


def _description(form: Rope) -> str:
    kinds = {"multimodal": form.call.multimodal, "complex": form.call.complex, "in fp32": form.wide}
    kinds |= {"keeps dtype": form.keeps_dtype and not form.wide, "backwards": form.backwards, "at the end": form.last}
    return " ".join(["rope", form.style, *(name for name, true in kinds.items() if true)])


# Running the function and the formula on the same numbers


def _inputs(call: Call, layout: int, width: int, dtype, table_dtype) -> dict[str, Any]:
    """Named arguments; every element of the tables is a number of its own."""
    given: dict[str, Any] = {}
    for name, heads in zip(call.rotated, (_Q_HEADS, _K_HEADS), strict=False):
        shape = {1: (_BATCH, heads, _SEQ, _DIM), 2: (_BATCH, _SEQ, heads, _DIM), _PACKED: (_SEQ, heads, _DIM)}
        given[name] = probe.random(*shape[layout], seed=heads, dtype=dtype)
    leading = (_SEQ,) if layout == _PACKED else (3, _BATCH, _SEQ) if call.multimodal else (_BATCH, _SEQ)
    cos, sin = (probe.random(*leading, width, seed=s, dtype=table_dtype) for s in (8, 9))
    if call.complex:
        given[call.tables[0]] = torch.complex(cos.float(), sin.float())
    else:
        given |= {"cos": cos, "sin": sin}
    if "position_ids" in call.options:
        given["position_ids"] = torch.arange(_SEQ)[None]
    if call.multimodal:
        given["mrope_section"] = _SECTIONS[width]
    if "unsqueeze_dim" in call.options and layout != 1:
        given["unsqueeze_dim"] = layout
    return given


def _try(function, call: Call, layout: int, table: str, rotary: int, dtype=_HIGH, table_dtype=_HIGH):
    """(arguments, results) of the function, or None where it cannot take them."""
    width = int(rotary * _WIDTHS[table])
    if call.multimodal and width not in _SECTIONS:
        return None
    given = _inputs(call, layout, width, dtype, table_dtype)
    try:
        found = function(**given)
    except Exception:  # any code of any model may run here
        return None
    found = found if isinstance(found, tuple) else (found,)
    shapes = [getattr(y, "shape", None) for y in found]
    return (given, found) if shapes == [given[n].shape for n in call.rotated] else None


def _formula(form: Rope, layout: int, given: dict) -> tuple[torch.Tensor, ...]:
    xs, cos, sin = _parts(form.call, given)
    xs, heads_at = _with_heads(xs, layout)
    cos, sin, rotary = _tables(form, cos, sin)
    rests, xs = _split(form, xs, rotary)
    both = xs if len(xs) == 2 else (xs[0], xs[0])
    wanted = reference(*both, cos, sin, heads_at, rotary, form.style, given.get("mrope_section"))[: len(xs)]
    wanted = _join(rests, wanted)
    if form.keeps_dtype:
        wanted = tuple(w.to(x.dtype) for w, x in zip(wanted, xs, strict=True))
    return tuple(w.squeeze(0) for w in wanted) if layout == _PACKED else wanted


def _error(function, form: Rope, layout: int, rotary: int) -> float | None:
    """The difference in fp32 where `rotary` elements of a head are rotated; None where the function cannot do that."""
    ran = _try(function, form.call, layout, form.table, rotary)
    if ran is None:
        return None if rotary < _DIM else float("inf")
    return max(probe.error(f, w) for f, w in zip(ran[1], _formula(form, layout, ran[0]), strict=True))


def _agreement(function, form: Rope, layout: int, table_dtype) -> float:
    ran = _try(function, form.call, layout, form.table, _DIM, _LOW, table_dtype)
    if ran is None:
        return 0.0
    return min(probe.same(f, w) for f, w in zip(ran[1], _formula(form, layout, ran[0]), strict=True))


# Arguments, as the op takes them


def _parts(call: Call, given: dict) -> tuple[tuple, torch.Tensor, torch.Tensor]:
    """What is rotated, cos and sin."""
    xs = tuple(given[n] for n in call.rotated)
    if call.complex:
        table = given[call.tables[0]]
        return xs, table.real, table.imag
    return xs, given["cos"], given["sin"]


def _with_heads(xs: tuple, layout: int) -> tuple[tuple, int]:
    return (tuple(x.unsqueeze(0) for x in xs), 2) if layout == _PACKED else (xs, layout)


def _split(form: Rope, xs: tuple, rotary: int) -> tuple[tuple, tuple]:
    """What passes by before the elements that are rotated at the end of a head, and what the op takes."""
    if not form.last:
        return (), xs
    return tuple(x[..., :-rotary] for x in xs), tuple(x[..., -rotary:] for x in xs)


def _join(rests: tuple, ys: tuple) -> tuple[torch.Tensor, ...]:
    return tuple(torch.cat((r, y), -1) for r, y in zip(rests, ys)) or ys


def _tables(form: Rope, cos, sin):
    """cos, sin and how many elements they rotate."""
    width = cos.shape[-1]
    if form.table == "doubled":
        cos, sin = cos[..., : width // 2], sin[..., : width // 2]
    if form.wide:
        cos, sin = cos.float(), sin.float()
    if form.backwards:
        sin = -sin
    return cos, sin, 2 * width if form.table == "half" else width


def _fits(form: Rope, layout: int, xs: tuple, cos: torch.Tensor) -> bool:
    """Whether these are shapes and dtypes that were verified."""
    rotary = cos.shape[-1] * (2 if form.table == "half" else 1)
    x, dims = xs[0], set(range(xs[0].dim())) - {_HEADS_AT[layout]}
    return (
        not cos.requires_grad
        and x.dim() == cos.dim() + 1 - form.call.multimodal
        and x.shape[_SEQ_AT[layout]] == cos.shape[-2]
        and (layout == _PACKED or cos.shape[-3] in (1, x.shape[0]))
        and (rotary == x.shape[-1] or (form.partial and rotary < x.shape[-1]))
        and cos.dtype in (x.dtype, torch.float32)
        and cos.device == x.device
        and all(y.shape[d] == x.shape[d] for y in xs[1:] for d in dims)
    )


# Ours


def replacement(original: Callable, form: Rope) -> Callable:
    """A function with the signature of the original. What was not verified goes to the original."""
    parameters = inspect.signature(original).parameters
    names = tuple(parameters)
    defaults = {n: p.default for n, p in parameters.items() if p.default is not p.empty}
    plain = form == Rope(form.call, "half", "full", form.layouts, form.partial) and not form.call.multimodal

    @functools.wraps(original)
    def rope(*args, **kwargs):
        given = {**defaults, **dict(zip(names, args)), **kwargs}
        layout = _layout(form, given)
        if layout is None:
            return original(*args, **kwargs)
        xs, cos, sin = _parts(form.call, given)
        if not _fits(form, layout, xs, cos) or any(map(is_dtensor, (*xs, cos))):
            return original(*args, **kwargs)
        cos, sin, rotary = _tables(form, cos, sin)
        xs, heads_at = _with_heads(xs, layout)
        rests, xs = _split(form, xs, rotary)
        if len(xs) == 1:
            xs = (xs[0], xs[0].narrow(heads_at, 0, 0))  # no heads of k
        if plain:
            ys = functional.liger_rope(*xs, cos, sin, None, heads_at)
        else:
            options = form.keeps_dtype, form.style, given.get("mrope_section")
            ys = ops.LigerRopeFunction.apply(*xs, cos, sin, None, heads_at, rotary, *options)
        ys = _join(rests, ys)
        if layout == _PACKED:
            ys = tuple(y.squeeze(0) for y in ys)
        return ys if len(form.call.rotated) == 2 else ys[0]

    return rope


def _layout(form: Rope, given: dict) -> int | None:
    """Where the heads are in a call, or None where that was not verified."""
    x = given[form.call.rotated[0]]
    if any(given[n] is None for n in form.call.rotated):
        return None
    if x.dim() == 3:
        return _PACKED if _PACKED in form.layouts else None
    if "unsqueeze_dim" in form.call.options:
        layout = {-3: 1, -2: 2}.get(given["unsqueeze_dim"], given["unsqueeze_dim"])
    else:
        layout = form.layouts[0]
    return layout if layout in form.layouts and layout != _PACKED and x.dim() == 4 else None
