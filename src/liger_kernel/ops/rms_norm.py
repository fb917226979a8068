"""RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467).

    y = x * rstd * (offset + w)        rstd = 1 / sqrt(mean(x^2) + eps)
    dx = rstd * (m - x * rstd^2 * mean(m * x))        m = dy * (offset + w)
    dw = sum over rows of dy * x * rstd

Shapes    x, y: (..., N), seen as R rows of N; w: (N,) or None; rstd: (R,) in fp32.
Numerics  "llama": x * rstd in fp32, rounded to x's dtype, then times the weight. "gemma": all in fp32, cast once at
          the end. "none": every step in x's dtype. dw is summed in fp32. torch.compile rounds fewer of the steps.
Memory    keeps x, w and rstd for backward; in_place=True may write dx over dy.
Needs     x and w on one device.
"""

from __future__ import annotations

import torch
from packaging.version import Version

from liger_kernel.backends import device_of
from liger_kernel.ops.compat import rms_norm_backward, rms_norm_forward  # noqa: F401  upstream's helper signatures
from liger_kernel.ops.core import Case, Contract, Kernels, forced, kernels, outputs, sum_rows, upcast, wide

CASTING = {"none": -1, "llama": 0, "gemma": 1}


# Reference


def reference(x, w=None, eps=1e-6, offset=0.0, casting_mode="llama", out_dtype=None):
    """The same mathematics in plain torch, differentiable: the oracle of the tests."""
    dtype = x.dtype
    if casting_mode != "none":
        x = upcast(x)
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    if casting_mode == "llama":
        y = y.to(dtype)
    if w is not None:
        y = y * (offset + (upcast(w) if casting_mode == "gemma" else w))
    return y.to(out_dtype or dtype)


# Torch pair


def _forward(x, w, eps, offset, casting_mode, out_dtype):
    work = x if casting_mode == "none" else upcast(x)
    rstd = work.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
    y = work * rstd
    if casting_mode == "llama":
        y = y.to(x.dtype)
    if w is not None:
        scale = upcast(w) if casting_mode == "gemma" else w
        y = y * (scale + offset if offset else scale)
    if work.dtype != wide(rstd.dtype):  # a rounded rstd is fit for y, not for the backward
        rstd = upcast(x).pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
    return y.to(out_dtype), rstd.flatten()


def _backward(dy, x, w, rstd, offset, casting_mode, in_place, needs_dw, ds=None):
    rstd = rstd.view(*x.shape[:-1], 1)
    m = dy_wide = upcast(dy)
    if w is not None:
        m = dy_wide * (upcast(w) + offset)
    x_hat = upcast(x) * rstd
    dw = None
    if needs_dw and w is not None:
        scaled = x_hat if casting_mode == "gemma" else upcast(x_hat.to(x.dtype))
        dw = sum_rows(dy_wide * scaled).to(w.dtype)
    mean = (m * x_hat).mean(-1, keepdim=True) if x.numel() else m
    dx = torch.addcmul(m, x_hat, mean, value=-1).mul_(rstd)
    if ds is not None:
        dx += ds
    return dx.to(x.dtype), dw


TORCH = Kernels(_forward, _backward)

# torch.compile merges a norm with the additions of the residual before and after it, from which a kernel would cut it
# off: 5.5 ms of a LLaMA-1B step for 7.7 (H200, torch 2.11, profile of 2026-11-29; in its tables 16384x4096 with one
# addition takes 0.308 ms merged, ours 0.184 and two additions 0.09 each). Of wider rows its kernel takes more than all
# of that: 8192x8192 alone 0.320 ms, ours 0.181.
MERGED_COLUMNS = 4096
_MERGES = torch.version.cuda is not None and Version(torch.__version__) >= Version("2.11")


def _pair(x) -> Kernels:
    """What runs on a tensor like x; under torch.compile the torch pair where that is faster and none was asked for."""
    pair = kernels("rms_norm", x)
    if not (torch.compiler.is_compiling() and _MERGES and x.is_cuda and x.shape[-1] <= MERGED_COLUMNS):
        return pair
    return pair if forced() or "rms_norm" in device_of(x.device).overrides else TORCH


