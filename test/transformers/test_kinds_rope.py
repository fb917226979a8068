"""Rotary functions: which ones the engine takes for its kernel, and which calls it leaves to the function itself."""

import pytest
import torch
from torch import nn

from support import release_ropes

pytest.importorskip("transformers")

from liger_kernel.transformers import apply_liger_kernel, functional, revert_liger_kernel  # noqa: E402
from liger_kernel.transformers.kinds import rope  # noqa: E402

B, S, D, HEADS = 2, 6, 16, (4, 2)


@pytest.fixture(autouse=True)
def no_rope_left():
    yield
    release_ropes()


def half(x):
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)


def pairs(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def twice(t):
    return t[..., : t.shape[-1] // 2].repeat_interleave(2, -1)


def first(q, k, cos, sin, unsqueeze_dim=1):
    """Half rotation of the first elements of a head, as many as cos is wide."""
    cos, sin, width = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim), cos.shape[-1]
    return tuple(
        torch.cat((x[..., :width] * cos + half(x[..., :width]) * sin, x[..., width:]), -1) for x in (q, k)
    )  # fmt: skip


def keeps(q, k, cos, sin, unsqueeze_dim=1):
    return tuple(y.to(x.dtype) for x, y in zip((q, k), first(q, k, cos, sin, unsqueeze_dim), strict=True))


def in_fp32(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
    return tuple(y.to(q.dtype) for y in first(q.float(), k.float(), cos, sin, unsqueeze_dim))


def interleaved(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = twice(cos).unsqueeze(unsqueeze_dim), twice(sin).unsqueeze(unsqueeze_dim)
    return q * cos + pairs(q) * sin, k * cos + pairs(k) * sin


def deinterleaved(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    q, k = (torch.cat((x[..., ::2], x[..., 1::2]), -1) for x in (q, k))
    return q * cos + half(q) * sin, k * cos + half(k) * sin


def half_width(q, k, cos, sin, unsqueeze_dim=1):
    return first(q, k, torch.cat((cos, cos), -1), torch.cat((sin, sin), -1), unsqueeze_dim)


def vision(q, k, cos, sin):
    cos, sin = cos.unsqueeze(-2).float(), sin.unsqueeze(-2).float()
    return tuple((x.float() * cos + half(x.float()) * sin).to(x.dtype) for x in (q, k))


def one(x, cos, sin, unsqueeze_dim=1):
    return first(x, x, cos, sin, unsqueeze_dim)[0]


def one_sin_first(tensor, sin, cos):
    sin, cos = (t[:, :, None].repeat_interleave(2, -1) for t in (sin, cos))
    return tensor * cos + pairs(tensor) * sin


def complex_pairs(xq, xk, freqs_cis):
    def turned(x):
        y = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * freqs_cis[:, :, None]
        return torch.view_as_real(y).flatten(-2).type_as(x)

    return turned(xq), turned(xk)


def sections(q, k, cos, sin, mrope_section, unsqueeze_dim=1):
    cos, sin = (
        torch.cat([part[i % 3] for i, part in enumerate(t.split(mrope_section * 2, -1))], -1) for t in (cos, sin)
    )
    return first(q, k, cos, sin, unsqueeze_dim)


def other_way(q, k, cos, sin, unsqueeze_dim=1):
    return first(q, k, cos, -sin, unsqueeze_dim)


def at_the_end(q, k, cos, sin, unsqueeze_dim=1):
    """Rotates the last elements of a head instead of the first, as DeepSeek V4 does."""
    width = 2 * cos.shape[-1]
    cos, sin = (t.repeat_interleave(2, -1).unsqueeze(unsqueeze_dim) for t in (cos, sin))
    ys = (x[..., -width:].float() * cos + pairs(x[..., -width:]).float() * sin for x in (q, k))
    return tuple(torch.cat((x[..., :-width], y.to(x.dtype)), -1) for x, y in zip((q, k), ys, strict=True))


INNER = [first]  # called by no name: one that is named in a function's code is found there


def mirrored(q, k, cos, sin, unsqueeze_dim=1):
    return tuple(y.flip(-1) for y in INNER[0](q.flip(-1), k.flip(-1), cos, sin, unsqueeze_dim))


def scaled_k(q, k, cos, sin, unsqueeze_dim=1):
    q, k = INNER[0](q, k, cos, sin, unsqueeze_dim)
    return q, 1.001 * k


def rounds_a_table(q, k, cos, sin, unsqueeze_dim=1):
    return INNER[0](q, k, cos.bfloat16().to(cos.dtype), sin, unsqueeze_dim)


def with_v(q, k, v, cos, sin):
    return *INNER[0](q, k, cos, sin), v


def by_pieces(x, cos, sin, position_ids, unsqueeze_dim=1):
    """A rotation of its own for each coordinate of a position, as Gemma 4's vision tower has."""
    pieces = zip(*(t.chunk(position_ids.shape[-1], -1) for t in (x, cos, sin)), strict=True)
    return torch.cat([one(*piece, unsqueeze_dim) for piece in pieces], -1)


subject = first


class Caller(nn.Module):
    def forward(self, *args, **kwargs):
        return subject(*args, **kwargs)


def row_of(monkeypatch, function):
    monkeypatch.setitem(globals(), "subject", function)
    model = Caller()
    return model, next(r for r in apply_liger_kernel(model).rows if r.kind == "rope")


def heads(*numbers, at=1, dtype=torch.float32):
    return [torch.randn(B, S, h, D).transpose(1, 2 // at).to(dtype).requires_grad_() for h in numbers]


def table(*leading, width=D, dtype=torch.float32):
    return [torch.randn(*leading, S, width).to(dtype) for _ in range(2)]


CALLS = {
    first: ("half", lambda dtype: (*heads(*HEADS, dtype=dtype), *table(B, dtype=dtype))),
    keeps: ("half keeps dtype", lambda dtype: (*heads(*HEADS, dtype=dtype), *table(1))),
    in_fp32: ("half in fp32", lambda dtype: (*heads(*HEADS, dtype=dtype), *table(B, dtype=dtype))),
    interleaved: ("interleaved", lambda dtype: (*heads(*HEADS, dtype=dtype), *table(1, dtype=dtype))),
    deinterleaved: ("deinterleaved", lambda dtype: (*heads(*HEADS, dtype=dtype), *table(B, dtype=dtype))),
    half_width: ("half", lambda dtype: (*heads(*HEADS, dtype=dtype), *table(B, width=D // 2, dtype=dtype))),
    vision: ("half in fp32", lambda dtype: ([*torch.randn(2, S, 3, D).to(dtype).requires_grad_()], *table())),
    one: ("half", lambda dtype: (*heads(4, dtype=dtype), *table(B, dtype=dtype))),
    other_way: ("half backwards", lambda dtype: (*heads(*HEADS, dtype=dtype), *table(B, dtype=dtype))),
    at_the_end: (
        "interleaved in fp32 at the end",
        lambda dtype: (*heads(*HEADS, dtype=dtype), *table(B, width=D // 4, dtype=dtype)),
    ),
    one_sin_first: ("interleaved", lambda dtype: (*heads(4, at=2, dtype=dtype), *table(B, width=D // 2, dtype=dtype))),
    complex_pairs: (
        "interleaved complex keeps dtype",
        lambda dtype: (*heads(*HEADS, at=2, dtype=dtype), torch.complex(*table(B, width=D // 2))),
    ),
    sections: ("half multimodal", lambda dtype: (*heads(*HEADS, dtype=dtype), *table(3, B, dtype=dtype), [2, 3, 3])),
}


def arguments(function, dtype):
    made = CALLS[function][1](dtype)
    return [*made[0], *made[1:]] if isinstance(made[0], list) else list(made)


@pytest.mark.parametrize("function", CALLS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_rotation_is_found_and_computes_the_same(function, dtype, monkeypatch):
    model, row = row_of(monkeypatch, function)
    assert row.kernel == f"rope {CALLS[function][0]}"
    given = arguments(function, dtype)
    leaves = [t for t in given if isinstance(t, torch.Tensor) and t.requires_grad]
    results = []
    for call in (model, function):
        ys = call(*given)
        ys = ys if isinstance(ys, tuple) else (ys,)
        grads = torch.autograd.grad([y.float().square().sum() for y in ys], leaves)
        results.append((ys, grads))
    (ours, grads), (theirs, wanted) = results
    for y, z in zip(ours, theirs, strict=True):
        assert y.dtype is z.dtype
        # a product of complex numbers may be rounded once where ours is rounded twice
        assert torch.equal(y, z) or "complex" in row.kernel
        torch.testing.assert_close(y, z, rtol=1e-6 if dtype is torch.float32 else 8e-3, atol=1e-6)
    for g, w in zip(grads, wanted, strict=True):  # bf16: transformers rounds two gradients before it adds them
        torch.testing.assert_close(
            g, w, rtol=1e-5 if dtype is torch.float32 else 2e-2, atol=1e-5 if dtype is torch.float32 else 4e-2
        )


@pytest.mark.parametrize(
    "function", [f for f in CALLS if f not in (vision, one_sin_first, complex_pairs)], ids=lambda f: f.__name__
)
def test_the_heads_may_be_in_the_third_dim(function, monkeypatch):
    model, _ = row_of(monkeypatch, function)
    given = [t.detach().transpose(1, 2) if isinstance(t, torch.Tensor) and t.requires_grad else t
             for t in arguments(function, torch.float32)]  # fmt: skip
    ours, theirs = (f(*given, unsqueeze_dim=2) for f in (model, function))
    ours, theirs = ((y,) if isinstance(y, torch.Tensor) else y for y in (ours, theirs))
    assert all(torch.equal(y, z) for y, z in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    "function, reason",
    [
        (mirrored, "fits no known rotation"),
        (scaled_k, "fits no known rotation"),
        (rounds_a_table, "fits no known rotation"),
        (with_v, "takes other arguments than a rotation (q, k, v, cos, sin)"),
    ],
    ids=lambda f: getattr(f, "__name__", None),
)
def test_a_subtly_different_rotation_is_refused(function, reason, monkeypatch):
    _, row = row_of(monkeypatch, function)
    assert row.kernel is None and reason in row.reason
    assert subject is function


def test_the_rotation_inside_a_function_that_is_none_itself_is_found(monkeypatch):
    original, given = one, (*heads(4), *table(B), torch.zeros(B, S, 2, dtype=torch.long))
    wanted = by_pieces(*given)
    model, row = row_of(monkeypatch, by_pieces)
    assert row.module.endswith(".one") and row.kernel == "rope half"
    assert one is not original and subject is by_pieces
    assert torch.equal(model(*given), wanted)
    revert_liger_kernel(model)
    assert one is original


def calls_of(monkeypatch):
    calls = []
    own = functional.liger_rope
    monkeypatch.setattr(functional, "liger_rope", lambda *args: calls.append(1) or own(*args))
    return calls


def optional_k(q, k=None, cos=None, sin=None, unsqueeze_dim=1):
    return first(q, q if k is None else k, cos, sin, unsqueeze_dim)[: 1 if k is None else 2]


def test_calls_that_were_not_verified_go_to_the_function_itself(monkeypatch):
    model, row = row_of(monkeypatch, optional_k)
    assert row.kernel == "rope half"
    calls = calls_of(monkeypatch)
    (q, k), (cos, sin) = heads(*HEADS), table(B)
    model(q, k, cos, sin)
    assert len(calls) == 1
    assert len(model(q, cos=cos, sin=sin)) == 1  # without k
    model(q, k, cos.double(), sin.double())  # a table in another dtype
    model(q, k, cos.clone().requires_grad_(), sin)  # a table that takes a gradient
    assert len(calls) == 1


def test_a_part_of_the_head_is_rotated_only_where_the_function_can(monkeypatch):
    whole, row = row_of(monkeypatch, interleaved)
    assert not rope.verify(interleaved).variant.partial and rope.verify(first).variant.partial
    with pytest.raises(RuntimeError, match="size of tensor"):
        whole(*heads(*HEADS), *table(B, width=D // 2))
    revert_liger_kernel(whole)
    model, row = row_of(monkeypatch, first)
    calls = calls_of(monkeypatch)
    given = *heads(*HEADS), *table(B, width=D // 2)
    assert all(torch.equal(y, z) for y, z in zip(model(*given), first(*given), strict=True)) and len(calls) == 1
