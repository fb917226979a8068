"""Rotary embeddings of multimodal models: three planes of cos and sin, complex factors."""

import pytest
import torch

from liger_kernel.ops.llama4_rope import llama4_rope_forward
from liger_kernel.ops.qwen2vl_mrope import qwen2vl_mrope_backward, qwen2vl_mrope_forward
from liger_kernel.ops.rope import LigerRopeFunction, prepare
from liger_kernel.transformers import (
    liger_llama4_text_rotary_pos_emb,
    liger_llama4_vision_rotary_pos_emb,
    liger_multimodal_rotary_pos_emb,
)
from liger_kernel.transformers.llama4_rope import apply_liger_llama4_rope_full

from support import assert_as_good_as_torch, dtypes

SECTIONS = (2, 3, 3)


def queries(device, dtype, heads=(4, 2), batch=2, seq=5, dim=16):
    return [torch.randn(batch, seq, h, dim, device=device).to(dtype).transpose(1, 2) for h in heads]


def planes(device, dtype, batch=2, seq=5, dim=16):
    angle = torch.rand(3, batch, seq, dim // 2, device=device) * 6.3
    angle = torch.cat((angle, angle), -1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def half(x):
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)


def qwen2_vl(q, k, cos, sin, section, unsqueeze_dim=1):
    """What Qwen2-VL computes (Wang et al. 2024), as transformers 4 writes it."""
    section = [*section, *section]
    cos, sin = (
        torch.cat([m[i % 3] for i, m in enumerate(t.split(section, -1))], -1).unsqueeze(unsqueeze_dim)
        for t in (cos, sin)
    )
    return q * cos + half(q) * sin, k * cos + half(k) * sin


def compare(impl, device, function, theirs, leaves, *others):
    """Outputs and gradients as close to fp64 as theirs."""
    results = []
    for call, dtype in ((function, None), (theirs, None), (theirs, torch.float64)):
        q, k = (t.detach().to(dtype or t.dtype).requires_grad_() for t in leaves)
        outs = call(q, k, *(t.to(dtype) if dtype and t.is_floating_point() else t for t in others))
        torch.autograd.backward(outs, [torch.ones_like(o) for o in outs])
        results.append([*(o.detach() for o in outs), q.grad, k.grad])
    for ours, original in zip(results[0], results[1], strict=True):
        assert ours.dtype is original.dtype and ours.shape == original.shape
    assert_as_good_as_torch(*results, leaves[0].dtype, function.__name__)


@pytest.mark.parametrize("batch", [1, 2])
def test_multimodal_rope_is_qwen2_vls(batch, impl, device):
    for dtype in dtypes(impl, device):
        cos, sin = planes(device, dtype, batch)

        def ours(q, k, cos, sin):
            return liger_multimodal_rotary_pos_emb(q, k, cos, sin, list(SECTIONS))

        def theirs(q, k, cos, sin):
            return qwen2_vl(q, k, cos, sin, SECTIONS)

        compare(impl, device, ours, theirs, queries(device, dtype), cos, sin)


def test_multimodal_rope_has_transformers_4s_bits(impl, device):
    modeling = pytest.importorskip("transformers.models.qwen2_vl.modeling_qwen2_vl")
    if not hasattr(modeling, "apply_multimodal_rotary_pos_emb"):
        pytest.skip("transformers 5 picks the sections in its rotary embedding")
    q, k = queries(device, torch.float32)
    cos, sin = planes(device, torch.float32)
    theirs = modeling.apply_multimodal_rotary_pos_emb(q, k, cos, sin, list(SECTIONS))
    for ours, wanted in zip(liger_multimodal_rotary_pos_emb(q, k, cos, sin, list(SECTIONS)), theirs, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=0 if impl == "torch" else 1e-6)


def test_sections_given_for_both_halves_are_the_same_sections(device):
    q, k = queries(device, torch.float32)
    cos, sin = planes(device, torch.float32)
    once = liger_multimodal_rotary_pos_emb(q, k, cos, sin, SECTIONS)
    twice = liger_multimodal_rotary_pos_emb(q, k, cos, sin, [*SECTIONS, *SECTIONS])
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_sections_of_interleaved_pairs_are_glm4vs(impl, device):
    """GLM-4V (transformers 4): sections of the half, each column for an even and the next odd element."""
    q, k = queries(device, torch.float32, dim=20)
    cos, sin = planes(device, torch.float32, dim=16)
    cos, sin = cos[..., :8], sin[..., :8]  # read in place: a row is longer than what is used of it
    wide = [
        torch.cat([m[i] for i, m in enumerate(t.split(SECTIONS, -1))], -1).repeat_interleave(2, -1) for t in (cos, sin)
    ]
    ours = LigerRopeFunction.apply(q, k, cos, sin, None, 1, 16, False, "interleaved", SECTIONS)
    theirs = LigerRopeFunction.apply(q, k, *wide, None, 1, None, False, "interleaved")
    for a, b in zip(ours, theirs, strict=True):
        # two forms of one kernel: a GPU may contract the product and the sum in one and not in the other
        torch.testing.assert_close(a, b, rtol=0, atol=0 if device.type == "cpu" else 1e-6)


def test_helpers_have_upstreams_results(impl, device):
    q, k = queries(device, torch.float32)
    cos, sin = planes(device, torch.float32)
    out = liger_multimodal_rotary_pos_emb(q.requires_grad_(), k.requires_grad_(), cos, sin, SECTIONS)
    yq, yk, c, s = qwen2vl_mrope_forward(q.detach(), k.detach(), cos, sin, SECTIONS)
    assert torch.equal(yq, out[0]) and torch.equal(yk, out[1]) and c is cos and s is sin
    dq, dk = torch.randn_like(yq), torch.randn_like(yk)
    for ours, wanted in zip(
        qwen2vl_mrope_backward(dq, dk, cos, sin, SECTIONS), torch.autograd.grad(out, (q, k), (dq, dk)), strict=True
    ):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize(
    "sections, message",
    [((2, 3), "three that sum to 8"), ((2, 3, 4), "three that sum to 8"), ((-1, 5, 4), "three that sum to 8")],
)
def test_sections_that_do_not_fit_are_named(sections, message):
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match=message):
        liger_multimodal_rotary_pos_emb(*queries(cpu, torch.float32), *planes(cpu, torch.float32), sections)


