"""RMSNorm with a scale and a shift from outside, as the blocks of DiT (Peebles & Xie 2023, AdaLN, arXiv:2212.09748).

    y = n * (1 + scale) + shift        n = x * rstd * (offset + w)        rstd = 1 / sqrt(mean(x^2) + eps)
    dx = rstd * (m - x * rstd^2 * mean(m * x))        m = dy * (1 + scale) * (offset + w)
    dw = sum over rows of dy * (1 + scale) * x * rstd
    dscale = sum of dy * n        dshift = sum of dy        each over the rows that share a scale

Shapes    x, y: (..., N), seen as R rows of N; w: (N,) or None; rstd: (R,) in fp32; scale, shift: (N,) for all rows,
          (B, N) or (B, 1, N) for x (B, T, N), x's shape, or (M, N) for x (R, N), each for R / M rows that follow.
Numerics  "llama": x * rstd in fp32, rounded to x's dtype, the rest in fp32. "gemma": all in fp32. Both are cast once at
          the end. "none": every step in x's dtype. dw, dscale and dshift are summed in fp32.
Memory    keeps x, w, scale and rstd for backward; in_place=True may write dx over dy.
Needs     one device.
"""

from __future__ import annotations

import math

import torch

from liger_kernel.ops.compat import modulated_rms_norm_backward, modulated_rms_norm_forward  # noqa: F401
from liger_kernel.ops.core import Case, Contract, Kernels, kernels, outputs, upcast, wide
from liger_kernel.ops.rms_norm import check as check_norm

# Reference


def reference(x, w, scale, shift=None, eps=1e-6, offset=0.0, casting_mode="llama"):
    """The same mathematics in plain torch, differentiable: the oracle of the tests."""
    dtype, run = x.dtype, rows_each(x, scale, "scale")
    lift = (lambda t: t) if casting_mode == "none" else upcast
    scale, shift = (None if t is None else _each_row(lift(t), run).view(x.shape) for t in (scale, shift))
    x = lift(x)
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    if casting_mode == "llama":
        y = lift(y.to(dtype))
    if w is not None:
        y = y * (offset + lift(w))
    y = y * (1 + scale)
    return (y if shift is None else y + shift).to(dtype)


def _each_row(modulation, run):
    return as_table(modulation).repeat_interleave(run, 0)


# Torch pair


