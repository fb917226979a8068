"""What a head computes with: the weight and bias of its nn.Linear, and the low-rank terms of PEFT's LoRA adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from liger_kernel.transformers.fsdp import is_fully_sharded

_PLAIN = (nn.Parameter, torch.Tensor)


def why_not_linear(head) -> str | None:
    kind = kind_of(head)
    if kind is not nn.Linear:
        return f"its head is a {kind.__module__}.{kind.__name__}, not a torch.nn.Linear"
    weight = type(head.weight)
    if weight not in _PLAIN and not weight.__module__.startswith("torch.distributed."):
        return f"its head's weight is a {weight.__module__}.{weight.__name__}, not a plain tensor"
    if not head.weight.is_floating_point():
        return f"its head holds {head.weight.dtype} weights"
    return None


def kind_of(module) -> type:
    """The class of a module, without the one that FSDP2 derives of it."""
    kind = type(module)
    return kind.__bases__[-1] if is_fully_sharded(module) else kind


def is_peft(module, name: str) -> bool:
    kind = kind_of(module)
    return kind.__name__ == name and kind.__module__.startswith("peft.")


def is_lora(module) -> bool:
    kind = kind_of(module)
    return kind.__name__ == "Linear" and kind.__module__ == "peft.tuners.lora.layer"


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
    return type(weight) in _PLAIN and weight.dim() == 2  # a DTensor's result would be sharded


def adapters_of(head) -> tuple[str, ...]:
    """The LoRA adapters that take part in the head's call."""
    if not is_lora(head) or head.disable_adapters or head.merged:
        return ()
    return tuple(name for name in head.active_adapters if name in head.lora_A)


def merged_into(head) -> tuple[str, ...]:
    """The adapters that are summed into the weight."""
    return tuple(head.merged_adapters) if is_lora(head) else ()


def adapter_inputs(head, hidden, names) -> tuple:
    """What goes into each adapter, (..., H), None for hidden itself.

    Drawn once, here: dropout must not be drawn again when the loss or the logits are computed. Nothing here needs a
    weight: FSDP gathers one for the backward of a call that yields tensors, and this call yields none.
    """
    parts = []
    for name in names:
        drop = head.lora_dropout[name]
        keeps = isinstance(drop, nn.Identity) or not drop.training
        parts.append(None if keeps else drop(hidden.to(head.lora_A[name].weight.dtype)))
    return tuple(parts)


def parameters_of(head, hidden, inputs=(), names=()) -> tuple:
    """(weight, bias), and (u, B) with logits = x W^T + bias + u B^T where adapters take part: u = s A(x), (..., r)."""
    base = linear_of(head)
    weight, bias = base.weight, base.bias
    us, outs = [], [head.lora_B[name] for name in names]
    for name, x, out in zip(names, inputs, outs):
        a = head.lora_A[name]
        us.append(a((hidden if x is None else x).to(a.weight.dtype)) * head.scaling[name])
        if out.bias is not None:
            more = out.bias * head.scaling[name]
            bias = more if bias is None else bias + more
    if not outs:
        return weight, bias
    if len(outs) == 1:
        return weight, bias, (us[0], outs[0].weight)
    return weight, bias, (torch.cat(us, dim=-1), torch.cat([out.weight for out in outs], dim=1))


def merged(hidden, weight, low_rank):
    """(hidden', weight') with hidden' weight'^T = hidden weight^T + u B^T, for a loss that knows no low rank."""
    u, low = low_rank
    return torch.cat([hidden, u.to(hidden.dtype)], dim=-1), torch.cat([weight, low.to(weight.dtype)], dim=1)
