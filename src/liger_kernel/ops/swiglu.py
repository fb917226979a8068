"""SwiGLU's elementwise half (Shazeer 2020, arXiv:2002.05202): a gate through SiLU times the other branch.

    c = silu(gate_multiplier * a) * b * down_multiplier        silu(x) = x * sigmoid(x)
    da = dc * b * down_multiplier * silu'(gate_multiplier * a) * gate_multiplier
    db = dc * silu(gate_multiplier * a) * down_multiplier      silu'(x) = s + x * s * (1 - s), s = sigmoid(x)

Shapes    a, b, c: (...), one shape. Packed: y (..., 2I) holds a, then b, in its last dim; c (..., I).
Numerics  forward rounds to the dtype where transformers does: gate_multiplier * a, silu, the product, down_multiplier.
          backward of the kernels is fp32 with one cast at the end.
Memory    keeps a and b (or y) and recomputes silu; da and db lie over them where nobody else holds them.
Needs     a and b of one dtype on one device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from liger_kernel.ops.compat import (  # noqa: F401  upstream's helper signatures
    swiglu_backward,
    swiglu_forward,
    swiglu_fused_gate_up_backward,
    swiglu_fused_gate_up_forward,
)
from liger_kernel.ops.core import Case, Contract, Kernels, kernels, outputs
from liger_kernel.ops.spare import spare

# Reference


def reference(a, b=None, gate_multiplier=1.0, down_multiplier=1.0):
    """The same mathematics in plain torch, differentiable: the oracle of the tests. b=None: a is packed."""
    if b is None:
        a, b = a.chunk(2, -1)
    return F.silu(a * gate_multiplier) * b * down_multiplier


# Torch pair


def _forward(a, b, gate_multiplier, down_multiplier):
    if b is None:
        a, b = a.chunk(2, -1)
    c = F.silu(a if gate_multiplier == 1.0 else a * gate_multiplier).mul_(b)
    return c if down_multiplier == 1.0 else c.mul_(down_multiplier)


def _backward(dc, a, b, gate_multiplier, down_multiplier, in_place=False):
    if b is None:
        dy = torch.empty_like(a)
        for half, grad in zip(dy.chunk(2, -1), _gradients(dc, *a.chunk(2, -1)), strict=True):
            half.copy_(grad)
        return dy, None
    if down_multiplier != 1.0:
        dc = dc * down_multiplier
    if gate_multiplier == 1.0:
        return _gradients(dc, a, b, in_place)
    da, db = _gradients(dc, a * gate_multiplier, b)
    return da.mul_(gate_multiplier), db


def _gradients(dc, a, b, in_place=False):
    da = dc * b
    db = (torch.ops.aten.silu.out(a, out=b) if in_place else F.silu(a)).mul_(dc)
    return torch.ops.aten.silu_backward.grad_input(da, a, grad_input=a if in_place else da), db


TORCH = Kernels(_forward, _backward)


# Autograd


class LigerSiLUMulFunction(torch.autograd.Function):
    """apply(a, b, gate_multiplier=1.0, down_multiplier=1.0) -> c."""

    @staticmethod
    def forward(ctx, a, b, gate_multiplier=1.0, down_multiplier=1.0):
        check(a, b)
        a, b = a.contiguous(), b.contiguous()
        ctx.save_for_backward(a, b)
        ctx.options = gate_multiplier, down_multiplier
        return outputs(kernels("swiglu", a).forward(a, b, *ctx.options))

    @staticmethod
    def backward(ctx, dc):
        a, b = saved = ctx.saved_tensors
        over = spare(saved)
        return *kernels("swiglu", a).backward(dc.contiguous(), a, b, *ctx.options, over), None, None


class LigerFusedGateUpSiLUMulFunction(torch.autograd.Function):
    """apply(y, in_place=False) -> c (..., I) of y (..., 2I), the gate in its first half.

    in_place=True permits the backward to write dy over y: y must then not be read again, and backward runs once.
    """

    @staticmethod
    def forward(ctx, y, in_place=False):
        check_packed(y)
        y = y.contiguous()
        ctx.save_for_backward(y)
        ctx.in_place = in_place
        return outputs(kernels("swiglu", y).forward(y, None, 1.0, 1.0))

    @staticmethod
    def backward(ctx, dc):
        (y,) = saved = ctx.saved_tensors
        over = ctx.in_place or spare(saved)
        return kernels("swiglu", y).backward(dc.contiguous(), y, None, 1.0, 1.0, over)[0], None


# Functional


def liger_swiglu(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """silu(a) * b for a and b of one shape, float dtype and device; the result is like a.

    Raises ValueError where shapes, dtypes or devices differ.
    """
    return LigerSiLUMulFunction.apply(a, b)


def check(a, b, op="swiglu"):
    """ValueError for what cannot be honoured."""
    if a.shape != b.shape:
        raise ValueError(f"{op}: a of shape {tuple(a.shape)} and b of shape {tuple(b.shape)} must have one shape")
    if a.dtype != b.dtype or not a.is_floating_point():
        raise ValueError(f"{op}: a and b must have one float dtype, got {a.dtype} and {b.dtype}")
    if a.device != b.device:
        raise ValueError(f"{op}: a is on {a.device} and b on {b.device}")


def check_packed(y):
    """ValueError for what cannot be honoured."""
    if not y.dim() or y.shape[-1] % 2:
        raise ValueError(f"swiglu: a packed gate and up need an even last dim, got shape {tuple(y.shape)}")
    if not y.is_floating_point():
        raise ValueError(f"swiglu: y must have a float dtype, got {y.dtype}")


# Contract


def _call(a, b=None, gate_multiplier=1.0, down_multiplier=1.0):
    if b is None:
        return LigerFusedGateUpSiLUMulFunction.apply(a)
    return LigerSiLUMulFunction.apply(a, b, gate_multiplier, down_multiplier)


def _case(shape, dtype, device, packed=False, **options):
    a = torch.randn(*shape[:-1], shape[-1] * (2 if packed else 1), dtype=dtype, device=device)
    return Case((a, None if packed else torch.randn(shape, dtype=dtype, device=device)), options)


def _cases(dtype, device):
    multipliers = dict(gate_multiplier=0.3, down_multiplier=2.5)
    shapes = ((2, 16, 64), (9, 7, 41), (1, 1), (0, 8), (3, 2101), (5,))
    forms = (dict(), dict(packed=True), multipliers)
    return [_case(s, dtype, device, **form) for s in shapes for form in forms]


def _timed(dtype, device):
    shapes = ((8192, 14336), (32768, 4864), (8192, 28672), (65536, 768))
    cases = {f"{rows}x{cols}": _case((rows, cols), dtype, device) for rows, cols in shapes}
    return cases | {"8192x14336 packed": _case((8192, 14336), dtype, device, packed=True)}


CONTRACT = Contract(
    call=_call,
    reference=reference,
    cases=_cases,
    timed=_timed,
    bytes_moved=lambda a, b=None, **options: 8 * a.numel() * a.element_size() // (2 if b is None else 1),
)
