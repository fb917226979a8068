"""What the engine takes for a kernel, what it refuses, and what verification costs and leaves untouched."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from support import assert_as_good_as_torch, assert_same, outcome, release_ropes, tiny_model

pytest.importorskip("transformers")

from liger_kernel.transformers import apply_liger_kernel, revert_liger_kernel  # noqa: E402
from liger_kernel.transformers.kinds import probe  # noqa: E402

pytestmark = pytest.mark.usefixtures("on_device")
BODY = dict(fused_linear_cross_entropy=False)  # everything but the head


@pytest.fixture(autouse=True)
def no_rope_left():
    yield
    release_ropes()


class InventedNorm(nn.Module):
    """Never seen by the library: no name, attribute or parameter it could know."""

    def __init__(self, width, tiny=1e-5):
        super().__init__()
        self.tiny = tiny
        self.gain = nn.Parameter(1 + 0.1 * torch.randn(width))

    def forward(self, value):
        wide = value.float()
        return self.gain * (wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + self.tiny)).to(value.dtype)


class GemmaLike(InventedNorm):
    def forward(self, value):
        wide = value.float()
        wide = wide * torch.rsqrt((wide * wide).mean(-1, True) + self.tiny)
        return (wide * (1.0 + self.gain.float())).type_as(value)


class LayerLike(InventedNorm):
    def forward(self, value):
        wide = value.float()
        wide = wide - wide.mean(-1, True)
        wide = wide * torch.rsqrt(wide.square().mean(-1, True) + self.tiny)
        return (wide * self.gain.float()).to(value.dtype)


class OffsetLayerNorm(nn.LayerNorm):
    """Casts for autocast by itself, as Nemotron's norm does."""

    def forward(self, value):
        given = value, self.weight + 1, self.bias
        if torch.is_autocast_enabled(value.device.type):
            given = [t.to(torch.bfloat16) for t in given]
        with torch.autocast(value.device.type, enabled=False):
            return F.layer_norm(given[0], value.shape[-1:], *given[1:])


class UnusedBuffer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.register_buffer("weight", torch.full((width,), 3.0))

    def forward(self, value):
        return F.rms_norm(value.float(), value.shape[-1:], eps=1e-6).to(value.dtype)


class UsedBuffer(UnusedBuffer):
    def forward(self, value):
        return super().forward(value) * self.weight


class EpsOutsideTheRoot(InventedNorm):
    def forward(self, value):
        wide = value.float()
        return self.gain * (wide / (wide.square().mean(-1, keepdim=True).sqrt() + self.tiny)).to(value.dtype)


class UnbiasedVariance(InventedNorm):
    def forward(self, value):
        wide = value.float()
        variance = wide.square().sum(-1, keepdim=True) / (wide.shape[-1] - 1)
        return self.gain * (wide * torch.rsqrt(variance + self.tiny)).to(value.dtype)


class ClampedWeight(InventedNorm):
    def forward(self, value):
        return super().forward(value) * 1.001


class RoundsEarlier(InventedNorm):
    def forward(self, value):
        wide = value.float()
        rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.tiny).to(value.dtype)
        return self.gain * (value * rstd)


class OtherInTraining(InventedNorm):
    def forward(self, value):
        y = super().forward(value)
        return y if self.training else 1.01 * y


class Gated(InventedNorm):
    def forward(self, value, gate=None):
        y = super().forward(value)
        return y if gate is None else y * F.silu(gate)


class InventedMLP(nn.Module):
    def __init__(self, act=F.silu, hidden=24, inner=40, bias=False, dropout=0.0):
        super().__init__()
        self.b = nn.Linear(hidden, inner, bias=bias)
        self.out = nn.Linear(inner, hidden, bias=bias)
        self.a = nn.Linear(hidden, inner, bias=bias)
        self.drop = nn.Dropout(dropout)
        self.act = act

    def forward(self, t):
        return self.out(self.drop(self.act(self.a(t)) * self.b(t)))


class InventedPacked(nn.Module):
    def __init__(self, up_first, inner=40):
        super().__init__()
        self.both, self.back = nn.Linear(24, 2 * inner), nn.Linear(inner, 24)
        self.up_first, self.inner = up_first, inner

    def forward(self, t):
        first, second = self.both(t).split(self.inner, -1)
        return self.back(F.silu(second) * first if self.up_first else F.silu(first) * second)


