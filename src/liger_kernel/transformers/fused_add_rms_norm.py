"""Residual add and RMSNorm as one module."""

from __future__ import annotations

from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
from liger_kernel.transformers.rms_norm import LigerRMSNorm


class LigerFusedAddRMSNorm(LigerRMSNorm):
    """(hidden_states, residual), both (..., hidden_size) -> (RMSNorm of their sum, their sum).

    casting_mode, offset, init_fn and in_place are LigerRMSNorm's. Raises ValueError for what it raises it for, and for
    two inputs of different shapes or devices.
    """

    def __init__(self, hidden_size, eps=1e-6, offset=0.0, casting_mode="llama", init_fn="ones", in_place=False):
        super().__init__(hidden_size, eps, offset, casting_mode, init_fn, in_place)

    def forward(self, hidden_states, residual):
        return LigerFusedAddRMSNormFunction.apply(
            hidden_states,
            residual,
            self.weight,
            self.variance_epsilon,
            self.offset,
            self.casting_mode,
            self.in_place,
        )
