"""Modulated RMSNorm as a module."""

from __future__ import annotations

from liger_kernel.ops.modulated_rms_norm import LigerModulatedRMSNormFunction
from liger_kernel.transformers.rms_norm import LigerRMSNorm


class LigerModulatedRMSNorm(LigerRMSNorm):
    """rms_norm(hidden_states) * (1 + scale) + shift, (..., hidden_size) -> the same shape and dtype (arXiv:2212.09748).

    scale and shift are arguments of forward: (hidden_size,), (B, hidden_size) for an input (B, T, hidden_size), or like
    the input. The constructor's arguments, and what they raise, are those of LigerRMSNorm.
    """

    def __init__(
        self,
        hidden_size,
        eps=1e-6,
        offset=0.0,
        casting_mode="llama",
        init_fn="ones",
        in_place=True,
        elementwise_affine=True,
    ):
        super().__init__(
            hidden_size, eps, offset, casting_mode, init_fn, in_place, elementwise_affine=elementwise_affine
        )

    def forward(self, hidden_states, scale, shift=None):
        return LigerModulatedRMSNormFunction.apply(
            hidden_states,
            self.weight,
            scale,
            shift,
            self.variance_epsilon,
            self.offset,
            self.casting_mode,
            self.in_place,
        )