# Autograd


class LigerRMSNormFunction(torch.autograd.Function):
    """apply(X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None, out_dtype=None) -> y.

    row_mode is accepted for upstream's sake and has no effect: the launch tables choose the rows of a program.
    """

    @staticmethod
    def forward(ctx, X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None, out_dtype=None):
        casting_mode = check(X, W, casting_mode)
        X, W = X.contiguous(), None if W is None else W.contiguous()
        y, rstd = _pair(X).forward(X, W, eps, offset, casting_mode, out_dtype or X.dtype)
        ctx.save_for_backward(X, W, rstd)
        ctx.options = offset, casting_mode, in_place
        return outputs(y)

    @staticmethod
    def backward(ctx, dY):
        X, W, rstd = ctx.saved_tensors
        dX, dW = _pair(X).backward(dY.contiguous(), X, W, rstd, *ctx.options, ctx.needs_input_grad[1])
        return dX, dW, *[None] * 6


# Functional


def liger_rms_norm(
    X: torch.Tensor,
    W: torch.Tensor | None,
    eps: float,
    offset: float = 0.0,
    casting_mode: str = "llama",
    in_place: bool = True,
) -> torch.Tensor:
    """RMSNorm of the last dim of X (..., N), any float dtype, with weight W (N,) or None; the result is like X.

    casting_mode: "llama", "gemma" or "none" (see the module's Numerics). in_place=True permits the backward to write
    dX over the incoming gradient: pass False where that gradient is shared, as with a residual.
    Raises ValueError for an unknown casting_mode and a weight of another length or on another device.
    """
    return LigerRMSNormFunction.apply(X, W, eps, offset, casting_mode, in_place)


def check(x, w, casting_mode, op="rms_norm"):
    """casting_mode as its name; ValueError for what cannot be honoured."""
    if casting_mode not in CASTING:
        names = {number: name for name, number in CASTING.items()}
        if casting_mode not in names:
            raise ValueError(f"casting_mode must be one of {sorted(CASTING)}, got {casting_mode!r}")
        casting_mode = names[casting_mode]
    if not x.is_floating_point():
        raise ValueError(f"{op}: x must be of a floating dtype, got {x.dtype}")
    if w is not None:
        if w.shape != x.shape[-1:]:
            raise ValueError(f"{op}: weight of shape {tuple(w.shape)} does not fit rows of {x.shape[-1]}")
        if w.device != x.device:
            raise ValueError(f"{op}: x is on {x.device} and the weight on {w.device}")
    return casting_mode


# Contract


def _case(shape, dtype, device, affine=True, **options):
    x = torch.randn(shape, dtype=dtype, device=device)
    return Case((x, torch.randn(shape[-1], dtype=dtype, device=device) if affine else None), options)


def _cases(dtype, device):
    modes = ({"casting_mode": "llama"}, {"casting_mode": "gemma", "offset": 1.0}, {"casting_mode": "none"})
    shapes = ((2, 16, 64), (9, 7, 41), (1, 1), (0, 8), (3, 40000))  # the last needs the column loop
    # One column is its own root mean square: its gradient is what eps leaves of a difference, so eps is large there.
    eps = {(1, 1): 1.0}
    flags = [(affine, mode) for affine in (True, False) for mode in modes]
    return [_case(s, dtype, device, affine, eps=eps.get(s, 1e-6), **mode) for s in shapes for affine, mode in flags]


def _timed(dtype, device):
    shapes = ((16384, 4096), (8192, 8192), (65536, 1024), (1048576, 128), (128, 1024), (2048, 65536), (512, 262144))
    return {f"{rows}x{cols}": _case((rows, cols), dtype, device) for rows, cols in shapes}


CONTRACT = Contract(
    call=lambda x, w, eps=1e-6, offset=0.0, casting_mode="llama": LigerRMSNormFunction.apply(
        x, w, eps, offset, casting_mode, False
    ),
    reference=reference,
    cases=_cases,
    timed=_timed,
    bytes_moved=lambda x, w, **options: 5 * x.numel() * x.element_size(),
)
