"""A mixture of experts with gated MLPs: y = sum over a token's experts e of weight * down_e(silu(gate_e(x)) * up_e(x)).

The rows are brought into the order of their experts, each expert's run through its two linears as one group of a
grouped product, and brought back; nothing is summed by atomics, so the same inputs give the same bits.

Shapes    x (T, H); gate_up_proj (E, 2 I, H), the gate first; down_proj (E, H, I); top_k_index, top_k_weights (T, K).
Numerics  products in x's dtype; the sum over a token's experts in fp32, cast once.
Memory    keeps the rows in their experts' order, gate and up, and the products.
Needs     for a GPU not to be waited for: grouped_mm of torch, bf16, sizes of a multiple of 16 bytes. Elsewhere there is
          one product per expert, whose size is read from the device.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction


class _ToExperts(torch.autograd.Function):
    """x (T, H) -> (T K, H), row i being that of slot order[i]; inverse undoes order.

    elsewhere (T K,) marks the slots of no expert: a grouped product leaves the gradients of their rows unwritten.
    """

    @staticmethod
    def forward(ctx, x, order, inverse, elsewhere, top_k):
        ctx.save_for_backward(inverse, elsewhere)
        ctx.top_k = top_k
        return x.index_select(0, order // top_k)

    @staticmethod
    def backward(ctx, dy):
        inverse, elsewhere = ctx.saved_tensors
        dy = dy.index_select(0, inverse).masked_fill_(elsewhere[:, None], 0.0)
        return dy.view(-1, ctx.top_k, dy.shape[-1]).sum(1), None, None, None, None


class _FromExperts(torch.autograd.Function):
    """The rows of y back in the order of the slots."""

    @staticmethod
    def forward(ctx, y, order, inverse):
        ctx.save_for_backward(order)
        return y.index_select(0, inverse)

    @staticmethod
    def backward(ctx, dy):
        (order,) = ctx.saved_tensors
        return dy.index_select(0, order), None, None


def _has_grouped_mm(x, weights) -> bool:
    aligned = all(size * x.element_size() % 16 == 0 for w in weights for size in w.shape[1:])
    return x.device.type != "cpu" and x.dtype is torch.bfloat16 and aligned and hasattr(F, "grouped_mm")


def _by_group(x, weight, ends, grouped):
    """x (T K, in) times each group's weight (E, out, in); rows after the last group are zero."""
    if grouped:
        live = torch.arange(x.shape[0], device=x.device)[:, None] < ends[-1]
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends).masked_fill(~live, 0.0)
    bounds = [0, *ends.tolist()]
    parts = [F.linear(x[i:j], w) for i, j, w in zip(bounds[:-1], bounds[1:], weight.unbind(0), strict=True)]
    rest = x.new_zeros(x.shape[0] - bounds[-1], weight.shape[1])
    return torch.cat([*parts, rest])


class LigerFusedMoEFunction:
    """apply(x, gate_up_proj, down_proj, top_k_index, top_k_weights) -> y (T, H).

    An index that is no expert's, as expert parallelism gives slots that live elsewhere, adds nothing. Raises ValueError
    for shapes that do not fit.
    """

    @staticmethod
    def apply(x, gate_up_proj, down_proj, top_k_index, top_k_weights):
        check(x, gate_up_proj, down_proj, top_k_index, top_k_weights)
        experts, top_k = gate_up_proj.shape[0], top_k_index.shape[1]
        slots = top_k_index.flatten()
        slots = torch.where((slots >= 0) & (slots < experts), slots, experts)
        sorted_slots, order = slots.sort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        ends = torch.searchsorted(sorted_slots, torch.arange(experts, device=slots.device), right=True).to(torch.int32)
        grouped = _has_grouped_mm(x, (gate_up_proj, down_proj))
        rows = _ToExperts.apply(x, order, inverse, slots == experts, top_k)
        product = LigerFusedGateUpSiLUMulFunction.apply(_by_group(rows, gate_up_proj, ends, grouped))
        y = _FromExperts.apply(_by_group(product, down_proj, ends, grouped), order, inverse)
        y = y.view(-1, top_k, x.shape[-1]).float() if x.dtype is not torch.float64 else y.view(-1, top_k, x.shape[-1])
        return (y * top_k_weights.unsqueeze(-1)).sum(1).to(x.dtype)


def check(x, gate_up_proj, down_proj, top_k_index, top_k_weights):
    """ValueError for what cannot be honoured."""
    experts, inner = down_proj.shape[0], down_proj.shape[2]
    if x.dim() != 2 or gate_up_proj.shape != (experts, 2 * inner, x.shape[1]) or down_proj.shape[1] != x.shape[1]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, gate_up_proj, down_proj))
        raise ValueError(f"fused_moe: x, gate_up_proj and down_proj of shapes {shapes} do not fit")
    if top_k_index.shape != top_k_weights.shape or top_k_index.dim() != 2 or top_k_index.shape[0] != x.shape[0]:
        shapes = f"{tuple(top_k_index.shape)} and {tuple(top_k_weights.shape)}"
        raise ValueError(f"fused_moe: top_k_index and top_k_weights of shapes {shapes} do not fit {x.shape[0]} tokens")
