"""Manifold-constrained hyper-connections (Xie et al. 2025, mHC, arXiv:2512.24880): the three ops around a layer.

h_pre, h_post, h_res = weights of x (mhc_coeffs)        x_in = sum of h_pre x (mhc_pre)
y = h_res x + h_post layer(x_in) (mhc_post_res)
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from liger_kernel.ops.mhc_coeffs import LigerMHCCoeffsFunction, liger_mhc_coeffs
from liger_kernel.ops.mhc_post_res import LigerMHCPostResFunction, liger_mhc_post_res
from liger_kernel.ops.mhc_pre import LigerMHCPreFunction, liger_mhc_pre

__all__ = [
    "LigerMHCCoeffsFunction", "LigerMHCPostResFunction", "LigerMHCPreFunction", "liger_mhc_apply", "liger_mhc_coeffs",
    "liger_mhc_forward", "liger_mhc_post_res", "liger_mhc_pre",
]  # fmt: skip


def liger_mhc_apply(
    x: torch.Tensor,
    f_out: torch.Tensor,
    h_pre: torch.Tensor,
    h_post: torch.Tensor,
    h_res: torch.Tensor,
    *,
    return_x_in: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The n streams after a layer that gave f_out, like x; with return_x_in also what the layer read, (..., C).

    x (..., n, C), f_out (..., C), h_pre and h_post (..., n), h_res (..., n, n); see `liger_mhc_pre` and
    `liger_mhc_post_res`, whose ValueErrors it raises. h_pre is read only with return_x_in.
    """
    y = liger_mhc_post_res(x, f_out, h_post, h_res)
    return (y, liger_mhc_pre(x, h_pre)) if return_x_in else y


def liger_mhc_forward(
    x: torch.Tensor,
    layer: Callable[[torch.Tensor], torch.Tensor],
    phi: torch.Tensor,
    b: torch.Tensor,
    alpha_pre: torch.Tensor,
    alpha_post: torch.Tensor,
    alpha_res: torch.Tensor,
    *,
    allow_fp32: bool = False,
    tmax: int = 20,
    rms_eps: float = 1e-6,
    pre_eps: float = 0.0,
    sinkhorn_eps: float = 1e-6,
    post_mult: float = 2.0,
    return_coeffs: bool = False,
):
    """A layer (..., C) -> (..., C) between n residual streams x (..., n, C); the result is like x.

    The other arguments, and the ValueErrors, are those of `liger_mhc_coeffs`. With return_coeffs -> (the streams,
    (h_pre, h_post, h_res)).
    """
    coeffs = h_pre, h_post, h_res = liger_mhc_coeffs(
        x, phi, b, alpha_pre, alpha_post, alpha_res, allow_fp32=allow_fp32, tmax=tmax, rms_eps=rms_eps,
        pre_eps=pre_eps, sinkhorn_eps=sinkhorn_eps, post_mult=post_mult,
    )  # fmt: skip
    y = liger_mhc_post_res(x, layer(liger_mhc_pre(x, h_pre)), h_post, h_res)
    return (y, coeffs) if return_coeffs else y
