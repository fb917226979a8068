"""GroupNorm as a module."""

from __future__ import annotations

import torch
from torch import nn

from liger_kernel.ops.group_norm import LigerGroupNormFunction
from liger_kernel.transformers.rms_norm import INITS


class LigerGroupNorm(nn.Module):
    """GroupNorm of (B, num_channels, *) in num_groups groups; the result has the same shape and dtype.

    There is a bias parameter, initially 0, whatever `bias` says, so that checkpoints of nn.GroupNorm load.
    Raises ValueError for an unknown init_fn and for num_groups that do not divide num_channels.
    """

    def __init__(self, num_channels, num_groups, eps=1e-6, bias=False, init_fn="ones"):
        super().__init__()
        if init_fn not in INITS:
            raise ValueError(f"init_fn must be one of {sorted(INITS)}, got {init_fn!r}")
        if num_groups < 1 or num_channels % num_groups:
            raise ValueError(f"num_groups={num_groups} does not divide num_channels={num_channels}")
        self.num_channels, self.num_groups = num_channels, num_groups
        self.eps = self.variance_epsilon = eps
        self.weight = nn.Parameter(INITS[init_fn](num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def forward(self, hidden_states):
        return LigerGroupNormFunction.apply(
            hidden_states, self.weight, self.bias, self.num_channels, self.num_groups, self.variance_epsilon
        )

    def extra_repr(self):
        return f"{self.num_channels}, {self.num_groups}, eps={self.eps}"
