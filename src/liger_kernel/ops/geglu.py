"""GEGLU's elementwise half (Shazeer 2020, arXiv:2002.05202): a gate through GELU times the other branch.

    c = gelu(a) * b        da = dc * b * gelu'(a)        db = dc * gelu(a)
    "tanh": gelu(x) = x * (1 + tanh(u)) / 2, u = sqrt(2 / pi) * (x + 0.044715 * x^3)
    "none": gelu(x) = x * (1 + erf(x / sqrt(2))) / 2                (Hendrycks & Gimpel 2016, arXiv:1606.08415)

Shapes    a, b, c: (...), one shape.
Numerics  forward rounds gelu and then the product to the dtype, as transformers does; backward of the kernels is fp32
          with one cast at the end.
Memory    keeps a and b and recomputes gelu; da and db lie over them where nobody else holds them.
Needs     a and b of one dtype on one device.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from liger_kernel.ops.compat import geglu_backward, geglu_forward  # noqa: F401  upstream's helper signatures
from liger_kernel.ops.core import Case, Contract, Kernels, kernels, outputs
from liger_kernel.ops.spare import spare
from liger_kernel.ops.swiglu import check as check_gated

APPROXIMATIONS = ("tanh", "none")


# Reference


def reference(a, b, approximate="tanh"):
    """The same mathematics in plain torch, differentiable: the oracle of the tests."""
    return F.gelu(a, approximate=approximate) * b


# Torch pair


def _forward(a, b, approximate):
    return F.gelu(a, approximate=approximate).mul_(b)


def _backward(dc, a, b, approximate, in_place=False):
    da = dc * b
    gelu = functools.partial(torch.ops.aten.gelu.out, out=b) if in_place else F.gelu
    db = gelu(a, approximate=approximate).mul_(dc)
    found = a if in_place else da
    return torch.ops.aten.gelu_backward.grad_input(da, a, approximate=approximate, grad_input=found), db


TORCH = Kernels(_forward, _backward)


# Autograd


class LigerGELUMulFunction(torch.autograd.Function):
    """apply(a, b, approximate="tanh") -> c. approximate: "tanh", or "none" for the exact GELU."""

    @staticmethod
    def forward(ctx, a, b, approximate="tanh"):
        check(a, b, approximate)
        a, b = a.contiguous(), b.contiguous()
        ctx.save_for_backward(a, b)
        ctx.approximate = approximate
        return outputs(kernels("geglu", a).forward(a, b, approximate))

    @staticmethod
    def backward(ctx, dc):
        a, b = saved = ctx.saved_tensors
        over = spare(saved)
        return *kernels("geglu", a).backward(dc.contiguous(), a, b, ctx.approximate, over), None


# Functional


def liger_geglu(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """gelu(a) * b, the tanh form, for a and b of one shape, float dtype and device; the result is like a.

    Raises ValueError where shapes, dtypes or devices differ. LigerGELUMulFunction has the exact form too.
    """
    return LigerGELUMulFunction.apply(a, b)


def check(a, b, approximate):
    """ValueError for what cannot be honoured."""
    if approximate not in APPROXIMATIONS:
        raise ValueError(f"geglu: approximate must be one of {list(APPROXIMATIONS)}, got {approximate!r}")
    check_gated(a, b, "geglu")


# Contract


def _case(shape, dtype, device, **options):
    a, b = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    return Case((a, b), options)


def _cases(dtype, device):
    shapes = ((2, 16, 64), (9, 7, 41), (1, 1), (0, 8), (3, 2101), (5,))
    return [_case(s, dtype, device, approximate=form) for s in shapes for form in APPROXIMATIONS]


def _timed(dtype, device):
    shapes = ((8192, 14336), (32768, 4864), (8192, 28672))
    cases = {f"{rows}x{cols}": _case((rows, cols), dtype, device) for rows, cols in shapes}
    return cases | {"8192x14336 exact": _case((8192, 14336), dtype, device, approximate="none")}


CONTRACT = Contract(
    call=lambda a, b, approximate="tanh": LigerGELUMulFunction.apply(a, b, approximate),
    reference=reference,
    cases=_cases,
    timed=_timed,
    bytes_moved=lambda a, b, **options: 8 * a.numel() * a.element_size(),
)
