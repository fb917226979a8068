"""Mixed streams and a layer's output in Triton; the mathematics is in liger_kernel.ops.mhc_post_res."""

from liger_kernel.ops.core import Kernels
from liger_kernel.ops.kernels.mhc_streams import mix_backward, mix_forward

# Launchers


def mhc_post_res_forward(x, f, h_post, h_res, streams=None):
    """x: (R, n, C), f: (R, C), h_post: (R, n), h_res: (R, n, n), contiguous -> y like x."""
    return mix_forward(x, h_res, f, h_post, streams)


def mhc_post_res_backward(dy, x, f, h_post, h_res, streams=None):
    """dy like x, contiguous -> dx, df, dh_post, dh_res, each like its own."""
    dx, dh_res, df, dh_post = mix_backward(dy, x, h_res, f, h_post, streams)
    return dx, df, dh_post, dh_res


KERNELS = Kernels(mhc_post_res_forward, mhc_post_res_backward)
