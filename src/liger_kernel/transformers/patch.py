"""The engine: one call finds what a live model can run on our kernels, verifies it, and binds it.

Patches are per instance and leave every class as it was, except rotary functions, which are globals of a modeling
module (kinds/rope.py). `revert_liger_kernel` undoes them exactly.
"""

from __future__ import annotations

import copy
import logging
import os
import weakref
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import nn

from liger_kernel.transformers import kinds, replicas
from liger_kernel.transformers.kinds import Match, Refusal, experts, rope
from liger_kernel.transformers.kinds.probe import RECORD
from liger_kernel.transformers.report import Report, Row

logger = logging.getLogger(__name__)

FLAGS = (
    "rope", "rms_norm", "layer_norm", "swiglu", "geglu", "relu_squared", "cross_entropy", "fused_linear_cross_entropy",
)  # fmt: skip
_HEADS = ("cross_entropy", "fused_linear_cross_entropy")
_reverted: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # an arrangement for their type leaves them alone
_MODEL = "_liger_kernel_model"  # on a patched model: what was done to its head; None on the models inside it


class Record:
    """What is bound to one module and what it displaced; pickled and copied with the module."""

    def __init__(self, module: nn.Module, kind: str, variant: Any, slot: str, displaced: Any):
        self.module, self.kind, self.variant, self.slot, self.displaced = module, kind, variant, slot, displaced

    @property
    def method(self) -> Any:
        """The function that is bound."""
        return kinds.MODULES[self.kind].forward(self.variant, self.slot)

    def __reduce__(self):
        return _rebind, (self.module, self.kind, self.variant, self.slot, self.displaced)


def _rebind(module, kind, variant, slot, displaced):
    """A record read from a pickle. Bound at once: pickle then reads the bound method back by its name."""
    record = Record(module, kind, variant, slot, displaced)
    module.__dict__[slot] = MethodType(record.method, module)
    return record


@dataclass
class _Head:
    """What became of the head of a patched model."""

    wanted: str | None
    patch: Any = None
    left: str | None = None

    def __deepcopy__(self, memo):
        return _Head(self.wanted, copy.deepcopy(self.patch, memo), self.left)