class WideGate(InventedMLP):
    def forward(self, t):
        return self.out((self.act(self.a(t).float()) * self.b(t).float()).to(t.dtype))


class SplitGate(InventedMLP):
    def forward(self, t):
        gate = self.a(t)
        return self.out(torch.sigmoid(gate) * gate * self.b(t))


class ClampedGate(InventedMLP):
    def forward(self, t):
        return self.out(self.act(self.a(t)).clamp(max=0.5) * self.b(t))


def gelu_tanh(t):
    return F.gelu(t, approximate="tanh")


def only_row(module, **flags):
    """The report's row for a module alone in a model."""
    model = nn.Sequential(module, nn.Linear(2, 2))
    return next(r for r in apply_liger_kernel(model, **flags).rows if r.module == "0")


@pytest.mark.parametrize(
    "module, kernel",
    [
        (lambda: InventedNorm(24), "rms_norm llama"),
        (lambda: GemmaLike(24), "rms_norm gemma offset 1"),
        (lambda: LayerLike(24), "layer_norm"),
        (lambda: nn.LayerNorm(24), "layer_norm"),
        (lambda: nn.LayerNorm(24, bias=False), "layer_norm"),
        (lambda: nn.LayerNorm(24, elementwise_affine=False), "layer_norm no weight"),
        (lambda: nn.RMSNorm(24, eps=1e-6), "rms_norm gemma"),
        (lambda: OffsetLayerNorm(24), "layer_norm offset 1"),
        (lambda: UnusedBuffer(24), "rms_norm gemma no weight"),
        (lambda: InventedMLP(), "swiglu silu"),
        (lambda: InventedMLP(bias=True), "swiglu silu"),
        (lambda: InventedMLP(gelu_tanh), "geglu gelu_tanh"),
        (lambda: InventedMLP(F.gelu), "geglu gelu"),
        (lambda: WideGate(), "swiglu silu in fp32"),
        (lambda: InventedMLP(hidden=24, inner=24), "swiglu silu"),
        (lambda: InventedMLP(hidden=24, inner=12), "swiglu silu"),
        (lambda: InventedMLP(hidden=24, inner=48), "swiglu silu"),
        (lambda: InventedPacked(up_first=False), "swiglu silu packed"),
        (lambda: InventedPacked(up_first=True), "swiglu silu packed"),
        (lambda: InventedPacked(up_first=True, inner=12), "swiglu silu packed"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_class_never_seen_is_patched_and_computes_the_same(module, kernel, dtype):
    module = module().to(dtype)
    unpatched = copy.deepcopy(module)
    assert only_row(module).kernel == kernel
    x = torch.randn(3, 5, 24, dtype=dtype).requires_grad_()
    z = x.detach().clone().requires_grad_()
    y, wanted = module(x), unpatched(z)
    dy = torch.randn_like(y)
    y.backward(dy)
    wanted.backward(dy)
    # fp32: x / sqrt(v) and x * rsqrt(v) differ in the last place; bf16: that can move a rare tie by one bf16 step.
    close = dict(rtol=1e-5, atol=1e-6) if dtype is torch.float32 else dict(rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(y, wanted, **close)
    torch.testing.assert_close(x.grad, z.grad, **close)
    truth = outcome(copy.deepcopy(unpatched).double(), x.detach().double(), dy)[2:]
    parameters = zip(module.parameters(), unpatched.parameters(), strict=True)
    ours, theirs = zip(*((p.grad, q.grad) for p, q in parameters)) if truth else ((), ())
    assert_as_good_as_torch(ours, theirs, truth, dtype, kernel)


@pytest.mark.parametrize(
    "module, reason",
    [
        (lambda: EpsOutsideTheRoot(24), "fits no known formula"),
        (lambda: UnbiasedVariance(24), "fits no known formula"),
        (lambda: ClampedWeight(24), "fits no known formula"),
        (lambda: OtherInTraining(24), "fits no known formula"),
        (lambda: RoundsEarlier(24), "rounds bf16 in another order"),
        (lambda: Gated(24), "rounds bf16 in another order"),
        (lambda: InventedMLP(F.relu), "fits no known formula"),
        (lambda: InventedMLP(dropout=0.5), "fits no known formula"),
        (lambda: ClampedGate(), "fits no known formula"),
        (lambda: SplitGate(), "rounds bf16 in another order"),
    ],
)
def test_a_subtly_different_module_is_refused_and_named(module, reason):
    module = module()
    row = only_row(module)
    assert row.kernel is None and reason in row.reason
    assert "forward" not in module.__dict__


def test_a_buffer_that_is_used_is_not_mistaken_for_an_unused_one():
    assert not apply_liger_kernel(nn.Sequential(UsedBuffer(24))).patched


@pytest.mark.parametrize("module", [nn.Dropout(0.1), nn.GELU(), nn.Identity(), nn.Linear(4, 4), nn.Embedding(4, 4)])
def test_what_is_no_norm_is_not_mentioned(module):
    assert not [r for r in apply_liger_kernel(nn.Sequential(module)).rows if r.kind != "head"]


def test_an_attention_block_with_packed_sizes_is_no_mlp():
    model = tiny_model("phi3")  # its qkv and output projections have the sizes of a packed MLP here
    assert not [r for r in apply_liger_kernel(model, **BODY).rows if "self_attn" in r.module]


class PlainAttention(nn.Module):
    """Two linears with the sizes of a packed MLP, one input, and no MLP."""

    def __init__(self):
        super().__init__()
        self.qkv, self.o = nn.Linear(24, 48), nn.Linear(24, 24)

    def forward(self, t):
        q, kv = self.qkv(t).view(*t.shape[:-1], 12, 4).split((6, 6), -2)
        return self.o(F.scaled_dot_product_attention(q, kv, kv).flatten(-2))


def test_an_attention_with_one_input_is_no_mlp():
    assert not [r for r in apply_liger_kernel(nn.Sequential(PlainAttention())).rows if r.kind == "mlp"]


def test_an_attention_that_returns_a_tuple_does_not_stop_strict():
    from transformers import BertConfig, BertModel

    sizes = dict(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=64, vocab_size=50)
    model = BertModel(BertConfig(**sizes))  # query, key and value are three linears
    report = apply_liger_kernel(model, strict=True, **BODY)
    assert len(report.patched) == 3 and [r.kind for r in report.left] == ["head"]


# Mixed precision


@pytest.mark.parametrize("make", [InventedNorm, GemmaLike, LayerLike], ids=lambda c: c.__name__)
def test_an_fp32_weight_on_a_bf16_input_gives_the_original_dtype(make):
    module = make(24)
    x = torch.randn(3, 24, dtype=torch.bfloat16)
    wanted = module(x)
    assert only_row(module).reason is None
    assert module(x).dtype is wanted.dtype
    # at most a rare tie of the bf16 rounding: x / sqrt(v) against x * rsqrt(v)
    torch.testing.assert_close(module(x), wanted, rtol=1e-2, atol=1e-2)


class RoundsForHalfWeights(InventedNorm):
    """As T5's norm: rounds what it normalised to the weight's dtype where that is of half precision only."""

    def forward(self, value):
        y = value * torch.rsqrt(value.float().square().mean(-1, keepdim=True) + self.tiny)
        return self.gain * (y.to(self.gain.dtype) if self.gain.dtype is torch.bfloat16 else y)


def test_a_norm_as_in_t5_keeps_the_dtype_and_bits_of_every_mixture():
    module, plain = (RoundsForHalfWeights(24) for _ in range(2))
    module.gain.data = plain.gain.data
    assert only_row(module).kernel == "rms_norm llama"
    for weight, value in itertools.product((torch.bfloat16, torch.float32), repeat=2):
        x = torch.randn(64, 24).to(value)
        y, wanted = module.to(weight)(x), plain.to(weight)(x)
        assert y.dtype is wanted.dtype
        if y.dtype is torch.float32:
            torch.testing.assert_close(y, wanted, rtol=2e-6, atol=0)  # the squares are summed in another order
        else:
            assert probe.same(y, wanted) >= probe.MIN_SAME  # all but a rare tie


def test_a_norm_that_casts_for_autocast_still_does():
    module, plain = OffsetLayerNorm(24), OffsetLayerNorm(24)
    assert only_row(module).reason is None
    x = torch.randn(3, 24)
    with torch.autocast(x.device.type, torch.bfloat16):
        y, wanted = module(x), plain(x)
    assert y.dtype is wanted.dtype is torch.bfloat16
    torch.testing.assert_close(y, wanted, rtol=1e-2, atol=1e-2)  # the weight stays fp32 in ours


# Rotary functions


class RopeInAHelper(nn.Module):
    def _rotate(self, q, k, cos, sin):
        return rotate_of_this_test(q, k, cos, sin)

    def forward(self, q, k, cos, sin):
        return self._rotate(q, k, cos, sin)


def rotate_of_this_test(q, k, cos, sin, unsqueeze_dim=1):
    def one(x):
        a, b = x.chunk(2, -1)
        return x * cos.unsqueeze(unsqueeze_dim) + torch.cat((-b, a), -1) * sin.unsqueeze(unsqueeze_dim)

    return one(q), one(k)


def test_a_rotation_of_any_name_is_found_where_the_model_calls_it():
    original, model = rotate_of_this_test, RopeInAHelper()
    row = next(r for r in apply_liger_kernel(model).rows if r.kind == "rope")
    assert row.module.endswith(".rotate_of_this_test") and row.kernel == "rope half"
    assert rotate_of_this_test is not original
    inputs = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    for a, b in zip(model(*inputs), original(*inputs), strict=True):
        assert_same(a, b)
    revert_liger_kernel(model)
    assert rotate_of_this_test is original


def test_a_reflection_of_the_same_signature_is_refused(monkeypatch):
    def reflected(q, k, cos, sin, unsqueeze_dim=1, _right=rotate_of_this_test):
        return _right(q, k, -cos, sin, unsqueeze_dim)

    def reflected_of_the_same_signature(q, k, cos, sin, unsqueeze_dim=1):
        return reflected(q, k, cos, sin, unsqueeze_dim)

    monkeypatch.setitem(globals(), "rotate_of_this_test", reflected_of_the_same_signature)
    row = next(r for r in apply_liger_kernel(RopeInAHelper()).rows if r.kind == "rope")
    assert "fits no known rotation" in row.reason
    assert rotate_of_this_test is reflected_of_the_same_signature


# Verification


def random_states(device):
    own = getattr(torch.get_device_module(device), "get_rng_state", None)
    return [torch.get_rng_state()] + ([own()] if own else [])


def test_global_random_state_is_untouched(device):
    model = nn.Sequential(tiny_model("llama"), InventedMLP(dropout=0.5), InventedNorm(33))
    probe._verified.clear()
    before = random_states(device)
    apply_liger_kernel(model)
    for now, then in zip(random_states(device), before, strict=True):
        assert torch.equal(now, then)


def test_a_hundred_layers_cost_no_more_verification_than_one(monkeypatch):
    built = []
    make = probe.twin
    monkeypatch.setattr(probe, "twin", lambda *args, **kwargs: built.append(1) or make(*args, **kwargs))

    def twins_for(layers):
        probe._verified.clear()
        built.clear()
        apply_liger_kernel(tiny_model("llama", layers=layers), **BODY)
        return len(built)

    assert twins_for(1) == twins_for(100) > 0


def test_modules_of_equal_settings_are_verified_once():
    probe._verified.clear()
    apply_liger_kernel(nn.Sequential(*(nn.LayerNorm(8) for _ in range(4)), nn.LayerNorm(8, eps=1e-3)))
    assert len(probe._verified[nn.LayerNorm]) == 2


class Scaled(InventedNorm):
    def __init__(self, width, scale):
        super().__init__(width)
        self._scale = scale

    def forward(self, value):
        return self._scale * super().forward(value)


def test_one_class_is_verified_per_setting():
    report = apply_liger_kernel(nn.Sequential(Scaled(24, 1.0), Scaled(24, 2.0)), **BODY)
    assert [r.module for r in report.patched] == ["0"]


def test_a_default_dtype_of_bf16_does_not_disturb_the_verification():
    probe._verified.clear()
    torch.set_default_dtype(torch.bfloat16)  # as from_pretrained has it while it builds the model
    try:
        report = apply_liger_kernel(tiny_model("gemma"), **BODY)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {r.kernel.split()[0] for r in report.patched} == {"rms_norm", "geglu", "rope"}
