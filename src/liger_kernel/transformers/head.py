"""Fuses a model's LM head with its loss, without a copy of any forward.

During a training forward with labels the head returns LazyLogits; the model's own forward goes on with them as far as
its loss function, where `FusedLoss` computes the loss in row chunks. Everything is bound per instance and undone by
`HeadPatch.undo`; outside the window the head and the loss are the model's own.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import torch
from torch import nn

from liger_kernel.ops.sharded import is_dtensor
from liger_kernel.transformers.fsdp import unwrapped
from liger_kernel.transformers.head_loss import RESULTS, CrossEntropyLoss, FusedLoss, Gate, Window, is_causal_loss
from liger_kernel.transformers.head_weight import (
    adapter_inputs,
    adapters_of,
    is_foldable,
    is_lora,
    is_peft,
    linear_of,
    parameters_of,
    why_not_linear,
    why_not_lora,
)
from liger_kernel.transformers.lazy_logits import LazyLogits
from liger_kernel.transformers.model.output_classes import with_results
from liger_kernel.transformers.replicas import bind_replicas, unbind_replicas
from liger_kernel.transformers.tensor_parallel import (
    Passing,
    is_split,
    is_tensor_parallel,
    on_mesh_of,
    style_of,
    why_not_split,
)

# Keywords of the patched forward that transformers' forwards do not know.
OPTIONS = (
    "accum_dtype", "return_entropy", "return_predicted_tokens", "return_token_accuracy", "skip_logits",
    "use_token_scaling",
)  # fmt: skip
# Keywords of the loss that a forward may or may not pass on.
LOSS_KEYWORDS = ("num_items_in_batch", "shift_labels")
_PATCH = "_liger_head"
_GATE = "_liger_gate"
_OWN = "_liger_own_forward"  # a tensor-parallel forward that ours displaced


class HeadLeftAlone(Exception):
    """The model's head or loss cannot be fused; the message says why."""


@dataclass(frozen=True)
class HeadPatch:
    """A fused head: its module name, how it was recognised, and what takes the patch off again."""

    name: str
    pattern: str
    undo: Callable[[], None]


def fuse_head(model: nn.Module) -> HeadPatch:
    """Fuse the head and the loss of this model instance; a second call changes nothing.

    Raises HeadLeftAlone with the reason where there is no single linear head or the forward takes no labels.
    """
    fusion = model.__dict__.get(_PATCH)
    if fusion is None:
        fusion = Fusion(model)
    elif fusion.asleep:
        fusion.wake()
    if not fusion.enabled:
        fusion.bind()
    return HeadPatch(fusion.name, fusion.pattern, fusion.undo)


def _asleep(model: nn.Module, slot: str) -> Fusion:
    """A fusion read from a pickle, of a model that is still empty: it binds the head at the first call.

    Its forward is bound at once: pickle then reads the bound method back by its name.
    """
    fusion = object.__new__(Fusion)
    fusion.model, fusion.slot, fusion.asleep, fusion.enabled = model, slot, True, False
    model.__dict__[slot] = MethodType(_forward_for(MethodType(_class_forward(type(model)), model)), model)
    return fusion


def use_cross_entropy(model: nn.Module) -> HeadPatch:
    """Make this model compute its causal loss with `liger_cross_entropy` on its ordinary logits.

    Raises HeadLeftAlone where the model's loss is not transformers' causal LM loss.
    """
    current: Any = getattr(model, "loss_function", None)
    if not isinstance(current, CrossEntropyLoss):
        if not is_causal_loss(current):
            name = getattr(current, "__name__", current)
            raise HeadLeftAlone(f"its loss is {name}, not transformers' ForCausalLMLoss")
        current = CrossEntropyLoss(current, _saved(model, ["_loss_function"]))
        _set_loss(model, current)
    return HeadPatch("loss_function", "liger_cross_entropy", functools.partial(_restore, model, current.before))


# What is bound to the model and to its head


def _forward_for(inner: Callable, signature: inspect.Signature | None = None) -> Any:
    """The patched forward, named and documented like the one it runs, with this signature (self included).

    By default that of inner, a bound method.
    Without functools.wraps' __wrapped__: accelerate unwraps a forward as far as it can, which would take this off.
    """

    @functools.wraps(inner, updated=())
    def forward(self, *args, **kwargs):
        fusion = self.__dict__.get(_PATCH)
        if fusion is not None and fusion.asleep:
            try:
                fusion.wake()
            except HeadLeftAlone as reason:
                warnings.warn(f"the LM head is not fused any more: {reason}", stacklevel=2)
                return self.forward(*args, **kwargs)
        if fusion is not None:
            return fusion.run(args, kwargs)
        patch = fuse_head(self)
        try:
            return self.__dict__[_PATCH].run(args, kwargs)
        finally:
            patch.undo()

    if signature is None:
        me = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        own = inspect.signature(inner)
        signature = own.replace(parameters=[me, *own.parameters.values()])
    del forward.__wrapped__
    forward.__dict__.update({"__signature__": signature, _PATCH: True})
    return forward


