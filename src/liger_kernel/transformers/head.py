"""Fuses a model's LM head with its loss, without a copy of any forward.

During a training forward with labels the head returns LazyLogits; the model's own forward goes on with them as far as
its loss function, where `FusedLoss` computes the loss in row chunks. Everything is bound per instance and undone by
`HeadPatch.undo`; outside the window the head and the loss are the model's own.
"""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as torch_functional

from liger_kernel.backends import while_tracing
from liger_kernel.transformers import functional
from liger_kernel.transformers.head_weight import (
    extended_inputs,
    is_foldable,
    is_lora,
    is_peft,
    linear_of,
    weight_and_bias,
    why_not_linear,
    why_not_lora,
)
from liger_kernel.transformers.lazy_logits import LazyLogits, scale_options
from liger_kernel.transformers.model import loss_utils
from liger_kernel.transformers.model.output_classes import with_results

# Keywords of the patched forward that transformers' forwards do not know.
OPTIONS = ("accum_dtype", "return_predicted_tokens", "return_token_accuracy", "skip_logits", "use_token_scaling")
# Keywords of the loss that a forward may or may not pass on.
LOSS_KEYWORDS = ("num_items_in_batch", "shift_labels")
_PATCH = "_liger_head"
_GATE = "_liger_gate"


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
    if not fusion.enabled:
        fusion.bind()
    return HeadPatch(fusion.name, fusion.pattern, fusion.undo)


def use_cross_entropy(model: nn.Module) -> HeadPatch:
    """Make this model compute its causal loss with `liger_cross_entropy` on its ordinary logits.

    Raises HeadLeftAlone where the model's loss is not transformers' causal LM loss.
    """
    current: Any = getattr(model, "loss_function", None)
    if not isinstance(current, CrossEntropyLoss):
        if not _is_causal_loss(current):
            name = getattr(current, "__name__", current)
            raise HeadLeftAlone(f"its loss is {name}, not transformers' ForCausalLMLoss")
        current = CrossEntropyLoss(current, _saved(model, ["_loss_function"]))
        _set_loss(model, current)
    return HeadPatch("loss_function", "liger_cross_entropy", functools.partial(_restore, model, current.before))


# The window: one forward


@dataclass
class Window:
    """What one forward of the model was asked for, and what its loss found."""

    gate: Gate
    defer: bool
    options: dict = field(default_factory=dict)
    keywords: dict = field(default_factory=dict)
    results: dict = field(default_factory=dict)

    def collect(self, results: tuple) -> None:
        """Keep token_accuracy and predicted_tokens of an unpacked result."""
        self.results.update(token_accuracy=results[2], predicted_tokens=results[3])

    def first_use(self) -> bool:
        """Whether this model's lazy logits are used for the first time."""
        first, self.gate.used = not self.gate.used, True
        return first


class Gate:
    """Shared by a model's forward, head and loss: the window that is open now, if any.

    It refers to no module, so that a copy of the head alone (PEFT makes one) does not copy the model.
    """

    def __init__(self):
        self.window: Window | None = None
        self.used = False


# The three bound pieces


def _forward_for(inner: Callable, signature: inspect.Signature) -> Any:
    """The patched forward, named and documented like the one it runs, with this signature (self included).

    Without functools.wraps' __wrapped__: accelerate unwraps a forward as far as it can, which would take this off.
    """

    @functools.wraps(inner, updated=())
    def forward(self, *args, **kwargs):
        fusion = self.__dict__.get(_PATCH)
        if fusion is not None:
            return fusion.run(args, kwargs)
        patch = fuse_head(self)
        try:
            return self.__dict__[_PATCH].run(args, kwargs)
        finally:
            patch.undo()

    del forward.__wrapped__
    forward.__dict__.update({"__signature__": signature, _PATCH: True})
    return forward


def _head_forward(self, hidden, *args, reduce=None, **kwargs):
    gate = getattr(self, _GATE)
    if reduce is not None:
        return reduce(hidden, *weight_and_bias(self))
    window = gate.window
    if window is None or not window.defer or args or kwargs or not is_foldable(self):
        return _own_forward(self)(hidden, *args, **kwargs)
    return LazyLogits(extended_inputs(self, hidden), self, linear_of(self).weight.shape[0], window)


