"""A causal language model that this library has never seen is patched in full; one with another norm, but for that."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from support import assert_trains_as, release_ropes

pytest.importorskip("transformers")
from transformers.modeling_outputs import CausalLMOutput  # noqa: E402

from liger_kernel.transformers import apply_liger_kernel  # noqa: E402

WIDTH, HEADS, DIM, INNER, WORDS = 32, 4, 8, 48, 50


@pytest.fixture(autouse=True)
def no_rope_left():
    yield
    release_ropes()


def turn(first, second, cos, sin):
    """Pairs of neighbours, heads in the third dim."""

    def one(x):
        a, b = x[..., ::2], x[..., 1::2]
        c, s = cos[:, :, None], sin[:, :, None]
        return torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)

    return one(first), one(second)


class Scale(nn.Module):
    power = 2

    def __init__(self):
        super().__init__()
        self.by = nn.Parameter(torch.randn(WIDTH))

    def forward(self, stream):
        wide = stream.float()
        size = wide.abs().pow(self.power).mean(-1, keepdim=True)
        return (wide * (size + 1e-6).pow(-1 / self.power) * (1 + self.by.float())).to(stream.dtype)


class Mix(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(WIDTH, 2 * INNER), nn.Linear(INNER, WIDTH)

    def forward(self, stream):
        value, gate = self.into(stream).tensor_split(2, -1)
        return self.out(value * F.gelu(gate))


class Look(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.back = nn.Linear(WIDTH, 3 * HEADS * DIM), nn.Linear(HEADS * DIM, WIDTH)

    def forward(self, stream, cos, sin):
        q, k, v = self.qkv(stream).unflatten(-1, (3 * HEADS, DIM)).tensor_split(3, -2)
        q, k = turn(q, k, cos, sin)
        seen = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
        return self.back(seen.transpose(1, 2).flatten(-2))


class Invented(nn.Module):
    def __init__(self, norm=Scale, layers=2):
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList(nn.ModuleList([norm(), Look(), norm(), Mix()]) for _ in range(layers))
        self.last, self.says = norm(), nn.Linear(WIDTH, WORDS, bias=False)

    def get_output_embeddings(self):
        return self.says

    def forward(self, input_ids, labels=None):
        x = self.words(input_ids)
        angle = torch.arange(x.shape[1], dtype=x.dtype)[None, :, None] / 10 ** torch.arange(DIM // 2).to(x.dtype)
        for first, look, second, mix in self.blocks:
            x = x + look(first(x), angle.cos(), angle.sin())
            x = x + mix(second(x))
        logits = self.says(self.last(x))
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


IDS = torch.arange(24).view(2, 12)


def test_a_model_never_seen_is_patched_in_full_and_trains_the_same():
    plain = Invented()
    model = copy.deepcopy(plain)
    report = apply_liger_kernel(model, strict=True)
    assert not report.left
    kernels = {r.kind: r.kernel for r in report.patched}
    assert kernels["norm"] == "rms_norm gemma offset 1" and kernels["mlp"] == "geglu gelu packed"
    assert kernels["rope"] == "rope interleaved" and kernels["head"].startswith("fused_linear_cross_entropy")
    assert len(report.patched) == 5 + 2 + 1 + 1
    assert_trains_as(model, plain, input_ids=IDS, labels=IDS)


class Cubed(Scale):
    power = 3


def test_the_same_model_with_a_subtly_different_norm_keeps_its_norm():
    plain = Invented(norm=Cubed)
    model = copy.deepcopy(plain)
    report = apply_liger_kernel(model)
    assert {(r.kind, r.reason.partition(" (")[0]) for r in report.left} == {
        ("norm", "behaves like a norm but fits no known formula")
    }
    assert {r.kind for r in report.patched} == {"mlp", "rope", "head"}
    assert_trains_as(model, plain, input_ids=IDS, labels=IDS)
    with pytest.raises(RuntimeError, match="fits no known formula"):
        apply_liger_kernel(model, strict=True)
