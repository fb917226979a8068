"""The weights of manifold-constrained hyper-connections, from the n streams themselves (mHC, arXiv:2512.24880).

    z = (alpha_pre, alpha_post, alpha_res) * m + b, in parts of n, n and n^2        m = r x phi
    h_pre = sigmoid(z_pre) + pre_eps        h_post = post_mult * sigmoid(z_post)
    h_res = tmax times: columns, then rows divided by their sums (Sinkhorn-Knopp), of exp(z_res) as n x n
    dx = r (dm phi^T) - x r^2 sum(m dm) / K        dphi = x^T (r dm)        dm = alpha dz        r = 1 / rms(x)
    db = sum of dz        dalpha = sum of dz m        of a step y = t / s: dt = (dy - sum(dy y)) / s

Shapes    x: (..., n, C), seen as R rows of K = n C; phi: (K, M), b: (M,), M = 2 n + n^2; each alpha: one element;
          h_pre, h_post: (..., n); h_res: (..., n, n), h_res[o, i] of stream i in the sum for o: its rows sum to 1 last.
Numerics  all in fp32 (products of two equal 16-bit dtypes, summed in fp32). Sinkhorn's eps is where DeepSeek has it:
          the first columns are a softmax + eps, every later sum s is sum + eps. The gradient is that of all steps.
Memory    keeps x, phi, h_res, m and r; backward runs Sinkhorn again and keeps each step's sums while it does.
Needs     one device. Of more than 8 streams, plain torch.
"""

from __future__ import annotations

import torch

from liger_kernel.ops.core import Case, Contract, Kernels, kernels, outputs, upcast, wide
from liger_kernel.ops.mhc_pre import check_fits, check_streams

# Reference


def reference(
    x, phi, b, alpha_pre, alpha_post, alpha_res, tmax=20, rms_eps=1e-6, pre_eps=0.0, sinkhorn_eps=1e-6, post_mult=2.0
):
    """The same mathematics in plain torch, differentiable: the oracle of the tests."""
    n, x = x.shape[-2], upcast(x).flatten(-2)
    phi, b, *alphas = (t.to(x.dtype) for t in (phi, b, alpha_pre, alpha_post, alpha_res))
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + rms_eps)
    pre, post, res = (normed @ phi).split((n, n, n * n), -1)
    b_pre, b_post, b_res = b.split((n, n, n * n))
    h_pre = torch.sigmoid(alphas[0] * pre + b_pre) + pre_eps
    h_post = post_mult * torch.sigmoid(alphas[1] * post + b_post)
    h_res = (alphas[2] * res + b_res).unflatten(-1, (n, n)).softmax(-2) + sinkhorn_eps
    for step in range(2 * tmax - 1):
        h_res = h_res / (h_res.sum(-1 if step % 2 == 0 else -2, keepdim=True) + sinkhorn_eps)
    return h_pre, h_post, h_res


# Torch pair: one stream at a time is widened


def _forward(x, phi, scale, b, tmax, rms_eps, pre_eps, sinkhorn_eps, post_mult):
    rows, n, width = x.shape
    squares, mix = scale.new_zeros(rows), scale.new_zeros(rows, phi.shape[1])
    for stream, part in zip(x.unbind(1), phi.view(n, width, -1)):
        stream = upcast(stream)
        squares += stream.pow(2).sum(-1)
        mix.addmm_(stream, part.to(mix.dtype))
    rstd = squares.div_(n * width).add_(rms_eps).rsqrt_()
    mix *= rstd[:, None]
    z_pre, z_post, z_res = torch.addcmul(b, mix, scale).split((n, n, n * n), 1)
    h_pre, h_post = torch.sigmoid(z_pre).add_(pre_eps), torch.sigmoid(z_post).mul_(post_mult)
    return h_pre, h_post, _sinkhorn(z_res.unflatten(1, (n, n)), tmax, sinkhorn_eps)[-1][0], mix, rstd


def _sinkhorn(logits, tmax, eps):
    """Each step's result and its divisor, the softmax first, with None."""
    steps = [(logits.softmax(1) + eps, None)]
    for step in range(2 * tmax - 1):
        before = steps[-1][0]
        divisor = before.sum(2 if step % 2 == 0 else 1, keepdim=True).add_(eps)
        steps.append((before / divisor, divisor))
    return steps