_head_forward.__name__ = "forward"  # pickle stores a bound method by name; the class's forward is the one to find


class FusedLoss:
    """model.loss_function: the fused causal loss for lazy logits, the model's own loss for real ones."""

    def __init__(self, gate: Gate, own: Callable):
        self.gate = gate
        self.own = own

    def __call__(self, *args, **kwargs):
        if not _is_causal_loss(self.own):
            return self.own(*args, **kwargs)  # its cross entropy of lazy logits is fused all the same
        if self.gate.window is not None:
            kwargs = {**self.gate.window.keywords, **kwargs}
        return self._causal(*args, **kwargs)

    def _causal(self, logits, labels, vocab_size, *args, **kwargs):
        lazy = isinstance(logits, LazyLogits) and logits.is_fusable() and logits.size(-1) == vocab_size
        if args or not lazy:
            return self.own(logits, labels, vocab_size, *args, **kwargs)
        window = logits.window
        kwargs = {**kwargs, **window.options, **scale_options(logits, "final_logit_softcapping")}

        def loss(hidden, weight, bias):
            if bias is not None:
                kwargs["bias"] = bias
            result = loss_utils.LigerForCausalLMLoss(
                hidden_states=hidden, lm_head_weight=weight, labels=labels, hidden_size=hidden.shape[-1], **kwargs
            )
            return loss_utils.unpack_cross_entropy_result(result)

        results = logits.reduce(loss)
        window.collect(results)
        return results[0].to(logits.device, torch.float32)  # transformers computes the loss of logits.float()


class CrossEntropyLoss:
    """model.loss_function for an explicit cross_entropy=True: our cross entropy on ordinary logits."""

    def __init__(self, own: Callable, before: dict):
        self.own = own
        self.before = before

    def __call__(
        self, logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **kwargs
    ):
        if shift_labels is None:
            shift_labels = torch_functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        loss = functional.liger_cross_entropy(
            logits.reshape(-1, vocab_size),
            shift_labels.reshape(-1).to(logits.device),
            ignore_index=ignore_index,
            reduction="mean" if num_items_in_batch is None else "sum",
        ).float()
        if num_items_in_batch is None:
            return loss
        if isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss / num_items_in_batch


