"""Dynamic tanh as a module."""

from __future__ import annotations

import torch
from torch import nn

from liger_kernel.ops.dyt import LigerDyTFunction


class LigerDyT(nn.Module):
    """gamma * tanh(alpha * x) + beta of (..., hidden_size) (arXiv:2503.10622); beta=False has no beta."""

    def __init__(self, hidden_size, beta=True, init_alpha=0.5):
        super().__init__()
        self.hidden_size, self.init_alpha = hidden_size, init_alpha
        self.alpha = nn.Parameter(torch.ones(1) * init_alpha)
        self.gamma = nn.Parameter(torch.ones(hidden_size))
        self.beta = nn.Parameter(torch.zeros(hidden_size)) if beta else None

    def forward(self, x):
        return LigerDyTFunction.apply(x, self.alpha, self.gamma, self.beta)

    def extra_repr(self):
        return f"{self.hidden_size}, init_alpha={self.init_alpha}, beta={self.beta is not None}"
