"""Upstream's helper functions under their own signatures, on top of the pairs: what other projects import from a room.

The values upstream returns for its launch (BLOCK_SIZE, num_warps) are None here; backward accepts and ignores them.
"""

from __future__ import annotations

from liger_kernel.ops.core import kernels

# rms_norm


def rms_norm_forward(X, W, eps, offset, casting_mode, row_mode=None):
    """-> (Y, X, RSTD, BLOCK_SIZE, num_warps, casting_mode as an int)."""
    from liger_kernel.ops.rms_norm import CASTING, check

    casting_mode = check(X, W, casting_mode)
    X = X.contiguous()
    y, rstd = kernels("rms_norm", X).forward(X, W, eps, offset, casting_mode, X.dtype)
    return y, X, rstd, None, None, CASTING[casting_mode]


def rms_norm_backward(
    dY, X, W, RSTD, offset, casting_mode, BLOCK_SIZE, num_warps, in_place, row_mode=None, needs_dw=None
):
    """-> (dX, dW); dW is None without a weight or with needs_dw=False."""
    from liger_kernel.ops.rms_norm import check

    casting_mode = check(X, W, casting_mode)
    wanted = W is not None if needs_dw is None else needs_dw
    return kernels("rms_norm", X).backward(dY.contiguous(), X, W, RSTD, offset, casting_mode, in_place, wanted)
