"""ReLU squared as a module."""

from __future__ import annotations

from torch import nn

from liger_kernel.ops.relu_squared import LigerReLUSquaredFunction


class LigerReLUSquared(nn.Module):
    """max(x, 0)^2 for x of any shape and float dtype; the result is like x. ValueError for other dtypes."""

    def forward(self, x):
        return LigerReLUSquaredFunction.apply(x)
