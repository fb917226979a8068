"""The weight and bias a head computes with: those of its nn.Linear, PEFT's LoRA adapters folded in."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def why_not_linear(head) -> str | None:
    kind = type(head)
    sharded = kind.__name__ == f"FSDP{nn.Linear.__name__}" and nn.Linear in kind.__bases__  # FSDP2's class of a Linear
    if kind is not nn.Linear and not sharded:
        return f"its head is a {kind.__module__}.{kind.__name__}, not a torch.nn.Linear"
    if not head.weight.is_floating_point():
        return f"its head holds {head.weight.dtype} weights"
    return None


def is_peft(module, name: str) -> bool:
    return type(module).__name__ == name and type(module).__module__.startswith("peft.")


def is_lora(module) -> bool:
    return type(module).__name__ == "Linear" and type(module).__module__ == "peft.tuners.lora.layer"


def why_not_lora(head) -> str | None:
    if head.fan_in_fan_out or any(name in getattr(head, "lora_variant", {}) for name in head.active_adapters):
        return "its head's adapter is a LoRA variant that does not fold into a weight"
    if any(getattr(head, "use_dora", {}).get(name) for name in head.active_adapters):
        return "its head's adapter is DoRA, which does not fold into a weight"
    return why_not_linear(head.base_layer)


def linear_of(head) -> Any:
    return head.base_layer if is_lora(head) else head


def is_foldable(head) -> bool:
    """Whether the head's call is hidden @ weight^T + bias with plain tensors at this moment."""
    if is_lora(head) and head.disable_adapters and head.merged:
        return False  # PEFT unmerges in this call
    weight = linear_of(head).weight
    return type(weight) in (nn.Parameter, torch.Tensor) and weight.dim() == 2  # a DTensor's result would be sharded


def _terms(head) -> list:
    """(A, B, dropout, scaling) of each adapter that takes part in the head's call."""
    if not is_lora(head) or head.disable_adapters or head.merged:
        return []
    names = [name for name in head.active_adapters if name in head.lora_A]
    return [(head.lora_A[n], head.lora_B[n], head.lora_dropout[n], head.scaling[n]) for n in names]


def extended_inputs(head, hidden):
    """[x, s A(x)]: against [W, B] it gives x W^T + s A(x) B^T, so gradients reach A and B with no weight of their sum.

    A(x) is computed once, here: its dropout must not be drawn again when the loss or the logits are computed.
    """
    terms = _terms(head)
    if not terms:
        return hidden
    parts = [(a(dropout(hidden.to(a.weight.dtype))) * scaling).to(hidden.dtype) for a, _, dropout, scaling in terms]
    return torch.cat([hidden, *parts], dim=-1)


def weight_and_bias(head):
    base, terms = linear_of(head), _terms(head)
    weight, bias = base.weight, base.bias
    if terms:
        weight = torch.cat([weight, *(b.weight.to(weight.dtype) for _, b, _, _ in terms)], dim=1)
    for _, b, _, scaling in terms:
        if b.bias is not None:
            bias = b.bias * scaling if bias is None else bias + b.bias * scaling
    return weight, bias