def _head_forward(self, hidden, *args, reduce=None, **kwargs):
    gate = getattr(self, _GATE)
    if reduce is not None:
        return _reduced(self, hidden, args, reduce)
    window = gate.window
    if window is None or not window.defer or args or kwargs or not _is_fusable(self, hidden):
        return _own_forward(self)(hidden, *args, **kwargs)
    names = adapters_of(self)
    low = adapter_inputs(self, hidden, names) if names else None
    head = window.head if window.head is not None and unwrapped(window.head) is self else self
    split = is_split(linear_of(self).weight)
    logits = LazyLogits(hidden, head, linear_of(self).weight.shape[0], window, low=low, adapters=names, split=split)
    return Passing(logits) if is_dtensor(hidden) else logits


def _reduced(head, hidden, args, reduce):
    """What reduce makes of the hidden states and the parameters, of a tensor-parallel head as DTensors."""
    weight = linear_of(head).weight
    if not is_split(weight):
        return reduce(hidden, *parameters_of(head, hidden, *args))
    result = reduce(on_mesh_of(weight, hidden), *parameters_of(head, hidden, *args))
    return Passing(result) if _is_hooked(head) else result


def _is_fusable(head, hidden) -> bool:
    """Whether this call's logits need not be computed: its weight is whole, or split by rows under known wrapping."""
    if torch.compiler.is_compiling() or not (_is_hooked(head) or _OWN in head.__dict__):
        return is_foldable(head) and not is_dtensor(hidden)
    if is_lora(head) or not is_split(head.weight):
        return False
    return all(p.is_replicate() for p in hidden.placements) if is_dtensor(hidden) else not _is_hooked(head)


def _is_hooked(head) -> bool:
    return any(map(is_tensor_parallel, head._forward_hooks.values()))


_head_forward.__name__ = "forward"  # pickle stores a bound method by name; the class's forward is the one to find


