"""The engine: what it takes for a kernel, what it refuses, and that it undoes itself exactly."""

import copy
import json
import logging
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from support import assert_as_good_as_torch, outcome, patched_names, tiny_model

pytest.importorskip("transformers")

from liger_kernel.transformers import apply_liger_kernel, functional, revert_liger_kernel  # noqa: E402
from liger_kernel.transformers.kinds import norm, probe, rope  # noqa: E402

BODY = dict(fused_linear_cross_entropy=False)  # everything but the head


@pytest.fixture(autouse=True)
def no_rope_left():
    yield
    for entry in list(rope._replaced.values()):
        entry.users.clear()
    rope.release(nn.Identity())


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
        (lambda: InventedMLP(), "swiglu silu"),
        (lambda: InventedMLP(bias=True), "swiglu silu"),
        (lambda: InventedMLP(gelu_tanh), "geglu gelu_tanh"),
        (lambda: InventedMLP(F.gelu), "geglu gelu"),
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
    x, z = (torch.randn(3, 5, 24, dtype=dtype, generator=torch.manual_seed(1)).requires_grad_() for _ in range(2))
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
        (lambda: Gated(24), "more than one input (value, gate)"),
        (lambda: InventedMLP(F.relu), "fits no known formula"),
        (lambda: InventedMLP(dropout=0.5), "fits no known formula"),
        (lambda: ClampedGate(), "fits no known formula"),
        (lambda: WideGate(), "rounds bf16 in another order"),
    ],
)
def test_a_subtly_different_module_is_refused_and_named(module, reason):
    module = module()
    row = only_row(module)
    assert row.kernel is None and reason in row.reason
    assert "forward" not in module.__dict__


@pytest.mark.parametrize("module", [nn.Dropout(0.1), nn.GELU(), nn.Identity(), nn.Linear(4, 4), nn.Embedding(4, 4)])
def test_what_is_no_norm_is_not_mentioned(module):
    assert not [r for r in apply_liger_kernel(nn.Sequential(module)).rows if r.kind != "head"]


def test_an_attention_block_with_packed_sizes_is_no_mlp():
    model = tiny_model("phi3")  # its qkv and output projections have the sizes of a packed MLP here
    assert not [r for r in apply_liger_kernel(model, **BODY).rows if "self_attn" in r.module]


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


# Flags


def kinds_of(report):
    return {r.kernel.split()[0] for r in report.patched}


ALL = {"rms_norm", "swiglu", "rope"}


@pytest.mark.parametrize("flag", sorted(ALL))
def test_a_flag_switches_its_own_kind_off(flag):
    report = apply_liger_kernel(tiny_model("llama"), **BODY, **{flag: False})
    assert kinds_of(report) == ALL - {flag}
    assert {r.reason for r in report.left} == {f"switched off ({f}=False)" for f in (flag, *BODY)}


def test_none_means_the_default():
    report = apply_liger_kernel(tiny_model("llama"), rope=None, rms_norm=None, swiglu=None, **BODY)
    assert kinds_of(report) == ALL


def test_both_losses_at_once_raise():
    with pytest.raises(ValueError, match="cross_entropy and fused_linear_cross_entropy cannot both be True"):
        apply_liger_kernel(tiny_model("llama"), cross_entropy=True, fused_linear_cross_entropy=True)


def test_an_unknown_flag_raises():
    with pytest.raises(TypeError, match="unexpected keyword argument 'rmsnorm'"):
        apply_liger_kernel(tiny_model("llama"), rmsnorm=True)


def test_an_explicit_cross_entropy_switches_the_fused_default_off():
    model = tiny_model("llama")
    report = apply_liger_kernel(model, cross_entropy=True)
    head = next(r for r in report.rows if r.kind == "head")
    assert head.kernel.startswith("cross_entropy ")
    assert "forward" not in model.__dict__ and "forward" not in model.lm_head.__dict__


def test_the_second_call_changes_nothing():
    model = tiny_model("llama")
    first = apply_liger_kernel(model)
    before = [dict(m.__dict__) for m in model.modules()]
    again = apply_liger_kernel(model)
    assert again.rows == first.rows
    assert all(m.__dict__ == b for m, b in zip(model.modules(), before, strict=True))