def apply_liger_kernel(
    model: nn.Module,
    *,
    strict: bool = False,
    rope: bool | None = None,
    rms_norm: bool | None = None,
    layer_norm: bool | None = None,
    swiglu: bool | None = None,
    geglu: bool | None = None,
    relu_squared: bool | None = None,
    cross_entropy: bool | None = None,
    fused_linear_cross_entropy: bool | None = None,
) -> Report:
    """Patch every module of a live model that verifiably computes what one of our kernels computes.

    A flag left at None is on, except cross_entropy, which takes the place of the fused head when it is True. Calling
    again changes nothing, or brings the model to the new flags. PEFT, DDP and compiled wrappers are looked through; a
    model without a language-model head keeps its own head. LIGER_KERNEL_DISABLE=1 makes the call a logged no-op.
    Raises TypeError for what is not an nn.Module, ValueError for both loss flags at once, and, with strict=True,
    RuntimeError when anything found could not be patched (the model is then left unpatched).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"apply_liger_kernel takes a torch.nn.Module, got {type(model).__name__}")
    chosen = _choose(
        dict(rope=rope, rms_norm=rms_norm, layer_norm=layer_norm, swiglu=swiglu, geglu=geglu,
             relu_squared=relu_squared, cross_entropy=cross_entropy,
             fused_linear_cross_entropy=fused_linear_cross_entropy)
    )  # fmt: skip
    base = unwrap(model)
    report = Report(type(base).__name__)
    if disabled():
        report.note = "LIGER_KERNEL_DISABLE is set"
        logger.info("LIGER_KERNEL_DISABLE is set: %s is left unpatched", report.model)
        return report

    experts.register()
    alone = set(experts.separate(base))
    for name, module in base.named_modules():
        if (found := kinds.identify(module)) is not None:
            if module in alone:
                found = Refusal(experts.NAME, experts.ALONE)
            elif isinstance(found, Match) and _is_given_away(base, module):
                found = Refusal(found.kind, _GIVEN_AWAY)
            report.rows.append(_patch(name, module, found, chosen))
    _patch_ropes(base, chosen, report)
    report.rows.append(_patch_head(base, chosen))
    for part in base.modules():
        if hasattr(part, "config_class"):
            part.__dict__.setdefault(_MODEL, None)
            _reverted.discard(part)
    if strict and (refused := [r for r in report.left if not r.reason.startswith(_OFF)]):  # type: ignore[union-attr]
        revert_liger_kernel(base)
        raise RuntimeError("strict=True: " + "; ".join(f"{r.module}: {r.reason}" for r in refused))
    if not report.patched:
        logger.warning("no kernel was applied to %s:\n%s", report.model, report)
    else:
        logger.info("%s", report.summary())
    return report


def revert_liger_kernel(model: nn.Module | str) -> None:
    """Undo apply_liger_kernel on a model exactly; for a model type ("llama"), undo the arrangement made for it.

    A model stays as it was until apply_liger_kernel is called on it again, also where its type is arranged for (a copy
    of it is a model of its own).
    Raises ValueError for a model type nothing was arranged for, TypeError for what is neither.
    """
    if isinstance(model, str):
        from liger_kernel.transformers.arrange import withdraw

        withdraw(model)
        return
    if not isinstance(model, nn.Module):
        raise TypeError(f"revert_liger_kernel takes a torch.nn.Module or a model type, got {type(model).__name__}")
    base = unwrap(model)
    take_off(base)
    _reverted.update(part for part in base.modules() if hasattr(part, "config_class"))


def take_off(base: nn.Module) -> None:
    """Undo what is bound to a model, which an arrangement for its type may patch again."""
    for module in base.modules():
        _unbind(module)
        if (head := module.__dict__.pop(_MODEL, None)) is not None and head.patch is not None:
            head.patch.undo()
        rope.release(module)


def disabled() -> bool:
    """Whether the environment switches all patching off."""
    return os.environ.get("LIGER_KERNEL_DISABLE", "0") not in ("", "0")


def is_patched(model: nn.Module) -> bool:
    """Whether apply_liger_kernel was called on this model or one around it, and not undone."""
    return _MODEL in model.__dict__


def is_settled(model: nn.Module) -> bool:
    """Whether apply_liger_kernel or revert_liger_kernel was called on this model or one around it."""
    return is_patched(model) or model in _reverted


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside compiled, data-parallel and PEFT wrappers."""
    while True:
        inner = model._modules.get("_orig_mod")
        if inner is None and isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model.module
        if inner is None and callable(get := getattr(model, "get_base_model", None)):
            inner = get()
        if inner is None or inner is model:
            return model
        model = inner


def _choose(flags: dict[str, bool | None]) -> dict[str, bool]:
    if all(flags[f] for f in _HEADS):
        raise ValueError("cross_entropy and fused_linear_cross_entropy cannot both be True: choose one of them")
    chosen = {f: value is None or bool(value) for f, value in flags.items()}
    chosen["cross_entropy"] = bool(flags["cross_entropy"])
    chosen["fused_linear_cross_entropy"] &= not chosen["cross_entropy"]
    return chosen


_OFF = "switched off"


def _off(flag: str) -> str:
    return f"{_OFF} ({flag}=False)"


_GIVEN_AWAY = "use_kernels=True leaves it to the kernels package, which binds it again at every train() and eval()"


def _is_given_away(base: nn.Module, thing: Any) -> bool:
    """Whether transformers' use_kernels owns a module or rotary function of this model, now or at its next change."""
    return bool(getattr(base, "use_kernels", False)) and hasattr(type(thing), "kernel_layer_name")


# Norms and MLPs


def _patch(name: str, module: nn.Module, found: Match | Refusal, chosen: dict[str, bool]) -> Row:
    """Bring one module to what is wanted of it."""
    if isinstance(found, Refusal):
        _unbind(module)
        return Row(name, found.kind, reason=found.reason)
    slot, owner = _slot(module, found.kind)
    reason = owner if chosen[found.flag] else _off(found.flag)
    if reason is not None:
        _unbind(module)
        return Row(name, found.kind, reason=reason)
    record = module.__dict__.get(RECORD)
    # Bound again also where somebody put the class's own forward over ours, as use_kernels does.
    if record is None or record.variant != found.variant or not _is_ours(module, module.__dict__.get(slot)):
        _unbind(module)
        _bind(module, found, slot)
    return Row(name, found.kind, found.kernel, found.error)


