"""Softmax over the last dimension as a module."""

from __future__ import annotations

from torch import nn

from liger_kernel.ops.softmax import LigerSoftmaxFunction


class LigerSoftmax(nn.Module):
    """Softmax of (..., N) over N -> the same shape and dtype. Raises ValueError for a dtype that is not floating."""

    def forward(self, x):
        return LigerSoftmaxFunction.apply(x)