def test_a_second_call_with_other_flags_converges_to_them():
    changed, direct = tiny_model("llama"), tiny_model("llama")
    apply_liger_kernel(changed)
    report = apply_liger_kernel(changed, rms_norm=False, cross_entropy=True)
    assert report.rows == apply_liger_kernel(direct, rms_norm=False, cross_entropy=True).rows
    assert patched_names(changed) == patched_names(direct)
    assert "forward" not in changed.__dict__ and "forward" not in changed.lm_head.__dict__
    apply_liger_kernel(changed)
    apply_liger_kernel(direct, rms_norm=True)
    assert patched_names(changed) == patched_names(direct)


def test_strict_raises_naming_what_was_left_and_patches_nothing():
    model = nn.Sequential(InventedNorm(8), UnbiasedVariance(8))
    with pytest.raises(RuntimeError, match="strict=True: 1: behaves like a norm but fits no known formula"):
        apply_liger_kernel(model, strict=True, **BODY)
    assert not patched_names(model)


def test_strict_does_not_mind_what_was_switched_off():
    assert apply_liger_kernel(tiny_model("llama"), strict=True, swiglu=False, **BODY).patched


def test_the_environment_switches_everything_off(monkeypatch, caplog):
    monkeypatch.setenv("LIGER_KERNEL_DISABLE", "1")
    model = tiny_model("llama")
    with caplog.at_level(logging.INFO, logger="liger_kernel"):
        report = apply_liger_kernel(model)
    assert not report.rows and not patched_names(model) and "forward" not in model.__dict__
    assert "LIGER_KERNEL_DISABLE" in caplog.text and "LIGER_KERNEL_DISABLE" in str(report)


def test_a_model_with_nothing_to_patch_warns(caplog):
    with caplog.at_level(logging.WARNING, logger="liger_kernel"):
        apply_liger_kernel(nn.Sequential(nn.Linear(2, 2)))
    assert "no kernel was applied" in caplog.text


@pytest.mark.parametrize("thing", ["llama", None, [nn.Linear(2, 2)]], ids=repr)
def test_something_that_is_no_module_raises(thing):
    with pytest.raises(TypeError, match=r"takes a torch\.nn\.Module, got"):
        apply_liger_kernel(thing)


def test_a_model_that_is_no_causal_lm_gets_the_rest():
    model = tiny_model("llama").model
    report = apply_liger_kernel(model)
    assert kinds_of(report) == ALL
    assert [(r.kind, r.module) for r in report.left] == [("head", "head")]


# Lifecycle


def state_of(model):
    return [dict(m.__dict__) for m in model.modules()]


def test_revert_leaves_no_trace():
    import transformers.models.llama.modeling_llama as modeling

    function, model = modeling.apply_rotary_pos_emb, tiny_model("llama")
    before = state_of(model)
    apply_liger_kernel(model)
    assert modeling.apply_rotary_pos_emb is not function
    revert_liger_kernel(model)
    assert modeling.apply_rotary_pos_emb is function
    for now, then in zip(state_of(model), before, strict=True):
        assert now.keys() == then.keys() and all(now[k] is then[k] for k in now)


def test_rope_comes_back_when_the_last_model_is_reverted():
    import transformers.models.llama.modeling_llama as modeling

    function, first, second = modeling.apply_rotary_pos_emb, tiny_model("llama"), tiny_model("llama")
    apply_liger_kernel(first, **BODY)
    apply_liger_kernel(second, **BODY)
    revert_liger_kernel(first)
    assert modeling.apply_rotary_pos_emb is not function
    revert_liger_kernel(second)
    assert modeling.apply_rotary_pos_emb is function


def test_the_replaced_rope_has_the_signature_of_the_original():
    import inspect

    import transformers.models.llama.modeling_llama as modeling

    wanted = inspect.signature(modeling.apply_rotary_pos_emb)
    apply_liger_kernel(tiny_model("llama"), **BODY)
    assert inspect.signature(modeling.apply_rotary_pos_emb) == wanted


def test_only_the_given_model_is_patched():
    patched, other = tiny_model("llama"), tiny_model("llama")
    apply_liger_kernel(patched)
    assert patched_names(patched) and not patched_names(other)
    assert all("forward" not in m.__dict__ for m in other.modules())