def _slot(module: nn.Module, kind: str) -> tuple[str, str | None]:
    """The attribute to bind, and whose it is already, where it is neither the class's nor ours.

    Under accelerate's hooks it is the forward that the hook calls: the hook neither bypasses us nor is bypassed.
    """
    state = module.__dict__
    slot = "_old_forward" if "_hf_hook" in state and "_old_forward" in state else "forward"
    slot = experts.SLOT if kind == experts.NAME else slot
    current = state.get(slot)
    function = getattr(current, "__func__", None)
    own = getattr(type(module), slot if slot == experts.SLOT else "forward")
    if current is None or function is own or _is_ours(module, current):
        return slot, None
    owner = function or getattr(current, "func", current)
    where = getattr(owner, "__module__", None) or type(owner).__module__
    return slot, f"its forward belongs to {where}.{getattr(owner, '__qualname__', type(owner).__qualname__)}"


def _is_ours(module: nn.Module, current: Any) -> bool:
    record = module.__dict__.get(RECORD)
    return record is not None and getattr(current, "__func__", None) is record.method


def _bind(module: nn.Module, match: Match, slot: str) -> None:
    record = Record(module, match.kind, match.variant, slot, module.__dict__.get(slot))
    module.__dict__.pop(slot, None)
    module.__dict__[RECORD] = record  # before the method: a pickle restores them in this order
    module.__dict__[slot] = MethodType(record.method, module)
    replicas.bind_replicas(module)


def _unbind(module: nn.Module) -> None:
    """Undo _bind, also where accelerate's hooks came or went since."""
    state = module.__dict__
    for slot in ("forward", "_old_forward", experts.SLOT):
        if not _is_ours(module, state.get(slot)):
            continue
        record = state[RECORD]
        if slot == record.slot and record.displaced is not None:
            state[slot] = record.displaced
        elif slot != "_old_forward":
            del state[slot]
        else:
            state[slot] = MethodType(type(module).forward, module)
    if state.pop(RECORD, None) is not None:
        replicas.unbind_replicas(module)


# Rope


def _patch_ropes(base: nn.Module, chosen: dict[str, bool], report: Report) -> None:
    for place in rope.places(base):
        function = rope.original(place)
        found = rope.verify(function)
        if isinstance(found, Match) and _is_given_away(base, function):
            found = Refusal(found.kind, _GIVEN_AWAY)
        if isinstance(found, Match) and chosen["rope"]:
            rope.replace(place, found, base)
            report.rows.append(Row(place.label, found.kind, found.kernel, found.error))
        else:
            rope.release(base, place)
            reason = found.reason if isinstance(found, Refusal) else _off("rope")
            report.rows.append(Row(place.label, found.kind, reason=reason))


# Head


def _patch_head(base: nn.Module, chosen: dict[str, bool]) -> Row:
    head = base.__dict__.get(_MODEL)
    wanted = next((f for f in _HEADS if chosen[f]), None)
    if head is None or head.wanted != wanted:
        if head is not None and head.patch is not None:
            head.patch.undo()
        head = base.__dict__[_MODEL] = _Head(wanted, *_new_head(base, wanted))
    if head.patch is None:
        return Row("head", "head", reason=head.left)
    return Row(head.patch.name, "head", f"{wanted} {head.patch.pattern}")


def _new_head(base: nn.Module, wanted: str | None) -> tuple[Any, str | None]:
    if wanted is None:
        return None, _off("fused_linear_cross_entropy")
    from liger_kernel.transformers import head

    try:
        patch = head.fuse_head if wanted == "fused_linear_cross_entropy" else head.use_cross_entropy
        return patch(base), None
    except head.HeadLeftAlone as reason:
        return None, str(reason)