class Fusion:
    """What is bound to one model, and how to take it off. Copied and pickled with the model."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.asleep = False
        self.slot = _forward_slot(model)
        inner = model.__dict__.get(self.slot)
        if inner is None or _is_ours(inner):
            inner = MethodType(_class_forward(type(model)), model)
        self.inner: Callable = inner
        self.signature = inspect.signature(inner)
        parameters = self.signature.parameters
        if "labels" not in parameters:
            raise HeadLeftAlone("its forward takes no labels, so it computes no loss")
        self.labels_at = list(parameters).index("labels")
        self.passes_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self.accepts = frozenset(parameters)
        self.gate = Gate()
        self.enabled = False
        self.head: nn.Module | None = None
        self.entry: nn.Module | None = None  # what is called for the head: FSDP1's wrapper around it
        self.head_before: dict = {}
        head, pattern = find_head(model)
        self.name, self.pattern = _name_of(head, model), pattern

    def bind(self) -> None:
        """Bind forward, head and loss of the model; the forward only, if an undo left it under someone's wrapper."""
        model = self.model
        self.head = None
        if model.__dict__.get(_PATCH) is None:
            self.model_before = _saved(model, [self.slot, _PATCH])
            model.__dict__[_PATCH] = self
            model.__dict__[self.slot] = MethodType(_forward_for(self.inner), model)
            bind_replicas(model)
        self.loss_before = _saved(model, ["_loss_function"])
        own: Any = getattr(model, "loss_function", None)
        if own is not None:
            _set_loss(model, FusedLoss(self.gate, own, self.loss_before))
        self._bind_head(*find_head(model))
        self.enabled = True

    def _bind_head(self, head: nn.Module, pattern: str) -> None:
        self._unbind_head()
        slot = _forward_slot(head)
        self.head, self.name, self.pattern = head, _name_of(head, self.model), pattern
        self.head_before = _saved(head, [slot, _GATE, _OWN])
        if _is_ours(head.__dict__.get(slot)):  # PEFT has copied a fused head
            self.head_before = dict.fromkeys(self.head_before, _MISSING)
        head.__dict__[_GATE] = self.gate
        if style_of(head.__dict__.get(slot)) is not None:
            head.__dict__[_OWN] = head.__dict__[slot]
        head.__dict__[slot] = MethodType(_head_forward, head)
        bind_replicas(head)

    def _unbind_head(self) -> None:
        if self.head is not None:
            _restore(self.head, self.head_before)
            unbind_replicas(self.head)
            self.head = None

    def wake(self) -> None:
        """Fuse the head of a model that was read from a pickle; HeadLeftAlone, and nothing bound, if it cannot be."""
        model = self.model
        loss = model.__dict__.get("_loss_function")
        if isinstance(loss, FusedLoss):
            _restore(model, loss.before)
        for module in model.modules():
            if _GATE in module.__dict__:
                _restore(module, dict.fromkeys((_forward_slot(module), _GATE), _MISSING))
        _restore(model, dict.fromkeys((self.slot, _PATCH), _MISSING))
        unbind_replicas(model)
        self.__init__(model)  # type: ignore[misc]
        self.bind()

    def undo(self) -> None:
        """Take everything off. A forward that someone has wrapped since goes on to run the model's own one."""
        if self.asleep:
            with contextlib.suppress(HeadLeftAlone):
                self.wake()
        if not self.enabled:
            return
        self.enabled = False
        if _is_ours(self.model.__dict__.get(self.slot)):
            _restore(self.model, self.model_before)
            unbind_replicas(self.model)
        if isinstance(self.model.__dict__.get("_loss_function"), FusedLoss):
            _restore(self.model, self.loss_before)
        self._unbind_head()

    def _follow_head(self) -> bool:
        """Whether the model's head is fused; one replaced since (PEFT, resized embeddings) is bound first."""
        try:
            head, pattern = find_head(self.model)
        except HeadLeftAlone as reason:
            if self.head is not None:
                warnings.warn(f"the LM head is not fused any more: {reason}", stacklevel=5)
                self._unbind_head()
            return False
        if head is not self.head:
            self._bind_head(head, pattern)
        self.entry = _output_embeddings(self.model)  # FSDP1 wraps it without a change of it
        return True

    def run(self, args: tuple, kwargs: dict):
        """The model's own forward, in a window that its head and its loss look at."""
        if not self.enabled:
            return self.inner(*args, **kwargs)
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs and name not in self.accepts}
        options = {name: value for name, value in options.items() if value is not None}
        skip_logits = options.pop("skip_logits", None)
        keywords = {name: kwargs[name] for name in LOSS_KEYWORDS if kwargs.get(name) is not None}
        if not self.passes_on:
            for name in LOSS_KEYWORDS:
                if name not in self.accepts:
                    kwargs.pop(name, None)
        labels = args[self.labels_at] if len(args) > self.labels_at else kwargs.get("labels")
        if labels is None and "shift_labels" in keywords and len(args) <= self.labels_at:
            labels = kwargs["labels"] = keywords["shift_labels"]
        keeps_lazy = self.model.training and labels is not None and torch.is_grad_enabled()
        keeps_lazy = keeps_lazy if skip_logits is None else bool(skip_logits)
        defer = keeps_lazy or (labels is not None and any(options.values()))
        if defer and not torch.compiler.is_compiling():
            defer = self._follow_head()
        before = self.gate.window
        window = self.gate.window = Window(self.gate, defer, options, keywords, head=self.entry)
        try:
            output = self.inner(*args, **kwargs)
        finally:
            self.gate.window = before
        return self._finish(output, window, keeps_lazy)

    def _finish(self, output, window: Window, keeps_lazy: bool):
        if window.defer and not keeps_lazy:
            output = _with_real_logits(output)
        elif window.defer and getattr(self.model, "_is_replica", False):
            output = _without_logits(output)  # nn.DataParallel would put those of all devices on one
        if window.options.get("use_token_scaling") and not window.results:
            raise ValueError("use_token_scaling needs the fused head and a loss, and this call had only one or neither")
        wanted = {name: window.results.get(name) for name in RESULTS if window.options.get(f"return_{name}")}
        return with_results(output, wanted) if wanted else output

    def replicated(self, replica: nn.Module) -> Fusion:
        """The same for a replica, which runs in a thread of its own beside the others: with a gate of its own."""
        new = object.__new__(Fusion)
        new.__dict__.update(self.__dict__, model=replica, head=None, entry=None, gate=Gate())
        if isinstance(loss := replica.__dict__.get("_loss_function"), FusedLoss):
            _set_loss(replica, FusedLoss(new.gate, loss.own, loss.before))
        if isinstance(self.inner, MethodType) and self.inner.__self__ is self.model:
            new.inner = MethodType(self.inner.__func__, replica)
        return new

    def __reduce__(self):
        return _asleep, (self.model, self.slot)

    def __deepcopy__(self, memo):
        new = memo[id(self)] = object.__new__(Fusion)
        new.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return new


