"""Rotary position embedding (Su et al. 2021, RoFormer, arXiv:2104.09864).

    y1 = x1 * c1 - x2 * s1        dx1 = dy1 * c1 + dy2 * s2
    y2 = x2 * c2 + x1 * s2        dx2 = dy2 * c2 - dy1 * s1

Styles    "half" (GPT-NeoX): x1, x2 are the halves of the first R elements of a head, the rest passes through.
          "interleaved" (RoFormer, GPT-J): x1, x2 are their even and odd elements, in cos and sin too.
          "deinterleaved" (DeepSeek): even and odd elements of x become the halves of y, as in cos and sin.
Shapes    q (B, Hq, S, D), k (B, Hk, S, D), or (B, S, H, D) with unsqueeze_dim=2; cos, sin: (B, S, W), (1, S, W) or
          (S, W). R = W, or rotary_dim, which W may be half of: then c1 = c2 and s1 = s2. With sections (a, b, c),
          a + b + c = R / 2, they are (3, B or 1, S, W) and their halves hold a columns of the first plane, then b, c.
Numerics  as transformers: each product and the sum are rounded to the type torch promotes x and cos to, which is also
          the result's dtype (keep_dtype=True: x's own). backward of the kernels is fp32 with one cast at the end.
Memory    keeps cos and sin. Results lie in memory as their inputs do; transposed views are read in place.
Needs     one device. cos and sin take no gradient.
"""

from __future__ import annotations

import functools

import torch

from liger_kernel.ops.compat import rope_backward, rope_forward  # noqa: F401  upstream's helper signatures
from liger_kernel.ops.core import Case, Contract, Kernels, kernels, outputs

# style -> whether x1, x2 alternate in x, in y, in cos and sin
STYLES = {"half": (False, False, False), "interleaved": (True, True, True), "deinterleaved": (True, False, False)}
_HEADS_AT = {1: 1, -3: 1, 2: 2, -2: 2}  # unsqueeze_dim -> the dim of q that counts heads


# Reference


def reference(q, k, cos, sin, unsqueeze_dim=1, rotary_dim=None, style="half", sections=None):
    """The same mathematics in plain torch, differentiable: the oracle of the tests."""
    before, after, table = STYLES[style]
    if sections is not None:
        cos, sin = (of_sections(t, rotary_dim or t.shape[-1], sections) for t in (cos, sin))
    cos, sin = ((t if t.dim() == 3 else t.unsqueeze(0)).unsqueeze(unsqueeze_dim) for t in (cos, sin))
    rotary = rotary_dim or cos.shape[-1]

    def split(t, pairs):
        return (t[..., ::2], t[..., 1::2]) if pairs else t.chunk(2, -1)

    (c1, c2), (s1, s2) = (split(t, table) if t.shape[-1] == rotary else (t, t) for t in (cos, sin))

    def rotate(x):
        x1, x2 = split(x[..., :rotary], before)
        y = x1 * c1 - x2 * s1, x2 * c2 + x1 * s2
        y = torch.stack(y, -1).flatten(-2) if after else torch.cat(y, -1)
        return torch.cat((y, x[..., rotary:]), -1)

    return rotate(q), rotate(k)


# Torch pair


