"""RMSNorm with a gate, as the layers of Mamba2 (Dao & Gu 2024, arXiv:2405.21060) and Gated DeltaNet (arXiv:2412.06464).

    y = h * rstd * w * b        rstd = 1 / sqrt(mean(h^2) + eps)
    gate first: h = x * act(gate), b = 1        norm first: h = x, b = act(gate)
    dh = rstd * (m - h * rstd^2 * mean(m * h))        m = dy * w * b        dw = sum over rows of dy * b * h * rstd
    gate first: dx = dh * act(gate), dgate = dh * x * act'(gate)
    norm first: dx = dh, dgate = dy * x * rstd * w * act'(gate)

Shapes    x, gate, y: (..., N), seen as R rows; means are over groups of N / G; w: (N,) or None; rstd: (R * G,) in fp32.
Numerics  "llama": h * rstd in fp32, rounded to x's dtype, then times the weight. "gemma": all in fp32, cast once at
          the end. The gate goes through act in fp32 and multiplies fp32. dw is summed in fp32.
Memory    keeps x, gate, w and rstd for backward and recomputes the rest.
Needs     everything on one device; the dtypes of x, gate and w may differ.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from liger_kernel.ops.core import Case, Contract, Kernels, kernels, outputs, sum_rows, upcast, wide

CASTING = ("llama", "gemma")
ACTIVATIONS = {"silu": F.silu, "sigmoid": torch.sigmoid}


# Reference


def reference(
    x, gate, w=None, eps=1e-6, gate_first=False, activation="silu", casting_mode="llama", groups=1, out_dtype=None
):
    """The same mathematics in plain torch, differentiable: the oracle of the tests."""
    h, g = upcast(x), ACTIVATIONS[activation](gate.to(wide(x.dtype)))
    if gate_first:
        h = h * g
    h = h.unflatten(-1, (groups, -1))
    y = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).flatten(-2)
    if casting_mode == "llama":
        y = y.to(x.dtype)
    if w is not None:
        y = y * (upcast(w) if casting_mode == "gemma" else w)
    if not gate_first:
        y = y * g
    return y.to(out_dtype or x.dtype)


# Torch pair


def _forward(x, gate, w, eps, gate_first, activation, casting_mode, groups, out_dtype):
    g = ACTIVATIONS[activation](gate.to(wide(x.dtype)))
    h = g.mul_(x) if gate_first else upcast(x)
    h = h.unflatten(-1, (groups, -1))
    rstd = h.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
    y = (h * rstd).flatten(-2)
    if casting_mode == "llama":
        y = y.to(x.dtype)
    if w is not None:
        y = y * (upcast(w) if casting_mode == "gemma" else w)
    if not gate_first:
        y = g.mul_(y)
    return y.to(out_dtype), rstd.flatten()


def _backward(dy, x, gate, w, rstd, gate_first, activation, casting_mode, groups, needs_dw):
    rstd = rstd.view(*x.shape[:-1], groups, 1)
    dy, x_wide, g = upcast(dy), upcast(x), gate.to(wide(x.dtype))
    act = ACTIVATIONS[activation](g)
    h = (x_wide * act if gate_first else x_wide).unflatten(-1, (groups, -1))
    x_hat = h * rstd
    dn = dy if gate_first else dy * act
    w_wide = None if w is None else upcast(w)
    m = dn if w is None else dn * w_wide
    dw = None
    if needs_dw and w is not None:
        scaled = x_hat.flatten(-2)
        dw = sum_rows(dn * (scaled if casting_mode == "gemma" else upcast(scaled.to(x.dtype))))
        dw = dw.to(w.dtype)
    m = m.unflatten(-1, (groups, -1))
    mean = (m * x_hat).mean(-1, keepdim=True)
    dh = torch.addcmul(m, x_hat, mean, value=-1).mul_(rstd).flatten(-2)
    if gate_first:
        dact = dh * x_wide
        dh = dh.mul_(act)
    else:
        dact = x_hat.flatten(-2) * dy
        dact = dact if w is None else dact.mul_(w_wide)
    if activation == "silu":
        dgate = torch.ops.aten.silu_backward(dact, g)
    else:
        dgate = torch.ops.aten.sigmoid_backward(dact, act)
    return dh.to(x.dtype), dgate.to(gate.dtype), dw


TORCH = Kernels(_forward, _backward)


# Autograd


class GatedRMSNormFunction(torch.autograd.Function):
    """apply(x, gate, w, eps, gate_first, activation, casting_mode="llama", group_size=None, out_dtype=None) -> y."""

    @staticmethod
    def forward(ctx, x, gate, w, eps, gate_first, activation, casting_mode="llama", group_size=None, out_dtype=None):
        groups = check(x, gate, w, activation, casting_mode, group_size)
        x, gate, w = x.contiguous(), gate.contiguous(), None if w is None else w.contiguous()
        ctx.options = gate_first, activation, casting_mode, groups
        y, rstd = kernels("gated_rms_norm", x).forward(x, gate, w, eps, *ctx.options, out_dtype or x.dtype)
        ctx.save_for_backward(x, gate, w, rstd)
        return outputs(y)

    @staticmethod
    def backward(ctx, dy):
        x, gate, w, rstd = ctx.saved_tensors
        pair = kernels("gated_rms_norm", x)
        grads = pair.backward(dy.contiguous(), x, gate, w, rstd, *ctx.options, ctx.needs_input_grad[2])
        return *grads, *[None] * 6


# Functional


def liger_gated_rms_norm(
    x: torch.Tensor,
    gate: torch.Tensor,
    w: torch.Tensor | None,
    eps: float,
    *,
    gate_first: bool,
    activation: str = "silu",
    casting_mode: str = "llama",
    group_size: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """norm(x * act(gate)) * w with gate_first, else norm(x) * w * act(gate), for x and gate (..., N) of float dtypes.

    The norm is over groups of group_size elements of the last dim (None: all N); w is (N,) or None. activation: "silu"
    or "sigmoid"; casting_mode: "llama" or "gemma" (see the module's Numerics). The result is like x, in out_dtype.
    Raises ValueError for an unknown name, for a gate of another shape, a weight of another length, a group_size that
    does not divide N, and for tensors on different devices.
    """
    return GatedRMSNormFunction.apply(x, gate, w, eps, gate_first, activation, casting_mode, group_size, out_dtype)


def check(x, gate, w, activation, casting_mode, group_size):
    """How many groups a row has; ValueError for what cannot be honoured."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {activation!r}")
    if casting_mode not in CASTING:
        raise ValueError(f"casting_mode must be one of {sorted(CASTING)}, got {casting_mode!r}")
    if not x.is_floating_point() or not gate.is_floating_point():
        raise ValueError(f"gated_rms_norm: x and gate must be of floating dtypes, got {x.dtype} and {gate.dtype}")
    if gate.shape != x.shape:
        raise ValueError(f"gated_rms_norm: x of shape {tuple(x.shape)} and a gate of shape {tuple(gate.shape)}")
    if w is not None and w.shape != x.shape[-1:]:
        raise ValueError(f"gated_rms_norm: weight of shape {tuple(w.shape)} does not fit rows of {x.shape[-1]}")
    for name, other in (("gate", gate), ("weight", w)):
        if other is not None and other.device != x.device:
            raise ValueError(f"gated_rms_norm: x is on {x.device} and the {name} on {other.device}")
    if group_size is None:
        return 1
    if group_size < 1 or x.shape[-1] % group_size:
        raise ValueError(f"gated_rms_norm: group_size={group_size!r} does not divide rows of {x.shape[-1]}")
    return x.shape[-1] // group_size


