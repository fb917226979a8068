"""SwiGLU in the place of Megatron-Core's bias_swiglu_impl."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction


class LigerMegatronSwiGLU(nn.Module):
    """silu(gate) * up of [gate, up] side by side in the last dim.

    fallback_impl serves what this does not: an fp8 store and CPU offloading of the input. in_place allows the backward
    to overwrite the input with its gradient.
    """

    def __init__(self, fallback_impl: Callable | None = None, in_place: bool = False):
        super().__init__()
        self.fallback_impl, self.in_place = fallback_impl, in_place

    def forward(
        self,
        input: torch.Tensor,
        bias: torch.Tensor | None = None,
        fp8_input_store: bool = False,
        cpu_offload_input: bool = False,
    ) -> torch.Tensor:
        """input: (..., 2 I), bias: (2 I,) or None -> (..., I). Raises ValueError for fp8_input_store or
        cpu_offload_input without a fallback_impl."""
        if fp8_input_store or cpu_offload_input:
            if self.fallback_impl is None:
                raise ValueError("fp8_input_store and cpu_offload_input need a fallback_impl")
            return self.fallback_impl(input, bias, fp8_input_store, cpu_offload_input)
        return LigerFusedGateUpSiLUMulFunction.apply(input if bias is None else input + bias, self.in_place)
