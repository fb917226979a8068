"""RMS norm with the constructor of Megatron-Core's norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from liger_kernel.ops.rms_norm import LigerRMSNormFunction


class LigerMegatronRMSNorm(nn.Module):
    """x / rms(x) * weight in fp32, rounded once: torch.nn.RMSNorm's and Transformer Engine's order of casts.

    With zero_centered_gamma, the config's or the argument's, the factor is 1 + weight. persist_layer_norm has no
    effect. Raises ValueError for a normalization other than "RMSNorm".
    """

    def __init__(
        self,
        config: Any,
        hidden_size: int,
        eps: float = 1e-5,
        persist_layer_norm: bool = False,
        zero_centered_gamma: bool = False,
        normalization: str = "RMSNorm",
    ):
        super().__init__()
        wanted = {normalization, getattr(config, "normalization", normalization)}
        if wanted != {"RMSNorm"}:
            raise ValueError(f"normalization must be 'RMSNorm', got {sorted(wanted - {'RMSNorm'})[0]!r}")
        self.config, self.hidden_size, self.eps = config, hidden_size, eps
        self.zero_centered_gamma = zero_centered_gamma or getattr(config, "layernorm_zero_centered_gamma", False)
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=getattr(config, "params_dtype", None)))
        self.reset_parameters()
        # Megatron-Core sums the gradient of such a weight over the ranks that share a sequence.
        self.weight.sequence_parallel = getattr(config, "sequence_parallel", False)  # type: ignore[attr-defined]

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.0 if self.zero_centered_gamma else 1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (..., hidden_size), of which each rank normalises its own rows."""
        offset = 1.0 if self.zero_centered_gamma else 0.0
        return LigerRMSNormFunction.apply(x, self.weight, self.eps, offset, "gemma", False)

    def extra_repr(self) -> str:
        return f"{self.hidden_size}, eps={self.eps}"