def test_a_copy_is_patched_and_independent():
    model = tiny_model("llama")
    apply_liger_kernel(model)
    twin = copy.deepcopy(model)
    assert patched_names(twin) == patched_names(model)
    with torch.no_grad():
        model.model.norm.weight.zero_()
    ids = torch.arange(3, 11)[None]
    assert twin.eval()(input_ids=ids).logits.abs().sum() > 0 == model.eval()(input_ids=ids).logits.abs().sum()
    revert_liger_kernel(twin)
    assert not patched_names(twin) and patched_names(model)
    assert not [k for m in twin.modules() for k in m.__dict__ if "liger" in k or k == "forward"]


def test_a_pickled_model_comes_back_patched():
    model = tiny_model("llama")
    apply_liger_kernel(model)
    back = pickle.loads(pickle.dumps(model))
    assert patched_names(back) == patched_names(model)
    for name in patched_names(back):
        module = back.get_submodule(name)
        assert (
            module.forward.__self__ is module and module.forward.__func__ is model.get_submodule(name).forward.__func__
        )
    ids = torch.arange(3, 11)[None]
    assert torch.equal(back.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert not apply_liger_kernel(back).left


def test_a_patched_model_saves_what_the_original_saves(tmp_path):
    model = tiny_model("llama")
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    apply_liger_kernel(model)
    assert model.state_dict().keys() == wanted.keys()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in wanted.items())


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
    assert all(torch.equal(a, b) for a, b in zip(model(*inputs), original(*inputs), strict=True))
    revert_liger_kernel(model)
    assert rotate_of_this_test is original


def test_a_rotation_the_other_way_is_refused(monkeypatch):
    def backwards(q, k, cos, sin, unsqueeze_dim=1, _right=rotate_of_this_test):
        return _right(q, k, cos, -sin, unsqueeze_dim)

    def backwards_of_the_same_signature(q, k, cos, sin, unsqueeze_dim=1):
        return backwards(q, k, cos, sin, unsqueeze_dim)

    monkeypatch.setitem(globals(), "rotate_of_this_test", backwards_of_the_same_signature)
    row = next(r for r in apply_liger_kernel(RopeInAHelper()).rows if r.kind == "rope")
    assert "fits no known rotation" in row.reason
    assert rotate_of_this_test is backwards_of_the_same_signature


def test_global_random_state_is_untouched():
    model = nn.Sequential(tiny_model("llama"), InventedMLP(dropout=0.5), InventedNorm(33))
    probe._verified.clear()
    before = torch.get_rng_state()
    apply_liger_kernel(model)
    assert torch.equal(torch.get_rng_state(), before)


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


def test_a_model_on_meta_is_patched_without_memory():
    with torch.device("meta"):
        model = tiny_model("llama")
        report = apply_liger_kernel(model)
    assert not report.left and patched_names(model) == patched_names_of_a_real_one()
    assert all(p.is_meta for p in model.parameters())


def patched_names_of_a_real_one():
    model = tiny_model("llama")
    apply_liger_kernel(model)
    return patched_names(model)


def test_a_default_dtype_of_bf16_does_not_disturb_the_verification():
    probe._verified.clear()
    torch.set_default_dtype(torch.bfloat16)  # as from_pretrained has it while it builds the model
    try:
        report = apply_liger_kernel(tiny_model("gemma"), **BODY)
    finally:
        torch.set_default_dtype(torch.float32)
    assert kinds_of(report) == {"rms_norm", "geglu", "rope"}


def test_the_kernels_really_run(monkeypatch):
    calls = []
    model = tiny_model("llama")
    apply_liger_kernel(model, **BODY)
    for name in ("liger_rms_norm", "liger_swiglu", "liger_rope"):
        function = getattr(functional, name)
        monkeypatch.setattr(
            functional, name, lambda *a, _f=function, _n=name: calls.append(_n) or _f(*a), raising=False
        )
    model(input_ids=torch.arange(3, 11)[None])
    assert [calls.count(n) for n in ("liger_rms_norm", "liger_swiglu", "liger_rope")] == [5, 2, 2]


# Other owners of a forward