def test_planes_that_do_not_fit_are_named():
    cpu = torch.device("cpu")
    cos, sin = planes(cpu, torch.float32)
    with pytest.raises(ValueError, match=r"does not fit batch 2, sequence 5, sections \(2, 3, 3\)"):
        liger_multimodal_rotary_pos_emb(*queries(cpu, torch.float32), cos[0], sin[0], SECTIONS)


# Llama 4


def factors(*shape, device):
    angle = torch.rand(*shape, device=device) * 6.3
    return torch.polar(torch.ones_like(angle), angle)


@pytest.mark.parametrize("batch", [1, 2])
def test_text_rope_is_llama4s(batch, impl, device):
    from transformers.models.llama4.modeling_llama4 import apply_rotary_emb

    for dtype in dtypes(impl, device):
        q, k = (t.transpose(1, 2) for t in queries(device, dtype))
        freqs = factors(batch, 5, 8, device=device)
        theirs = apply_rotary_emb(q, k, freqs)
        for ours, wanted, x in zip(liger_llama4_text_rotary_pos_emb(q, k, freqs), theirs, (q, k), strict=True):
            assert ours.dtype is wanted.dtype is dtype
            # complex products may fuse a multiplication into the sum: one unit in the last place of the larger term
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(
                ours, wanted, rtol=eps, atol=2 * torch.finfo(torch.float32).eps * x.abs().max().item()
            )


def test_vision_rope_is_llama4s(impl, device):
    from transformers.models.llama4.modeling_llama4 import vision_apply_rotary_emb

    q, k = (t.transpose(1, 2) for t in queries(device, torch.float32))
    freqs = factors(5, 1, 8, device="cpu")  # a buffer that may be elsewhere than the model
    theirs = vision_apply_rotary_emb(q, k, freqs)
    for ours, wanted in zip(liger_llama4_vision_rotary_pos_emb(q, k, freqs), theirs, strict=True):
        torch.testing.assert_close(ours, wanted)


def test_gradients_are_llama4s(impl, device):
    from transformers.models.llama4.modeling_llama4 import apply_rotary_emb

    freqs = factors(1, 5, 8, device=device)
    grads = []
    for function in (liger_llama4_text_rotary_pos_emb, apply_rotary_emb):
        torch.manual_seed(1)
        q, k = (t.transpose(1, 2).detach().requires_grad_() for t in queries(device, torch.float32))
        out = function(q, k, freqs)
        torch.autograd.backward(out, [torch.randn_like(o) for o in out])
        grads.append((q.grad, k.grad))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_the_helper_rotates_back(impl, device):
    q, k = (t.transpose(1, 2) for t in queries(device, torch.float32))
    freqs = factors(1, 5, 8, device=device)
    for back, x in zip(llama4_rope_forward(*llama4_rope_forward(q, k, freqs), freqs, None, -1.0), (q, k), strict=True):
        torch.testing.assert_close(back, x)


def test_the_parts_of_a_complex_table_are_read_in_place():
    q, k = queries(torch.device("cpu"), torch.float32)
    freqs = factors(1, 5, 8, device="cpu")
    _, _, cos, sin, _ = prepare(q, k, freqs.real, freqs.imag, rotary_dim=16, style="interleaved")
    start = freqs.untyped_storage().data_ptr()
    assert cos.untyped_storage().data_ptr() == sin.untyped_storage().data_ptr() == start


def test_factors_that_do_not_fit_are_named():
    q, k = (t.transpose(1, 2) for t in queries(torch.device("cpu"), torch.float32))
    with pytest.raises(ValueError, match="does not fit heads of 16"):
        liger_llama4_text_rotary_pos_emb(q, k, factors(1, 5, 6, device="cpu"))


def test_a_modeling_module_gets_both_functions():
    from types import ModuleType

    module = ModuleType("modeling_llama4")
    apply_liger_llama4_rope_full(module)
    assert module.apply_rotary_emb is liger_llama4_text_rotary_pos_emb
    assert module.vision_apply_rotary_emb is liger_llama4_vision_rotary_pos_emb


@pytest.mark.parametrize("which", ["multimodal", "llama4"])
def test_compiles_without_a_graph_break(which, device):
    q, k = queries(device, torch.float32)
    cos, sin = planes(device, torch.float32)
    freqs = factors(1, 5, 8, device=device)

    def run(q, k):
        if which == "multimodal":
            return liger_multimodal_rotary_pos_emb(q, k, cos, sin, SECTIONS)
        return liger_llama4_text_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), freqs)

    q, k = q.requires_grad_(), k.requires_grad_()
    ours = torch.compile(run, fullgraph=True, backend="aot_eager")(q, k)
    for a, b in zip(ours, run(q, k), strict=True):
        assert torch.equal(a, b)
    sum(t.sum() for t in ours).backward()
    assert q.grad is not None and k.grad is not None