def _runs(x, scale):
    """x as (M, rows that share a scale, N)."""
    return x.view(scale.shape[0], x[..., 0].numel() // max(1, scale.shape[0]), x.shape[-1])


def _forward(x, w, scale, shift, run, eps, offset, casting_mode):
    lift = (lambda t: t) if casting_mode == "none" else upcast
    work = lift(x)
    rstd = work.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
    y = work * rstd
    if casting_mode == "llama":
        y = lift(y.to(x.dtype))
    if w is not None:
        y = y * (lift(w) + offset if offset else lift(w))
    y = _runs(y, scale) * (1 + lift(scale))[:, None]
    if shift is not None:
        y = y + lift(shift)[:, None]
    if work.dtype != wide(rstd.dtype):  # a rounded rstd is fit for y, not for the backward
        rstd = upcast(x).pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
    return y.view(x.shape).to(x.dtype), rstd.flatten()


def _backward(dy, x, w, scale, shift, rstd, run, offset, casting_mode, in_place, needs):
    needs_dw, needs_dscale, needs_dshift = needs
    factor = None if w is None else upcast(w) + offset
    grad, x_hat = upcast(dy), upcast(x) * rstd.view(*x.shape[:-1], 1)
    dw = dscale = None
    if needs_dw or needs_dscale:
        shown = x_hat if casting_mode == "gemma" else upcast(x_hat.to(x.dtype))
        product = _runs(grad * shown, scale).sum(1)  # dscale but for the weight, and dw but for the scale
        if needs_dscale:
            dscale = (product if factor is None else product * factor).to(scale.dtype)
        if needs_dw and w is not None:
            dw = product.mul_(1 + upcast(scale)).sum(0).to(w.dtype)
    dshift = _runs(grad, scale).sum(1).to(shift.dtype) if needs_dshift and shift is not None else None
    m = (_runs(grad, scale) * (1 + upcast(scale))[:, None]).view(x.shape)
    if factor is not None:
        m = m.mul_(factor)
    mean = (m * x_hat).mean(-1, keepdim=True) if x.numel() else m
    dx = m.sub_(x_hat.mul_(mean)).mul_(rstd.view(*x.shape[:-1], 1))
    return dx.to(x.dtype), dw, dscale, dshift


TORCH = Kernels(_forward, _backward)


# Autograd


class LigerModulatedRMSNormFunction(torch.autograd.Function):
    """apply(X, W, scale, shift, eps, offset=0.0, casting_mode="llama", in_place=True) -> Y; W and shift may be None."""

    @staticmethod
    def forward(ctx, X, W, scale, shift, eps, offset=0.0, casting_mode="llama", in_place=True):
        casting_mode, run = check(X, W, scale, shift, casting_mode)
        ctx.shapes = scale.shape, None if shift is None else shift.shape
        X, W = X.contiguous(), None if W is None else W.contiguous()
        scale, shift = as_table(scale), None if shift is None else as_table(shift)
        y, rstd = kernels("modulated_rms_norm", X).forward(X, W, scale, shift, run, eps, offset, casting_mode)
        ctx.save_for_backward(X, W, scale, shift if ctx.needs_input_grad[3] else None, rstd)
        ctx.options = run, offset, casting_mode, in_place
        return outputs(y)

    @staticmethod
    def backward(ctx, dY):
        *saved, rstd = ctx.saved_tensors
        pair = kernels("modulated_rms_norm", saved[0])
        grads = pair.backward(dY.contiguous(), *saved, rstd, *ctx.options, ctx.needs_input_grad[1:4])
        dX, dW, dScale, dShift = grads
        shaped = [None if d is None else d.view(shape) for d, shape in zip((dScale, dShift), ctx.shapes)]
        return dX, dW, *shaped, *[None] * 4


# Functional


def liger_modulated_rms_norm(
    X: torch.Tensor,
    W: torch.Tensor | None,
    scale: torch.Tensor,
    shift: torch.Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    casting_mode: str = "llama",
    in_place: bool = True,
) -> torch.Tensor:
    """rms_norm(X, W) * (1 + scale) + shift for X (..., N), any float dtype, W (N,) or None; the result is like X.

    scale, and shift where it is given: (N,) for all rows, (B, N) or (B, 1, N) for the items of X (B, T, N), X's shape,
    or (M, N) for X (R, N), each of M for the R / M rows that follow. casting_mode: "llama", "gemma" or "none" (see the
    module's Numerics). in_place=True permits the backward to write dX over the incoming gradient.
    Raises ValueError for an unknown casting_mode, for a weight, scale or shift that does not fit X or is on another
    device, and for a shift that is shared by other rows than the scale.
    """
    return LigerModulatedRMSNormFunction.apply(X, W, scale, shift, eps, offset, casting_mode, in_place)


def as_table(modulation):
    """(M, N) contiguous."""
    return modulation.reshape(math.prod(modulation.shape[:-1]), modulation.shape[-1]).contiguous()


def rows_each(x, modulation, name):
    """How many rows of x that follow each other share one row of a scale or shift; ValueError where they do not."""
    own, lead = x.shape[:-1], modulation.shape[:-1]
    rows, count = math.prod(own), math.prod(lead)
    while lead and lead[-1] == 1:
        lead = lead[:-1]
    if (
        modulation.shape[-1:] != x.shape[-1:]
        or lead != own[: len(lead)]
        and (x.dim() != 2 or not count or rows % count)
    ):
        raise ValueError(
            f"modulated_rms_norm: {name} of shape {tuple(modulation.shape)} does not fit x of shape {tuple(x.shape)}: "
            f"it must be (N,), or have the first dimensions of x and N, or be (M, N) where x is (R, N) and M divides R"
        )
    return rows // max(1, count)


def check(x, w, scale, shift, casting_mode):
    """(casting_mode as its name, rows that share a scale); ValueError for what cannot be honoured."""
    casting_mode = check_norm(x, w, casting_mode, "modulated_rms_norm")
    run = rows_each(x, scale, "scale")
    if shift is not None and (other := rows_each(x, shift, "shift")) != run:
        raise ValueError(f"modulated_rms_norm: {run} rows share a scale and {other} a shift")
    for name, p in (("scale", scale), ("shift", shift)):
        if p is not None and p.device != x.device:
            raise ValueError(f"modulated_rms_norm: x is on {x.device} and the {name} on {p.device}")
    return casting_mode, run


# Contract


def _case(shape, dtype, device, lead=None, affine=True, shifted=True, **options):
    modulation = (*(shape[:-1] if lead is None else lead), shape[-1])
    x, w, scale, shift = (
        torch.randn(s, dtype=dtype, device=device) for s in (shape, shape[-1], modulation, modulation)
    )
    return Case((x, w if affine else None, scale, shift if shifted else None), options)


def _cases(dtype, device):
    modes = ({"casting_mode": "llama"}, {"casting_mode": "gemma", "offset": 1.0}, {"casting_mode": "none"})
    shapes = (  # a shape, and what each scale is for: a row, an item, all
        ((2, 5, 64), None), ((3, 7, 41), (3,)), ((3, 7, 41), ()), ((2, 9, 33), (2, 1)), ((0, 8), None),
        ((12, 20), (4,)), ((0, 3, 8), ()),
    )  # fmt: skip
    cases = [_case(s, dtype, device, lead, **mode) for s, lead in shapes for mode in modes]
    cases += [_case((3, 20000), dtype, device, lead) for lead in (None, ())]  # these need the column loop
    cases += [_case((6, 33), dtype, device, lead, affine=False, shifted=False) for lead in (None, ())]
    # One column is its own root mean square: its gradient is what eps leaves of a difference, so eps is large there.
    return [*cases, _case((1, 1), dtype, device, eps=1.0)]


def _timed(dtype, device):
    shapes = {"8x2048x4096 per row": None, "8x2048x4096 per item": (8,), "32x1024x1152 per item": (32,)}
    sized = {label: tuple(map(int, label.split(" ")[0].split("x"))) for label in shapes}
    timed = {label: _case(sized[label], dtype, device, lead) for label, lead in shapes.items()}
    return timed | {"2048x32768 for all": _case((2048, 32768), dtype, device, ())}


def _bytes_moved(x, w, scale, shift, **options):
    return (5 * x.numel() + 3 * scale.numel() + (0 if shift is None else 2 * shift.numel())) * x.element_size()


CONTRACT = Contract(
    call=lambda x, w, scale, shift=None, eps=1e-6, offset=0.0, casting_mode="llama": (
        LigerModulatedRMSNormFunction.apply(x, w, scale, shift, eps, offset, casting_mode, False)
    ),
    reference=reference,
    cases=_cases,
    timed=_timed,
    bytes_moved=_bytes_moved,
)
