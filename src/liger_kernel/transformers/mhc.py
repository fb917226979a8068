"""Manifold-constrained hyper-connections as a module around a layer."""

from __future__ import annotations

import torch
from torch import nn

from liger_kernel.ops.mhc import liger_mhc_forward

INITIAL_ALPHA = 0.01


class LigerMHC(nn.Module):
    """A layer (..., c) -> (..., c) between hc residual streams, (..., hc, c) -> the same shape and dtype.

    See `liger_mhc_coeffs` for the formulas of mHC (arXiv:2512.24880) and for tmax, the eps and post_mult. Parameters:
    those of the layer; phi (hc * c, 2 hc + hc^2) in phi_dtype, normal with a deviation of 0.02; b, zeros, and the three
    alphas, 0.01, in fp32. So at first every stream reads, writes and mixes alike.
    Raises ValueError for an hc, c or tmax below 1; forward does as `liger_mhc_coeffs`: an x in fp32 needs allow_fp32.
    """

    def __init__(
        self,
        layer,
        *,
        hc,
        c,
        tmax=20,
        rms_eps=1e-6,
        pre_eps=0.0,
        sinkhorn_eps=1e-6,
        post_mult=2.0,
        phi_dtype=torch.float16,
        allow_fp32=False,
    ):
        super().__init__()
        for name, value in (("hc", hc), ("c", c), ("tmax", tmax)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value!r}")
        self.layer, self.hc, self.c = layer, hc, c
        self.options = dict(
            allow_fp32=allow_fp32,
            tmax=tmax,
            rms_eps=rms_eps,
            pre_eps=pre_eps,
            sinkhorn_eps=sinkhorn_eps,
            post_mult=post_mult,
        )
        size = 2 * hc + hc * hc
        self.phi = nn.Parameter((torch.randn(hc * c, size) * 0.02).to(phi_dtype))
        self.b = nn.Parameter(torch.zeros(size))
        self.alpha_pre, self.alpha_post, self.alpha_res = (nn.Parameter(torch.tensor(INITIAL_ALPHA)) for _ in range(3))

    def forward(self, x):
        alphas = self.alpha_pre, self.alpha_post, self.alpha_res
        return liger_mhc_forward(x, self.layer, self.phi, self.b, *alphas, **self.options)

    def extra_repr(self):
        return ", ".join(f"{name}={value}" for name, value in dict(hc=self.hc, c=self.c, **self.options).items())