def _backward(d_pre, d_post, d_res, x, phi, scale, b, h_res, mix, rstd, tmax, sinkhorn_eps, post_mult):
    rows, n, width = x.shape
    z_pre, z_post, z_res = torch.addcmul(b, mix, scale).split((n, n, n * n), 1)
    pre, post = torch.sigmoid(z_pre), torch.sigmoid(z_post).mul_(post_mult)
    logits, grad = z_res.unflatten(1, (n, n)), d_res
    for step, (y, divisor) in reversed(list(enumerate(_sinkhorn(logits, tmax, sinkhorn_eps)))[1:]):
        axis = 2 if step % 2 == 1 else 1
        grad = (grad - (grad * y).sum(axis, keepdim=True)) / divisor
    p = logits.softmax(1)
    grad = p * (grad - (grad * p).sum(1, keepdim=True))
    dz = torch.cat((d_pre * pre * (1 - pre), d_post * post * (1 - post / post_mult), grad.flatten(1)), 1)
    slope = dz * scale
    inner = (slope * mix).sum(1).mul_(rstd * rstd).div_(n * width)[:, None]
    slope *= rstd[:, None]
    dx, dphi = torch.empty_like(x), torch.empty_like(phi)
    for i, (stream, part) in enumerate(zip(x.unbind(1), phi.view(n, width, -1))):
        stream = upcast(stream)
        dphi[i * width : (i + 1) * width] = stream.T @ slope
        dx[:, i] = (slope @ part.to(slope.dtype).T).sub_(inner * stream)
    return dx, dphi, (dz * mix).sum(0), dz.sum(0)


TORCH = Kernels(_forward, _backward)

# Of more, the tiles of phi (M > 80 wide) do not fit the memory of every GPU's core: 172 KB at 12, of an Ampere's 99.
MOST_STREAMS = 8


def _pair(x) -> Kernels:
    """What runs on x (R, n, C)."""
    return kernels("mhc_coeffs", x) if x.shape[1] <= MOST_STREAMS else TORCH


# Autograd


class LigerMHCCoeffsFunction(torch.autograd.Function):
    """apply(x, phi, b, alpha_pre, alpha_post, alpha_res, allow_fp32, tmax, rms_eps, pre_eps, sinkhorn_eps, post_mult)

    -> (h_pre, h_post, h_res), in fp32.
    """

    @staticmethod
    def forward(
        ctx, x, phi, b, alpha_pre, alpha_post, alpha_res, allow_fp32, tmax, rms_eps, pre_eps, sinkhorn_eps, post_mult
    ):
        alphas = alpha_pre, alpha_post, alpha_res
        check(x, phi, b, alphas, allow_fp32, tmax)
        ctx.shape, ctx.alphas = x.shape, [(a.shape, a.dtype) for a in alphas]
        n, dtype = x.shape[-2], wide(x.dtype)
        x, phi = x.reshape(-1, *x.shape[-2:]).contiguous(), phi.contiguous()
        ctx.b_dtype, b = b.dtype, b.to(dtype).contiguous()
        scale = torch.cat([a.reshape(1).to(dtype).expand(k) for a, k in zip(alphas, (n, n, n * n))])
        *found, mix, rstd = _pair(x).forward(x, phi, scale, b, tmax, rms_eps, pre_eps, sinkhorn_eps, post_mult)
        ctx.save_for_backward(x, phi, scale, b, found[2], mix, rstd)
        ctx.options = tmax, sinkhorn_eps, post_mult
        lead = ctx.shape[:-2]
        return outputs(tuple([h.view(*lead, *h.shape[1:]) for h in found]))

    @staticmethod
    def backward(ctx, d_pre, d_post, d_res):
        saved, n = ctx.saved_tensors, ctx.shape[-2]
        grads = (d.reshape(-1, *size).contiguous() for d, size in ((d_pre, (n,)), (d_post, (n,)), (d_res, (n, n))))
        dx, dphi, dscale, db = _pair(saved[0]).backward(*grads, *saved, *ctx.options)
        parts = dscale.split((n, n, n * n))
        d_alphas = [part.sum().to(dtype).view(shape) for part, (shape, dtype) in zip(parts, ctx.alphas)]
        return dx.view(ctx.shape), dphi, db.to(ctx.b_dtype), *d_alphas, *[None] * 6


