"""The losses that take the place of a model's own, and the window of one forward in which they run fused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as torch_functional

from liger_kernel.backends import while_tracing
from liger_kernel.transformers import functional
from liger_kernel.transformers.lazy_logits import LazyLogits, scale_options
from liger_kernel.transformers.model import loss_utils

# What a fused loss finds beside itself, for the keyword return_<name>.
RESULTS = ("token_accuracy", "predicted_tokens", "entropy")


@dataclass
class Window:
    """What one forward of the model was asked for, and what its loss found."""

    gate: Gate
    defer: bool
    options: dict = field(default_factory=dict)
    keywords: dict = field(default_factory=dict)
    results: dict = field(default_factory=dict)
    head: Any = None  # what is called for the head, where that is another module than the head itself

    def collect(self, results: tuple) -> None:
        """Keep the RESULTS of an unpacked result."""
        self.results.update(zip(RESULTS, results[2:]))

    def collect_from(self, logits, labels, keywords: dict) -> None:
        """Keep the RESULTS of real logits, where the head could not be fused."""
        names = ("ignore_index", "shift_labels")
        given = {name: keywords[name] for name in names if keywords.get(name) is not None}
        real = logits.materialize(quiet=True) if isinstance(logits, LazyLogits) else logits
        found = loss_utils.results_of_logits(real.detach(), labels, **given)
        self.results.update(zip(RESULTS, found))

    def wants_results(self) -> bool:
        return any(self.options.get(f"return_{name}") for name in RESULTS)

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


# The losses


class FusedLoss:
    """model.loss_function: the fused causal loss for lazy logits, the model's own loss for real ones."""

    def __init__(self, gate: Gate, own: Callable, before: dict):
        self.gate = gate
        self.own = own
        self.before = before

    def __call__(self, *args, **kwargs):
        if not is_causal_loss(self.own):
            return self.own(*args, **kwargs)  # its cross entropy of lazy logits is fused all the same
        if self.gate.window is not None:
            kwargs = {**self.gate.window.keywords, **kwargs}
        return self._causal(self.gate.window, *args, **kwargs)

    def _causal(self, window, logits, labels, vocab_size, *args, **kwargs):
        lazy = isinstance(logits, LazyLogits) and logits.is_fusable() and logits.size(-1) == vocab_size
        if args or not lazy:
            if window is not None and window.wants_results():
                window.collect_from(logits, labels, kwargs)
            return self.own(logits, labels, vocab_size, *args, **kwargs)
        window = logits.window
        kwargs = {**kwargs, **window.options, **scale_options(logits, "final_logit_softcapping")}

        def loss(hidden, weight, bias, low_rank=None):
            given = kwargs if bias is None else kwargs | {"bias": bias}
            hidden, weight, more = loss_utils.low_rank_options(hidden, weight, low_rank, causal=True)
            result = loss_utils.LigerForCausalLMLoss(
                hidden_states=hidden,
                lm_head_weight=weight,
                labels=labels,
                hidden_size=hidden.shape[-1],
                **given,
                **more,
            )
            return loss_utils.unpack(result)

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


@while_tracing
def is_causal_loss(function: Any) -> bool:
    """Whether this is transformers' causal LM loss, which a fused loss takes the place of."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    return function is ForCausalLMLoss
