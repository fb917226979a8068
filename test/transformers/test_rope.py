"""What is special about rope: transformers' own bits, layouts without a copy, partial rotation, messages."""

import pytest
import torch

from liger_kernel.ops.rope import LigerRopeFunction, rope_backward, rope_forward
from liger_kernel.transformers.functional import liger_rope
from liger_kernel.transformers.rope import (
    liger_rotary_pos_emb,
    liger_rotary_pos_emb_gpt_oss,
    liger_rotary_pos_emb_vision,
)

from support import dtypes


def inputs(device, dtype=torch.float32, heads=(4, 2), batch=2, seq=5, dim=16, width=None, tables=1):
    """q, k as transformers makes them (transposed views), cos and sin as its rotary embeddings do."""
    q, k = (torch.randn(batch, seq, h, dim, device=device).to(dtype).transpose(1, 2) for h in heads)
    angle = torch.rand(tables, seq, (width or dim) // 2, device=device) * 6.3
    angle = torch.cat((angle, angle), -1)
    return q, k, angle.cos().to(dtype), angle.sin().to(dtype)


def bits_of(impl, dtype, ours, theirs):
    if impl == "torch" or (ours.device.type == "cpu" and dtype is not torch.float32):
        assert torch.equal(ours, theirs)
    else:  # a GPU fuses a product into the sum, in bf16 and fp16 too: one rounding less, of at most the largest value
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(ours, theirs, rtol=eps, atol=2 * eps * theirs.abs().max().item())


@pytest.mark.parametrize("heads", [(1, 1), (4, 2), (3, 5), (64, 8), (7, 64)])
@pytest.mark.parametrize("dim", [16, 22, 64])
def test_rope_correctness(heads, dim, impl, device):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    for dtype in dtypes(impl, device):
        q, k, cos, sin = inputs(device, dtype, heads, dim=dim)
        for ours, theirs in zip(
            liger_rotary_pos_emb(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin), strict=True
        ):
            bits_of(impl, dtype, ours, theirs)


@pytest.mark.parametrize("unsqueeze_dim", [1, 2, -2])
@pytest.mark.parametrize("tables", [1, 3])
def test_both_layouts_and_a_table_per_row(unsqueeze_dim, tables, impl, device):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k, cos, sin = inputs(device, batch=3, tables=tables)
    if unsqueeze_dim != 1:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    theirs = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
    for ours, wanted in zip(liger_rope(q, k, cos, sin, None, unsqueeze_dim), theirs, strict=True):
        bits_of(impl, torch.float32, ours, wanted)


def test_gradients_are_transformers(impl, device):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k, cos, sin = inputs(device)
    ours, theirs = ([t.clone().requires_grad_() for t in (q, k)] for _ in range(2))
    outs = (liger_rope(*ours, cos, sin), apply_rotary_pos_emb(*theirs, cos, sin))
    dq, dk = torch.randn_like(outs[0][0]), torch.randn_like(outs[0][1])
    for out in outs:
        torch.autograd.backward(out, (dq, dk))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_tables_whose_halves_differ_keep_their_gradient():
    q, k = (torch.randn(1, h, 3, 8, dtype=torch.float64, requires_grad=True) for h in (2, 1))
    cos, sin = torch.randn(1, 3, 8, dtype=torch.float64), torch.randn(1, 3, 8, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda q, k: liger_rope(q, k, cos, sin), (q, k))
    assert torch.autograd.gradcheck(lambda q, k: liger_rope(q, k, cos[..., :4], sin[..., :4]), (q, k))


def test_partial_rotation_is_glm4s(impl, device):
    from transformers.models.glm4_moe.modeling_glm4_moe import apply_rotary_pos_emb

    for dtype in dtypes(impl, device):
        q, k, cos, sin = inputs(device, dtype, dim=20, width=8)
        theirs = apply_rotary_pos_emb(q, k, cos, sin)
        for ours, wanted in zip(liger_rotary_pos_emb(q, k, cos, sin), theirs, strict=True):
            bits_of(impl, dtype, ours, wanted)
        for ours, wanted in zip(liger_rope(q, k, cos[..., :4], sin[..., :4], rotary_dim=8), theirs, strict=True):
            bits_of(impl, dtype, ours, wanted)


def test_half_width_tables_are_gpt_oss(impl, device):
    from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb

    for dtype in dtypes(impl, device):
        q, k, cos, sin = inputs(device, dtype)
        cos, sin = cos[..., :8].contiguous(), sin[..., :8].contiguous()
        theirs = apply_rotary_pos_emb(q, k, cos, sin)
        for ours, wanted in zip(liger_rotary_pos_emb_gpt_oss(q, k, cos, sin), theirs, strict=True):
            bits_of(impl, dtype, ours, wanted)


def test_interleaved_is_glms(impl, device):
    from transformers.models.glm.modeling_glm import apply_rotary_pos_emb

    for dtype in dtypes(impl, device):
        q, k, cos, sin = inputs(device, dtype, dim=20, width=8)
        theirs = apply_rotary_pos_emb(q, k, cos, sin)
        ours = LigerRopeFunction.apply(q, k, cos[..., :4], sin[..., :4], None, 1, 8, False, "interleaved")
        wide = [t[..., :4].repeat_interleave(2, -1) for t in (cos, sin)]
        for a, b, c in zip(
            ours, LigerRopeFunction.apply(q, k, *wide, None, 1, None, False, "interleaved"), theirs, strict=True
        ):
            bits_of(impl, dtype, a, c)
            bits_of(impl, dtype, b, c)


def test_deinterleaved_is_deepseeks(impl, device):
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave

    for dtype in dtypes(impl, device):
        q, k, cos, sin = inputs(device, dtype, heads=(5, 1))
        theirs = apply_rotary_pos_emb_interleave(q, k, cos, sin)
        ours = LigerRopeFunction.apply(q, k, cos, sin, None, 1, None, False, "deinterleaved")
        for a, b in zip(ours, theirs, strict=True):
            bits_of(impl, dtype, a, b)


def test_an_unknown_style_is_refused_by_name(device):
    with pytest.raises(ValueError, match="'spiral'"):
        LigerRopeFunction.apply(*inputs(device), None, 1, None, False, "spiral")


def test_vision_is_qwen2_vls(impl, device):
    from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

    for dtype in dtypes(impl, device):
        q, k, cos, sin = inputs(device, dtype, heads=(3, 3), batch=1)
        q, k, cos, sin = q[0].transpose(0, 1), k[0].transpose(0, 1), cos[0].float(), sin[0].float()
        theirs = apply_rotary_pos_emb_vision(q, k, cos, sin)
        for ours, wanted in zip(liger_rotary_pos_emb_vision(q, k, cos, sin), theirs, strict=True):
            bits_of(impl, dtype, ours, wanted)


def test_fp32_tables_promote_as_in_torch(impl, device):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k, cos, sin = inputs(device)
    q, k = q.half().requires_grad_(), k.half()
    for ours, wanted in zip(liger_rope(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        assert ours.dtype == wanted.dtype == torch.float32
        bits_of(impl, torch.float32, ours, wanted)
    (dq,) = torch.autograd.grad(liger_rope(q, k, cos, sin)[0].sum(), q)
    assert dq.dtype == torch.float16


def test_results_lie_as_their_inputs_do(impl, device):
    q, k, cos, sin = inputs(device)
    fused = torch.randn(2, 5, 9 * 16, device=device)  # a packed projection: q is not dense
    packed_q = fused[..., : 4 * 16].view(2, 5, 4, 16).transpose(1, 2)
    assert liger_rope(q, k, cos, sin)[0].stride() == q.stride()
    out = liger_rope(packed_q, k, cos, sin)[0]
    assert out.transpose(1, 2).is_contiguous()
    assert torch.equal(out, liger_rope(packed_q.contiguous(), k, cos, sin)[0])


def test_a_frozen_q_gets_no_gradient(impl, device):
    q, k, cos, sin = inputs(device)
    k = k.requires_grad_()
    sum(t.sum() for t in liger_rope(q, k, cos, sin)).backward()
    assert q.grad is None and k.grad is not None


def test_an_unused_result_gives_a_zero_gradient(impl, device):
    q, k, cos, sin = inputs(device)
    q, k = q.requires_grad_(), k.requires_grad_()
    dq, dk = torch.autograd.grad(liger_rope(q, k, cos, sin)[0].sum(), (q, k))
    assert dq.any() and not dk.any()


def test_helpers_have_upstreams_results(impl, device):
    q, k, cos, sin = inputs(device)
    q, k = q.requires_grad_(), k.requires_grad_()
    yq, yk, c, s = rope_forward(q.detach(), k.detach(), cos, sin)
    out = liger_rope(q, k, cos, sin)
    assert torch.equal(yq, out[0]) and torch.equal(yk, out[1]) and torch.equal(c, cos) and torch.equal(s, sin)
    dq, dk = torch.randn_like(yq), torch.randn_like(yk)
    expected = torch.autograd.grad(out, (q, k), (dq, dk))
    for ours, wanted in zip(rope_backward(dq, dk, cos, sin), expected, strict=True):
        assert torch.equal(ours, wanted)


def test_position_ids_change_nothing(device):
    q, k, cos, sin = inputs(device)
    ours = liger_rotary_pos_emb(q, k, cos, sin, torch.arange(5, device=device)[None], 1)
    assert torch.equal(ours[0], liger_rotary_pos_emb(q, k, cos, sin)[0])


def test_compiles_without_a_graph_break(device):
    q, k, cos, sin = inputs(device)
    q, k = q.requires_grad_(), k.requires_grad_()
    ours = torch.compile(liger_rotary_pos_emb, fullgraph=True, backend="aot_eager")(q, k, cos, sin)
    for a, b in zip(ours, liger_rope(q, k, cos, sin), strict=True):
        assert torch.equal(a, b)
    sum(t.sum() for t in ours).backward()
    assert q.grad is not None and k.grad is not None


def changed(**changes):
    q, k, cos, sin = inputs(torch.device("cpu"))
    return dict(q=q, k=k, cos=cos, sin=sin) | changes


@pytest.mark.parametrize(
    "call, message",
    [
        (changed(q=torch.randn(2, 4, 16)), "q and k must have 4 dims"),
        (changed(k=torch.randn(2, 2, 6, 16)), "may differ in heads"),
        (changed(cos=torch.randn(1, 5, 8)), "and sin"),
        (changed(cos=torch.randn(1, 6, 16), sin=torch.randn(1, 6, 16)), "does not fit batch 2, sequence 5"),
        (changed(cos=torch.randn(3, 5, 16), sin=torch.randn(3, 5, 16)), "does not fit batch 2, sequence 5"),
        (changed(cos=torch.randn(1, 5, 18), sin=torch.randn(1, 5, 18)), "cannot rotate 18 of 16"),
        (changed(cos=torch.randn(1, 5, 7), sin=torch.randn(1, 5, 7)), "cannot rotate 7 of 16"),
        (changed(rotary_dim=12), "cannot rotate 12 of 16 elements with cos of width 16"),
        (changed(unsqueeze_dim=0), "unsqueeze_dim must be one of"),
        (changed(position_ids=2), "name unsqueeze_dim="),
        (changed(k=torch.randn(2, 2, 5, 16, device="meta")), "k on meta"),
        (changed(cos=torch.randn(1, 5, 16, requires_grad=True)), "take no gradient"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        liger_rotary_pos_emb(**call)


@pytest.mark.gpu
def test_new_batches_compile_nothing(device):
    from liger_kernel.ops.kernels.rope import _rope_kernel

    def step(batch, seq):
        q, k, cos, sin = inputs(device, torch.bfloat16, batch=batch, seq=seq, dim=64)
        sum(t.sum() for t in liger_rope(q.requires_grad_(), k.requires_grad_(), cos, sin)).backward()

    def compiled():
        return sum(len(caches[0]) for caches in _rope_kernel.device_caches.values())

    step(2, 16)
    before = compiled()
    for batch, seq in ((1, 1), (1, 17), (3, 16), (2, 31), (5, 64), (16, 2)):
        step(batch, seq)
    assert compiled() == before