# Functional


def liger_mhc_coeffs(
    x: torch.Tensor,
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(h_pre (..., n), h_post (..., n), h_res (..., n, n)) in fp32, of the n streams x (..., n, C).

    phi (n C, M) and b (M,) hold the parts of h_pre, h_post and h_res in this order, M = n + n + n^2; each alpha has one
    element. tmax: the iterations of Sinkhorn-Knopp. See the module for the formulas and for where each eps is.
    Raises ValueError where shapes or devices do not fit, for a tmax below 1, and, unless allow_fp32, for an x wider
    than 16 bits, which is meant for tests: a model's streams are bf16 or fp16.
    """
    return LigerMHCCoeffsFunction.apply(
        x, phi, b, alpha_pre, alpha_post, alpha_res, allow_fp32, tmax, rms_eps, pre_eps, sinkhorn_eps, post_mult
    )


def check(x, phi, b, alphas, allow_fp32, tmax):
    """ValueError for what cannot be honoured."""
    check_streams("mhc_coeffs", x)
    n, width = x.shape[-2:]
    size = 2 * n + n * n
    check_fits("mhc_coeffs", x, phi=(phi, (n * width, size)), b=(b, (size,)))
    for name, alpha in zip(("alpha_pre", "alpha_post", "alpha_res"), alphas):
        if alpha.numel() != 1:
            raise ValueError(f"mhc_coeffs: {name} must have one element, got shape {tuple(alpha.shape)}")
        check_fits("mhc_coeffs", x, **{name: (alpha, alpha.shape)})
    if x.dtype.itemsize > 2 and not allow_fp32:
        raise ValueError(f"mhc_coeffs: x is {x.dtype}, which needs allow_fp32=True; streams are bf16 or fp16 otherwise")
    if tmax < 1:
        raise ValueError(f"mhc_coeffs: tmax must be at least 1, got {tmax!r}")


# Contract


def _case(shape, dtype, device, spread=1.0, **options):
    n, width = shape[-2:]
    x = torch.randn(shape, dtype=dtype, device=device)
    phi = torch.randn(n * width, 2 * n + n * n, dtype=dtype, device=device) / (n * width) ** 0.5
    b = torch.randn(2 * n + n * n, dtype=wide(dtype), device=device)
    # Of one element each, their gradients are sums that may cancel: they are compared in test_mhc.py, with a bound.
    sizes = {"alpha_pre": (), "alpha_post": (1,), "alpha_res": ()}
    alphas = {name: torch.full(size, spread, dtype=wide(dtype), device=device) for name, size in sizes.items()}
    return Case((x, phi, b), alphas | options)


def _cases(dtype, device):
    cases = [_case(s, dtype, device) for s in ((2, 9, 4, 64), (7, 3, 41), (0, 4, 8), (3, 2, 300))]
    cases.append(_case((70, 2, 24), dtype, device, spread=2.0, tmax=3, pre_eps=0.01, sinkhorn_eps=1e-3, post_mult=1.5))
    cases.append(_case((3, 9, 8), dtype, device, tmax=2))
    return [*cases, _case((5, 1, 20), dtype, device), _case((6, 4, 16), dtype, device, tmax=1, rms_eps=1e-2)]


def _timed(dtype, device):
    return {
        "x".join(map(str, s)): _case(s, dtype, device) for s in ((8192, 4, 4096), (4096, 4, 7168), (16384, 2, 2048))
    }


CONTRACT = Contract(
    call=lambda *args, **options: liger_mhc_coeffs(*args, allow_fp32=True, **options),
    reference=reference,
    cases=_cases,
    timed=_timed,
    bytes_moved=lambda x, phi, *rest, **options: 3 * (x.numel() + phi.numel()) * x.element_size(),
    flops=lambda x, phi, *rest, **options: 6 * x.numel() * phi.shape[1],
)