class Fusion:
    """What is bound to one model, and how to take it off. Copied with the model; not pickled, as forwards are not."""

    def __init__(self, model: nn.Module):
        self.model = model
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
        self.head_before: dict = {}
        head, pattern = find_head(model)
        self.name, self.pattern = _name_of(head, model), pattern

    def bind(self) -> None:
        """Bind forward, head and loss of the model; the forward only, if an undo left it under someone's wrapper."""
        model = self.model
        self.head = None
        if model.__dict__.get(_PATCH) is None:
            self.model_before = _saved(model, [self.slot, _PATCH])
            me = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
            signature = self.signature.replace(parameters=[me, *self.signature.parameters.values()])
            model.__dict__[_PATCH] = self
            model.__dict__[self.slot] = MethodType(_forward_for(self.inner, signature), model)
        self.loss_before = _saved(model, ["_loss_function"])
        own: Any = getattr(model, "loss_function", None)
        if own is not None:  # one of ours came with a pickled model
            _set_loss(model, FusedLoss(self.gate, own.own if isinstance(own, FusedLoss) else own))
        self._bind_head(*find_head(model))
        self.enabled = True

    def _bind_head(self, head: nn.Module, pattern: str) -> None:
        if self.head is not None:
            _restore(self.head, self.head_before)
        slot = _forward_slot(head)
        self.head, self.name, self.pattern = head, _name_of(head, self.model), pattern
        self.head_before = _saved(head, [slot, _GATE])
        if _is_ours(head.__dict__.get(slot)):  # PEFT has copied a fused head
            self.head_before = dict.fromkeys(self.head_before, _MISSING)
        head.__dict__[_GATE] = self.gate
        head.__dict__[slot] = MethodType(_head_forward, head)

    def undo(self) -> None:
        """Take everything off. A forward that someone has wrapped since goes on to run the model's own one."""
        if not self.enabled:
            return
        self.enabled = False
        if _is_ours(self.model.__dict__.get(self.slot)):
            _restore(self.model, self.model_before)
        if isinstance(self.model.__dict__.get("_loss_function"), FusedLoss):
            _restore(self.model, self.loss_before)
        if self.head is not None:
            _restore(self.head, self.head_before)

    def _follow_head(self) -> bool:
        """Whether the model's head is fused; one replaced since (PEFT, resized embeddings) is bound first."""
        try:
            head, pattern = find_head(self.model)
        except HeadLeftAlone as reason:
            if self.head is not None:
                warnings.warn(f"the LM head is not fused any more: {reason}", stacklevel=5)
                _restore(self.head, self.head_before)
                self.head = None
            return False
        if head is not self.head:
            self._bind_head(head, pattern)
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
        window = self.gate.window = Window(self.gate, defer, options, keywords)
        try:
            output = self.inner(*args, **kwargs)
        finally:
            self.gate.window = before
        return self._finish(output, window, keeps_lazy)

    def _finish(self, output, window: Window, keeps_lazy: bool):
        if window.defer and not keeps_lazy:
            output = _with_real_logits(output)
        wanted = {name: window.results.get(name) for name in ("token_accuracy", "predicted_tokens")}
        wanted = {name: value for name, value in wanted.items() if window.options.get(f"return_{name}")}
        return with_results(output, wanted) if wanted else output

    def __reduce__(self):
        return type(None), ()

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
    get: Any = getattr(model, "get_output_embeddings", None)
    try:
        head = get() if get is not None else None
    except (AttributeError, NotImplementedError):
        head = None
    if head is None:
        raise HeadLeftAlone("it has no output embeddings")
    pattern = "linear"
    if is_peft(head, "ModulesToSaveWrapper"):
        active = head.active_adapters
        unwrapped = head.disable_adapters or not active or active[0] not in head.modules_to_save
        head, pattern = (head.original_module if unwrapped else head.modules_to_save[active[0]]), "modules_to_save"
    if is_lora(head):
        pattern, reason = "lora", why_not_lora(head)
    else:
        reason = why_not_linear(head)
    bound = head.__dict__.get(_forward_slot(head))
    # the class's own forward is bound in a pickled head and under accelerate's hook
    own = bound is None or _is_ours(bound) or getattr(bound, "__func__", None) is type(head).forward
    reason = reason or _why_not_hooks(head) or (None if own else "someone else has replaced the head's forward")
    if reason is not None:
        raise HeadLeftAlone(reason)
    return head, pattern if linear_of(head).bias is None else f"{pattern} with bias"


def _why_not_hooks(head) -> str | None:
    """A fused head is called twice, for lazy logits and for their loss: a hook that looks at values sees too much."""
    hooks = (*head._forward_pre_hooks.values(), *head._forward_hooks.values())
    return None if all(map(_is_plumbing, hooks)) else "someone has put a hook on the head's forward"


def _is_plumbing(hook) -> bool:
    """Whether a forward hook belongs to a sharding library, which does not look at the logits."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    return (getattr(hook, "__module__", None) or "").startswith(("torch.distributed.", "deepspeed."))


# Small things


def _forward_slot(module: nn.Module) -> str:
    """Where a forward is replaced: under accelerate's hook where there is one, so that the hook still runs."""
    return "_old_forward" if "_old_forward" in module.__dict__ and hasattr(module, "_hf_hook") else "forward"


def _own_forward(head) -> Callable:
    return MethodType(type(head).forward, head)


def _class_forward(kind: type) -> Callable:
    for base in kind.__mro__:
        forward = base.__dict__.get("forward")
        if forward is not None and not getattr(forward, _PATCH, False) and base is not nn.Module:
            return forward
    raise HeadLeftAlone(f"{kind.__name__}.forward has been replaced; bind the fused forward to an instance instead")


@while_tracing
def _is_causal_loss(function: Any) -> bool:
    from transformers.loss.loss_utils import ForCausalLMLoss

    return function is ForCausalLMLoss


def _with_real_logits(output):
    if isinstance(output, tuple):
        return tuple(v.materialize(quiet=True) if isinstance(v, LazyLogits) else v for v in output)
    if isinstance(getattr(output, "logits", None), LazyLogits):
        output.logits = output.logits.materialize(quiet=True)
    return output


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