def _lce_forward(
    self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None, labels=None,
    use_cache=None, output_attentions=None, output_hidden_states=None, return_dict=None, cache_position=None,
    logits_to_keep=0, skip_logits=None, **kwargs,
):  # fmt: skip
    """The forward of self's own class, its LM head fused with the loss for this call.

    Serves `liger_kernel.transformers.model.<name>.lce_forward` for every name. Raises HeadLeftAlone where the head
    cannot be fused.
    """


lce_forward = _forward_for(_lce_forward, inspect.signature(_lce_forward))
lce_forward.__name__ = lce_forward.__qualname__ = "lce_forward"


# Finding the head


def find_head(model: nn.Module) -> tuple[nn.Module, str]:
    """(the module whose call is fused, how it was recognised); HeadLeftAlone otherwise."""
    head, pattern = unwrapped(_output_embeddings(model)), "linear"
    if head is None:
        raise HeadLeftAlone("it has no output embeddings")
    if is_peft(head, "ModulesToSaveWrapper"):
        active = head.active_adapters
        off = head.disable_adapters or not active or active[0] not in head.modules_to_save
        head, pattern = (head.original_module if off else head.modules_to_save[active[0]]), "modules_to_save"
    if is_lora(head):
        pattern, reason = "lora", why_not_lora(head)
    else:
        reason = why_not_linear(head)
    bound = head.__dict__.get(_forward_slot(head))
    # the class's own forward is bound in a pickled head and under accelerate's hook
    own = bound is None or _is_ours(bound) or getattr(bound, "__func__", None) is type(head).forward
    displaced = head.__dict__.get(_OWN, bound)
    wrapped = style_of(displaced) is not None
    reason = reason or _why_not_hooks(head)
    reason = reason or (None if own or wrapped else "someone else has replaced the head's forward")
    if reason is None and (wrapped or _is_hooked(head)):
        reason = why_not_split(head, displaced)
    if reason is not None:
        raise HeadLeftAlone(reason)
    return head, pattern if linear_of(head).bias is None else f"{pattern} with bias"


def _output_embeddings(model) -> Any:
    get: Any = getattr(model, "get_output_embeddings", None)
    try:
        return get() if get is not None else None
    except (AttributeError, NotImplementedError):
        return None


def _why_not_hooks(head) -> str | None:
    """A fused head is called twice, for lazy logits and for their loss: a hook that looks at values sees too much."""
    hooks = (*head._forward_pre_hooks.values(), *head._forward_hooks.values())
    return None if all(map(_is_plumbing, hooks)) else "someone has put a hook on the head's forward"


def _is_plumbing(hook) -> bool:
    """Whether a forward hook belongs to a library that splits models, which does not look at the logits."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    return (getattr(hook, "__module__", None) or "").startswith(("torch.distributed.", "deepspeed."))


# Small things


def _forward_slot(module: nn.Module) -> str:
    """Where a forward is replaced: under accelerate's hook where there is one, so that the hook still runs."""
    return "_old_forward" if "_old_forward" in module.__dict__ and hasattr(module, "_hf_hook") else "forward"


def _own_forward(head) -> Callable:
    return head.__dict__.get(_OWN) or MethodType(type(head).forward, head)


def _class_forward(kind: type) -> Callable:
    for base in kind.__mro__:
        forward = base.__dict__.get("forward")
        if forward is not None and not getattr(forward, _PATCH, False) and base is not nn.Module:
            return forward
    raise HeadLeftAlone(f"{kind.__name__}.forward has been replaced; bind the fused forward to an instance instead")


def _with_real_logits(output):
    if isinstance(output, tuple):
        return tuple(v.materialize(quiet=True) if isinstance(v, LazyLogits) else v for v in output)
    if isinstance(getattr(output, "logits", None), LazyLogits):
        output.logits = output.logits.materialize(quiet=True)
    return output


def _without_logits(output):
    if isinstance(output, tuple):
        return tuple(v for v in output if not isinstance(v, LazyLogits))
    return replace(output, logits=None)  # set to None in place, its key would stay


def _is_ours(bound) -> bool:
    function = getattr(bound, "__func__", None)
    return function is _head_forward or getattr(function, _PATCH, False)


def _name_of(head: nn.Module, model: nn.Module) -> str:
    return next((name for name, module in model.named_modules(remove_duplicate=False) if module is head), "head")


def _set_loss(model: Any, loss: Callable) -> None:
    model.loss_function = loss


class _MISSING:
    """No such attribute. A class, because a copied or pickled one is still itself."""


def _saved(module: nn.Module, names: list[str]) -> dict:
    return {name: module.__dict__.get(name, _MISSING) for name in names}


def _restore(module: nn.Module, before: dict) -> None:
    for name, value in before.items():
        if value is _MISSING:
            module.__dict__.pop(name, None)
        else:
            module.__dict__[name] = value
