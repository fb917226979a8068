"""Multi-token attention (Golovneva et al. 2025, arXiv:2504.00927): attention weights mixed over neighbouring queries,
keys and heads. A form of the rooms softmax and sparsemax around torch's convolution.

    p = softmax(scores, where j <= i)        or sparsemax; 0 where j > i
    y = conv2d(p, weight, bias)              0 where j > i

Shapes    scores (B, C_in, L, L) or (C_in, L, L); weight (C_out, C_in / groups, Kh, Kw); y (..., C_out, L', L').
Numerics  the softmax in fp32, rounded to scores' dtype; the convolution as torch computes it in that dtype.
Memory    keeps p, once for both of its backwards, and two masks of booleans.
Needs     padding that keeps future keys out is the caller's choice: the convolution sees zeros there.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from liger_kernel.ops.softmax import LigerSoftmaxFunction
from liger_kernel.ops.sparsemax import LigerSparsemaxFunction


class LigerMultiTokenAttentionFunction:
    """apply(scores, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, sparse=False) -> y."""

    @staticmethod
    def apply(scores, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, sparse=False):
        check(scores, weight, bias)
        masked = scores.masked_fill(_future(scores), float("-inf"))
        p = LigerSparsemaxFunction.apply(masked, -1) if sparse else LigerSoftmaxFunction.apply(masked)
        y = F.conv2d(p, weight, bias, stride, padding, dilation, groups)
        return y.masked_fill_(_future(y), 0.0)  # no backward of a convolution reads its output


def _future(x):
    """Where the key comes after the query."""
    return torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu_(1)


def liger_multi_token_attention(
    scores: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    sparse: bool = False,
) -> torch.Tensor:
    """Causal attention weights of scores (B, C_in, L, L), mixed by a convolution -> (B, C_out, L', L').

    weight (C_out, C_in / groups, Kh, Kw), bias (C_out,), and stride, padding, dilation, groups are those of torch's
    conv2d; entry (i, j) of the result is 0 where j > i. sparse=True takes sparsemax for softmax. One float dtype.
    Raises ValueError for shapes, dtypes or devices that do not fit (arXiv:2504.00927).
    """
    return LigerMultiTokenAttentionFunction.apply(scores, weight, bias, stride, padding, dilation, groups, sparse)


def check(scores, weight, bias) -> None:
    """ValueError for what cannot be honoured; what a convolution refuses torch names."""
    if scores.dim() not in (3, 4) or scores.shape[-1] != scores.shape[-2] or not scores.is_floating_point():
        raise ValueError(
            f"multi_token_attention: scores must be floats (B, C_in, L, L), got {scores.dtype} {tuple(scores.shape)}"
        )
    if weight.dim() != 4:
        raise ValueError(f"multi_token_attention: weight must be (C_out, C_in / groups, Kh, Kw), got {weight.shape}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != scores.device:
            raise ValueError(f"multi_token_attention: scores are on {scores.device} and {name} on {tensor.device}")
        if tensor is not None and tensor.dtype != scores.dtype and not torch.is_autocast_enabled(scores.device.type):
            raise ValueError(f"multi_token_attention: scores are {scores.dtype} and {name} {tensor.dtype}")
