"""The sum of weighted streams in Triton; the mathematics is in liger_kernel.ops.mhc_pre."""

from liger_kernel.ops.core import Kernels
from liger_kernel.ops.kernels.mhc_streams import mix_backward, mix_forward

# Launchers


def mhc_pre_forward(x, h, streams=None):
    """x: (R, n, C), h: (R, n), contiguous -> (R, C) like x."""
    return mix_forward(x, h[:, None], streams=streams)[:, 0]


def mhc_pre_backward(dout, x, h, streams=None):
    """dout: (R, C), contiguous -> dx like x, dh like h."""
    dx, dh, _, _ = mix_backward(dout[:, None], x, h[:, None], streams=streams)
    return dx, dh[:, 0]


KERNELS = Kernels(mhc_pre_forward, mhc_pre_backward)