# Contract


def _case(shape, dtype, device, affine=True, **options):
    x, gate = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
    return Case((x, gate, torch.randn(shape[-1], dtype=dtype, device=device) if affine else None), options)


def _cases(dtype, device):
    forms = (
        {"gate_first": True},
        {"gate_first": False},
        {"gate_first": False, "activation": "sigmoid", "casting_mode": "gemma"},
    )
    shapes = ((2, 16, 64), (9, 7, 41), (1, 1), (0, 8), (3, 20000))  # the last needs the column loop
    eps = {(1, 1): 1.0}  # as in rms_norm: the gradient of one column is what eps leaves of a difference
    cases = [_case(s, dtype, device, eps=eps.get(s, 1e-6), **form) for s in shapes for form in forms]
    cases += [_case((5, 3, 48), dtype, device, groups=4, **form) for form in forms]
    cases += [_case((6, 33), dtype, device, affine=False, **form) for form in forms]
    return [*cases, _case((2, 3 * 17000), dtype, device, groups=3, **forms[0])]


def _timed(dtype, device):
    return {
        "524288x128 norm first": _case((524288, 128), dtype, device, gate_first=False),
        "16384x4096 gate first": _case((16384, 4096), dtype, device, gate_first=True),
        "8192x8192 gate first": _case((8192, 8192), dtype, device, gate_first=True),
        "8192x8192 gate first, 8 groups": _case((8192, 8192), dtype, device, gate_first=True, groups=8),
        "512x131072 gate first": _case((512, 131072), dtype, device, gate_first=True),
    }


def _call(x, gate, w, eps=1e-6, gate_first=False, activation="silu", casting_mode="llama", groups=1):
    group_size = x.shape[-1] // groups if groups > 1 else None
    return GatedRMSNormFunction.apply(x, gate, w, eps, gate_first, activation, casting_mode, group_size)


CONTRACT = Contract(
    call=_call,
    reference=reference,
    cases=_cases,
    timed=_timed,
    bytes_moved=lambda x, gate, w, **options: 8 * x.numel() * x.element_size(),
)