def _halves(t, rotary, pairs):
    """Views of (x1, x2) in the first `rotary` elements of t; t twice where it is half as wide."""
    if t.shape[-1] < rotary:
        return t, t
    if pairs:
        return t[..., :rotary:2], t[..., 1:rotary:2]
    return t[..., : rotary // 2], t[..., rotary // 2 : rotary]


def _rotate(x, dtype, rotary, before, after, c1, s1, c2, s2):
    x1, x2 = _halves(x, rotary, before)
    y = torch.empty_like(x, dtype=dtype)
    y1, y2 = _halves(y, rotary, after)
    y1.copy_((x1 * c1).sub_(x2 * s1))
    y2.copy_((x2 * c2).add_(x1 * s2))
    if rotary < x.shape[-1]:
        y[..., rotary:].copy_(x[..., rotary:])
    return y


def of_sections(t, rotary, sections):
    """The columns of each section from its plane: (3, B, S, W) -> (B, S, W)."""
    parts = t.split([*sections] * (2 * t.shape[-1] // rotary), -1)
    return torch.cat([part[i % 3] for i, part in enumerate(parts)], -1)


def _table(t, heads_at, rotary, style, sections):
    t = t if sections is None else of_sections(t, rotary, sections)
    return _halves(t.unsqueeze(heads_at), rotary, STYLES[style][2])


def _forward(q, k, cos, sin, heads_at, rotary, style, sections, q_dtype, k_dtype):
    before, after, _ = STYLES[style]
    (c1, c2), (s1, s2) = (_table(t, heads_at, rotary, style, sections) for t in (cos, sin))
    both = ((q, q_dtype), (k, k_dtype))
    return tuple(_rotate(x, dtype, rotary, before, after, c1, s1, c2, s2) for x, dtype in both)


def _backward(dq, dk, cos, sin, heads_at, rotary, style, sections, q_dtype, k_dtype):
    before, after, _ = STYLES[style]
    (c1, c2), (s1, s2) = (_table(t, heads_at, rotary, style, sections) for t in (cos, sin))
    both = ((dq, q_dtype), (dk, k_dtype))
    return tuple(_rotate(x, dtype, rotary, after, before, c1, -s2, c2, -s1) for x, dtype in both)


TORCH = Kernels(_forward, _backward)


# Autograd


class LigerRopeFunction(torch.autograd.Function):
    """apply(q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None, keep_dtype=False, style="half",
    sections=None) -> (q, k) rotated.
    """

    @staticmethod
    def forward(
        ctx, q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None, keep_dtype=False, style="half",
        sections=None,
    ):  # fmt: skip
        if cos.requires_grad or sin.requires_grad:
            raise ValueError("rope: cos and sin take no gradient here; detach them")
        ctx.dtypes = q.dtype, k.dtype
        shape = position_ids, unsqueeze_dim, rotary_dim, keep_dtype, style, sections
        q, k, cos, sin, options = prepare(q, k, cos, sin, *shape)
        ctx.save_for_backward(cos, sin)
        ctx.options = options[:4]
        return outputs(kernels("rope", q).forward(q, k, cos, sin, *options))

    @staticmethod
    def backward(ctx, dq, dk):
        cos, sin = ctx.saved_tensors
        dq, dk = readable(dq), readable(dk)
        dq, dk = kernels("rope", dq).backward(dq, dk, cos, sin, *ctx.options, *ctx.dtypes)
        return dq, dk, *[None] * 8


# Functional


def liger_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    unsqueeze_dim: int = 1,
    rotary_dim: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (B, Hq, S, D) and k (B, Hk, S, D), any float dtype and memory layout, rotated by their positions.

    cos, sin: (B, S, W), (1, S, W) or (S, W). Without rotary_dim the first W elements of each head are rotated and the
    rest passes through; with it the first rotary_dim, where W may also be half of that. unsqueeze_dim=2 is for
    (B, S, H, D). position_ids has no effect, as in transformers: cos and sin are already those of the positions.
    Raises ValueError for shapes that do not fit, an odd rotary width, another unsqueeze_dim, mixed devices, and cos or
    sin that require a gradient.
    """
    return LigerRopeFunction.apply(q, k, cos, sin, position_ids, unsqueeze_dim, rotary_dim)


def readable(x):
    """x, copied only where its last dim is not dense: the kernels read every other layout in place."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def row_stride(t):
    """Elements from one row of t (..., W) to the next, or None where its rows do not follow each other in memory."""
    stride, rows = None, 1
    for size, step in zip(t.shape[-2::-1], t.stride()[-2::-1], strict=True):
        if size != 1:
            stride = step if stride is None else stride
            if step != stride * rows:
                return None
            rows *= size
    return t.shape[-1] * t.stride(-1) if stride is None else stride


def _tables(cos, sin, rotary):
    """cos and sin in place where the kernels can read them: also the real and imaginary parts of one complex table."""
    steps = (1,) if cos.shape[-1] == rotary else (1, 2)
    if cos.stride() == sin.stride() and cos.stride(-1) in steps and row_stride(cos) is not None:
        return cos, sin
    return cos.contiguous(), sin.contiguous()


def prepare(
    q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None, keep_dtype=False, style="half", sections=None
):
    """q, k, cos and sin as the pairs take them, and their options; ValueError for what cannot be honoured."""
    if isinstance(position_ids, int):  # transformers 5 has unsqueeze_dim in this place
        raise ValueError(f"rope: position_ids must be a tensor or None, got {position_ids}: name unsqueeze_dim=")
    if unsqueeze_dim not in _HEADS_AT:
        raise ValueError(f"rope: unsqueeze_dim must be one of {sorted(_HEADS_AT)}, got {unsqueeze_dim!r}")
    if style not in STYLES:
        raise ValueError(f"rope: style must be one of {sorted(STYLES)}, got {style!r}")
    heads_at = _HEADS_AT[unsqueeze_dim]
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(f"rope: q and k must have 4 dims, got shapes {tuple(q.shape)} and {tuple(k.shape)}")
    batch, seq, dim = q.shape[0], q.shape[3 - heads_at], q.shape[3]
    if (k.shape[0], k.shape[3 - heads_at], k.shape[3]) != (batch, seq, dim):
        raise ValueError(f"rope: q {tuple(q.shape)} and k {tuple(k.shape)} may differ in heads (dim {heads_at}) only")
    planes = () if sections is None else (3,)
    cos, sin = (t.unsqueeze(len(planes)) if t.dim() == 2 + len(planes) else t for t in (cos, sin))
    if cos.shape != sin.shape or cos.dtype != sin.dtype:
        raise ValueError(f"rope: cos {tuple(cos.shape)} {cos.dtype} and sin {tuple(sin.shape)} {sin.dtype} differ")
    if cos.shape[:-1] not in ((*planes, 1, seq), (*planes, batch, seq)):
        where = f"batch {batch}, sequence {seq}" + (f", sections {tuple(sections)}" if planes else "")
        raise ValueError(f"rope: cos of shape {tuple(cos.shape)} does not fit {where}")
    width = cos.shape[-1]
    rotary = width if rotary_dim is None else rotary_dim
    if rotary % 2 or not 0 < rotary <= dim or width not in (rotary, rotary // 2):
        raise ValueError(f"rope: cannot rotate {rotary} of {dim} elements with cos of width {width}")
    if planes:
        sections = tuple(sections)
        if len(sections) != 3 or min(sections) < 0 or 2 * sum(sections) != rotary:
            raise ValueError(f"rope: sections must be three that sum to {rotary // 2}, got {sections}")
        if STYLES[style][2] and width == rotary:
            raise ValueError(f"rope: sections in style {style!r} need cos of width {rotary // 2}, got {width}")
    if not q.device == k.device == cos.device == sin.device:
        raise ValueError(f"rope: q is on {q.device}, k on {k.device}, cos on {cos.device}, sin on {sin.device}")
    dtypes = (q.dtype, k.dtype) if keep_dtype else (torch.promote_types(x.dtype, cos.dtype) for x in (q, k))
    cos, sin = _tables(cos, sin, rotary)
    return readable(q), readable(k), cos, sin, (heads_at, rotary, style, sections, *dtypes)


# Contract


def _call(q, k, cos, sin, unsqueeze_dim=1, rotary_dim=None, style="half", sections=None):
    return LigerRopeFunction.apply(q, k, cos, sin, None, unsqueeze_dim, rotary_dim, False, style, sections)


def _case(shape, heads, dtype, device, width=None, batch=1, unsqueeze_dim=1, transposed=False, equal=False, **options):
    """q and k of (B, S, D) and `heads` heads each; cos and sin are options, since they take no gradient.

    equal: both halves of the table are, as models make them and some peers need them.
    """
    b, s, d = shape

    def make(h):
        wanted = (b, h, s, d) if unsqueeze_dim == 1 else (b, s, h, d)
        if transposed:
            return torch.randn(b, wanted[2], wanted[1], d, dtype=dtype, device=device).transpose(1, 2)
        return torch.randn(wanted, dtype=dtype, device=device)

    q, k = make(heads[0]), make(heads[1])
    planes = (3,) if "sections" in options else ()
    angle = torch.rand(*planes, batch, s, width or d, dtype=torch.float32, device=device) * 6.3
    if equal:
        angle = torch.cat([angle.chunk(2, -1)[0]] * 2, -1)
    table = dict(cos=angle.cos().to(dtype), sin=angle.sin().to(dtype))
    return Case((q, k), table | dict(unsqueeze_dim=unsqueeze_dim) | options)


def _cases(dtype, device):
    return [
        _case((2, 5, 16), (4, 2), dtype, device, transposed=True),
        _case((2, 5, 16), (4, 2), dtype, device, batch=2),
        _case((2, 3, 24), (3, 5), dtype, device, width=12, rotary_dim=24, unsqueeze_dim=2),
        _case((2, 7, 22), (7, 1), dtype, device, width=6, transposed=True),
        _case((1, 3, 20), (2, 2), dtype, device, width=4, rotary_dim=8, unsqueeze_dim=2, transposed=True),
        _case((3, 2, 2), (1, 1), dtype, device, batch=3),
        _case((1, 2, 64), (64, 33), dtype, device, transposed=True),
        *(
            _case((2, 3, 20), (3, 2), dtype, device, width=w, rotary_dim=12, style=style, transposed=True)
            for style in ("interleaved", "deinterleaved")
            for w in (12, 6)
        ),
        _case((2, 5, 16), (4, 2), dtype, device, sections=(2, 3, 3), transposed=True),
        _case((2, 3, 22), (3, 2), dtype, device, 12, 2, sections=(0, 5, 1), unsqueeze_dim=2),
        _case((2, 3, 20), (3, 2), dtype, device, 6, 2, rotary_dim=12, style="interleaved", sections=(1, 2, 3)),
        _case((0, 4, 8), (2, 2), dtype, device),
        _case((2, 0, 8), (2, 1), dtype, device, transposed=True),
    ]


def _timed(dtype, device):
    made = functools.partial(_case, dtype=dtype, device=device, transposed=True, equal=True)
    return {
        "4x4096x(32+8)x128": made((4, 4096, 128), (32, 8)),
        "4x4096x(32+8)x64": made((4, 4096, 64), (32, 8)),
        "4x4096x(64+8)x128": made((4, 4096, 128), (64, 8), batch=4),
        "4x4096x(4+1)x256": made((4, 4096, 256), (4, 1)),
        "4x4096x(32+2)x128 partial": made((4, 4096, 128), (32, 2), width=64),
        "4x4096x(32+8)x128 interleaved": made((4, 4096, 128), (32, 8), style="interleaved"),
        "4x4096x(128+1)x64 deinterleaved": made((4, 4096, 64), (128, 1), style="deinterleaved"),
        "4x4096x(28+4)x128 multimodal": made((4, 4096, 128), (28, 4), batch=4, sections=(16, 24, 24)),
        "4x(32+8)x4096x128": made((4, 4096, 128), (32, 8), transposed=False),
    }


CONTRACT = Contract(
    call=_call,
    reference=reference,
    cases=_cases,
    timed=_timed,
    bytes_moved=lambda q, k, **options: 4 * (q.numel() + k.numel()) * q.element_size(),
)