def test_under_an_accelerate_hook_both_run():
    hooks = pytest.importorskip("accelerate.hooks")

    class Counts(hooks.ModelHook):
        seen = 0

        def pre_forward(self, module, *args, **kwargs):
            Counts.seen += 1
            return args, kwargs

    model = tiny_model("llama")
    norm_, mlp = model.model.norm, model.model.layers[0].mlp
    hooks.add_hook_to_module(norm_, Counts())  # before the patch
    before = state_of(model)
    assert not apply_liger_kernel(model, **BODY, strict=True).left[1:]
    assert norm_._old_forward.__func__ is norm.forward(norm_.__dict__[probe.RECORD].variant, "_old_forward")
    hooks.add_hook_to_module(mlp, Counts())  # after the patch
    model(input_ids=torch.arange(3, 11)[None])
    assert Counts.seen == 2
    hooks.remove_hook_from_module(mlp)
    revert_liger_kernel(model)
    for now, then in zip(state_of(model), before, strict=True):
        assert now.keys() == then.keys()
    hooks.remove_hook_from_module(norm_)
    assert norm_.forward.__func__ is type(norm_).forward


def test_a_forward_hooked_after_the_patch_is_reverted_beneath_its_hook():
    hooks = pytest.importorskip("accelerate.hooks")
    module = InventedNorm(8)
    model = nn.Sequential(module)
    apply_liger_kernel(model)
    hooks.add_hook_to_module(module, hooks.ModelHook())
    revert_liger_kernel(model)
    assert module._old_forward.__func__ is InventedNorm.forward
    assert torch.equal(module(torch.ones(2, 8)), InventedNorm.forward(module, torch.ones(2, 8)))


def test_a_forward_that_someone_else_replaced_is_left_and_its_owner_named():
    module = InventedNorm(8)
    mine = module.forward = lambda x: x
    row = only_row(module)
    assert "its forward belongs to" in row.reason and __name__.split(".")[-1] in row.reason
    assert module.forward is mine


def test_lora_on_the_mlp_keeps_its_adapters_in_the_path():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(tiny_model("llama"), config)
    plain = copy.deepcopy(model)
    report = apply_liger_kernel(model, **BODY)
    assert "model.layers.0.mlp" in {r.module for r in report.patched}
    ids = torch.arange(3, 11)[None]
    for m in (model, plain):
        m(input_ids=ids, labels=ids).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert any("lora_A" in n and "gate_proj" in n for n in grads)
    for n, p in plain.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(grads[n], p.grad, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_gives_the_same_gradients():
    ids = torch.arange(3, 19)[None]
    plain = tiny_model("llama")
    model = copy.deepcopy(plain)
    apply_liger_kernel(model, **BODY)
    model.gradient_checkpointing_enable(dict(use_reentrant=False))
    for m in (plain, model):
        m(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6)


def test_layers_compile_to_one_graph():
    torch._dynamo.reset()
    graphs = []
    model = tiny_model("llama", layers=4)
    apply_liger_kernel(model, **BODY)
    ids = torch.arange(3, 11)[None]
    wanted = model(input_ids=ids, use_cache=False).logits

    def backend(graph, _):
        graphs.append(graph)
        return graph

    for layer in model.model.layers:
        layer.compile(backend=backend, fullgraph=True)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, wanted)
    assert len(graphs) == 1


def test_compiled_and_parallel_wrappers_are_looked_through():
    model = tiny_model("llama")
    apply_liger_kernel(nn.DataParallel(torch.compile(model)), **BODY)
    assert patched_names(model)


# Report


def test_the_report_prints_a_line_per_kind_of_module():
    text = str(apply_liger_kernel(tiny_model("llama", layers=3), swiglu=False, **BODY))
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert lines["LlamaForCausalLM:"] == "LlamaForCausalLM: 8 of 12 found are patched"
    assert lines["model.layers.*.input_layernorm"].split()[1:5] == ["3", "norm", "rms_norm", "llama"]
    assert lines["model.layers.*.mlp"].endswith("switched off (swiglu=False)")


def test_the_report_as_json_holds_every_row():
    report = apply_liger_kernel(tiny_model("llama"), **BODY)
    read = json.loads(report.to_json())
    assert [r["module"] for r in read["patched"]] == [r.module for r in report.patched]
    assert read["left"][0]["reason"] == "switched off (fused_linear_cross_entropy=False)"
    assert all(r["error"] <= probe.MAX_ERROR for r in read["patched"])
