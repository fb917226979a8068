"""A gated MLP as one function of its input and weights, without biases.

y = down(silu(gate(x) * m0) * up(x)) * m1
"""

from __future__ import annotations

from torch.nn import functional as F

from liger_kernel.ops.swiglu import LigerSiLUMulFunction


class LigerMLPFunction:
    """apply(input, gate_weight, up_weight, down_weight, gate_multiplier=1.0, down_multiplier=1.0) -> y.

    input (..., H), gate_weight and up_weight (I, H), down_weight (H, I). Raises ValueError where gate and up differ.
    """

    @staticmethod
    def apply(input, gate_weight, up_weight, down_weight, gate_multiplier=1.0, down_multiplier=1.0):
        gate, up = F.linear(input, gate_weight), F.linear(input, up_weight)
        y = F.linear(LigerSiLUMulFunction.apply(gate, up, gate_multiplier), down_weight)
        return y if down_multiplier == 1.0 else y * down_multiplier
