"""Norms with a gate: which ones the engine takes for its kernel, and which calls it leaves to their own class."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from support import assert_same, assert_same_logits, tiny_model

pytest.importorskip("transformers")

from liger_kernel.transformers import apply_liger_kernel, functional, revert_liger_kernel  # noqa: E402

pytestmark = pytest.mark.usefixtures("on_device")
BODY = dict(fused_linear_cross_entropy=False)  # everything but the head
MAMBA = dict(n_heads=8, d_head=16, d_state=16, n_groups=1, chunk_size=8, expand=2)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32)
DELTA = dict(num_key_heads=2, num_value_heads=4, key_head_dim=16, value_head_dim=16)
MODELS = {
    "mamba2": (
        dict(num_heads=8, head_dim=16, state_size=16, n_groups=2, chunk_size=8),
        "backbone.layers.0.mixer.norm",
        "silu gate_first llama groups 2",
    ),
    "bamba": (
        dict(attn_layer_indices=[1], **{f"mamba_{k}": v for k, v in MAMBA.items()}),
        "model.layers.0.mamba.norm",
        "silu gate_first llama",
    ),
    "qwen3_next": (
        dict(head_dim=16, layer_types=["linear_attention", "full_attention"], **MOE,
             **{f"linear_{k}": v for k, v in DELTA.items()}),
        "model.layers.0.linear_attn.norm",
        "silu norm_first llama",
    ),
}  # fmt: skip


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_with_gated_norms_trains_the_same(model_type, dtype):
    config, name, kernel = MODELS[model_type]
    plain = tiny_model(model_type, **config).to(dtype)
    model = copy.deepcopy(plain)
    rows = {r.module: r for r in apply_liger_kernel(model, rope=False, swiglu=False, **BODY).rows}
    if model_type == "mamba2":  # transformers 4.57 has no groups there
        kernel = kernel if "group_size" in vars(model.backbone.layers[0].mixer.norm) else "silu gate_first llama"
    assert rows[name].kind == "norm" and rows[name].kernel == f"gated_rms_norm {kernel}"
    ids = torch.arange(3, 19)[None]
    inputs = dict(input_ids=ids, labels=ids, use_cache=False)
    assert_same_logits(model, plain, inputs)
    for m in (model, plain):
        m(**inputs).loss.backward()
    if dtype is not torch.float32:  # where gradients are rounded differs; test_contract.py judges them
        return
    for (label, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        if p.grad is not None:  # rounding of fp32 through two layers, relative to the largest gradient
            error = (q.grad - p.grad).abs().max() / p.grad.abs().max().clamp(min=1e-20)
            assert error < 2e-5, label


class InventedGated(nn.Module):
    """Never seen by the library: no name, attribute or parameter it could know."""

    def __init__(self, width=24, tiny=1e-5):
        super().__init__()
        self.tiny = tiny
        self.gain = nn.Parameter(1 + 0.1 * torch.randn(width))

    def norm(self, wide):
        return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.tiny)

    def forward(self, value, z=None):
        y = self.gain * self.norm(value.float()).to(value.dtype)
        return y if z is None else (y * torch.sigmoid(z.float())).to(value.dtype)


class GateFirst(InventedGated):
    def forward(self, value, z=None):
        wide = value.float() * F.silu(z.float()) if z is not None else value.float()
        return (self.norm(wide) * self.gain.float()).to(value.dtype)


class TanhGate(InventedGated):
    def forward(self, value, z):
        return (super().forward(value) * torch.tanh(z.float())).to(value.dtype)


class ClampedGate(InventedGated):
    def forward(self, value, z):
        return super().forward(value, z.clamp(max=5))


class ScaledGate(InventedGated):
    def forward(self, value, z):
        return super().forward(value, 1.001 * z)


class EpsAfterTheRoot(InventedGated):
    def norm(self, wide):
        return wide / (wide.square().mean(-1, keepdim=True).sqrt() + self.tiny)


class GateInItsOwnDtype(InventedGated):
    def forward(self, value, z):
        return super().forward(value) * torch.sigmoid(z)


class OtherInTraining(InventedGated):
    def forward(self, value, z):
        return super().forward(value, z if self.training else -z)


class NormOfASum(InventedGated):
    def forward(self, value, residual=None):
        return super().forward(value if residual is None else value + residual)


def only_row(module, **flags):
    """The report's row for a module alone in a model."""
    return next(r for r in apply_liger_kernel(nn.Sequential(module), **flags).rows if r.module == "0")


