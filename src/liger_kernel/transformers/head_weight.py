"""What a head computes with: the weight and bias of its nn.Linear, and the low-rank terms of PEFT's LoRA adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_PLAIN = (nn.Parameter, torch.Tensor)


def why_not_linear(head) -> str | None:
    kind = type(head)
    sharded = kind.__name__ == f"FSDP{nn.Linear.__name__}" and nn.Linear in kind.__bases__  # FSDP2's class of a Linear
    if kind is not nn.Linear and not sharded:
        return f"its head is a {kind.__module__}.{kind.__name__}, not a torch.nn.Linear"
    weight = type(head.weight)
    if weight not in _PLAIN and not weight.__module__.startswith("torch.distributed."):
        return f"its head's weight is a {weight.__module__}.{weight.__name__}, not a plain tensor"
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
    return type(weight) in _PLAIN and weight.dim() == 2  # a DTensor's result would be sharded


def adapters_of(head) -> tuple[str, ...]:
    """The LoRA adapters that take part in the head's call."""
    if not is_lora(head) or head.disable_adapters or head.merged:
        return ()
    return tuple(name for name in head.active_adapters if name in head.lora_A)


def merged_into(head) -> tuple[str, ...]:
    """The adapters that are summed into the weight."""
    return tuple(head.merged_adapters) if is_lora(head) else ()


def adapter_inputs(head, hidden, names):
    """u = s A(x) of each adapter, (..., r) side by side: against their B's it gives their share of the logits.

    Computed once, here: its dropout must not be drawn again when the loss or the logits are computed.
    """
    parts = []
    for name in names:
        a = head.lora_A[name]
        parts.append(a(head.lora_dropout[name](hidden.to(a.weight.dtype))) * head.scaling[name])
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def parameters_of(head, u=None, names=()) -> tuple:
    """(weight, bias), and (u, B) with logits = x W^T + bias + u B^T where adapters take part."""
    base = linear_of(head)
    weight, bias = base.weight, base.bias
    outs = [head.lora_B[name] for name in names]
    for name, out in zip(names, outs):
        if out.bias is not None:
            more = out.bias * head.scaling[name]
            bias = more if bias is None else bias + more
    if not outs:
        return weight, bias
    return weight, bias, (u, outs[0].weight if len(outs) == 1 else torch.cat([out.weight for out in outs], dim=1))


def merged(hidden, weight, low_rank):
    """(hidden', weight') with hidden' weight'^T = hidden weight^T + u B^T, for a loss that knows no low rank."""
    u, low = low_rank
    return torch.cat([hidden, u.to(hidden.dtype)], dim=-1), torch.cat([weight, low.to(weight.dtype)], dim=1)
