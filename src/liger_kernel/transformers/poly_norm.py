"""PolyNorm as a module."""

from __future__ import annotations

import torch
from torch import nn

from liger_kernel.ops.poly_norm import LigerPolyNormFunction


class LigerPolyNorm(nn.Module):
    """Three normalised powers of (..., N) with learned weights (arXiv:2411.03884), -> the same shape and dtype.

    in_place=True permits the backward to write over the incoming gradient.
    """

    def __init__(self, eps=1e-6, in_place=True):
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 1 / 3))
        self.bias = nn.Parameter(torch.tensor(1.0))
        self.variance_epsilon = eps
        self.in_place = in_place

    def forward(self, hidden_states):
        return LigerPolyNormFunction.apply(hidden_states, self.weight, self.bias, self.variance_epsilon, self.in_place)

    def extra_repr(self):
        return f"eps={self.variance_epsilon}, in_place={self.in_place}"