@pytest.mark.parametrize(
    "make, kernel",
    [(InventedGated, "sigmoid norm_first llama"), (GateFirst, "silu gate_first gemma")],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_class_never_seen_is_patched_and_computes_the_same(make, kernel, dtype):
    module = make().to(dtype)
    wanted = copy.deepcopy(module)
    assert only_row(module).kernel == f"gated_rms_norm {kernel}"
    x, z = torch.randn(2, 5, 24, dtype=dtype), torch.randn(2, 5, 24, dtype=dtype)
    for mixed in (x, x.float()):
        assert module(mixed, z).dtype is mixed.dtype
        assert_same(module(mixed, z), wanted(mixed, z))


@pytest.mark.parametrize(
    "make, reason",
    [
        (TanhGate, "fits no known formula"),
        (ClampedGate, "fits no known formula"),
        (ScaledGate, "fits no known formula"),
        (EpsAfterTheRoot, "fits no known formula"),
        (OtherInTraining, "fits no known formula"),
        (GateInItsOwnDtype, "rounds bf16 in another order"),
        (NormOfASum, "takes more than one input (value, residual)"),
    ],
)
def test_a_subtly_different_gated_norm_is_refused_and_named(make, reason):
    module = make()
    row = only_row(module)
    assert row.kernel is None and reason in row.reason
    assert "forward" not in module.__dict__


def test_an_fp32_weight_on_a_bf16_input_gives_the_original_dtype():
    class Promotes(InventedGated):
        def forward(self, value, z):
            return self.gain * self.norm(value.float() * F.silu(z.float())).to(value.dtype)

    module = Promotes()
    wanted = copy.deepcopy(module)
    assert only_row(module).reason is None
    x, z = (torch.randn(3, 24, dtype=torch.bfloat16) for _ in range(2))
    assert module(x, z).dtype is torch.float32
    assert_same(module(x, z), wanted(x, z))


@pytest.fixture
def counted(monkeypatch):
    """The calls that reach the kernel."""
    calls, function = [], functional.liger_gated_rms_norm
    monkeypatch.setattr(
        functional, "liger_gated_rms_norm", lambda *a, **k: calls.append(a) or function(*a, **k), raising=False
    )
    return calls


@pytest.mark.parametrize(
    "call, runs",
    [
        (lambda module, x, z: module(x, z), 1),
        (lambda module, x, z: module(x, z=z), 1),
        (lambda module, x, z: module(x), 0),
        (lambda module, x, z: module(x, None), 0),
        (lambda module, x, z: module(x, z=None), 0),
        (lambda module, x, z: module(x, z[:1]), 0),
        (lambda module, x, z: module(value=x, z=z), 0),
    ],
    ids=["positional", "keyword", "no gate", "None", "keyword None", "broadcast gate", "all keywords"],
)
def test_only_a_call_with_a_gate_like_the_input_runs_the_kernel(call, runs, counted):
    module = InventedGated()
    wanted = copy.deepcopy(module)
    assert only_row(module).reason is None
    x, z = torch.randn(3, 24), torch.randn(3, 24)
    assert_same(call(module, x, z), call(wanted, x, z))
    assert len(counted) == runs


def test_a_call_without_its_input_raises_what_the_class_raises():
    module = InventedGated()
    apply_liger_kernel(nn.Sequential(module))
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'value'"):
        module(z=torch.randn(3, 24))


def test_the_rms_norm_flag_switches_it_off():
    assert only_row(InventedGated(), rms_norm=False).reason == "switched off (rms_norm=False)"


def test_copied_pickled_and_reverted(counted):
    model = nn.Sequential(InventedGated())
    apply_liger_kernel(model)
    x, z = torch.randn(3, 24), torch.randn(3, 24)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied[0](x, z), model[0](x, z))
    assert len(counted) == 4
    revert_liger_kernel(model)
    assert "forward" not in model[0].__dict__
