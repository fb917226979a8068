"""Mixtures of experts: what the engine binds in them; router, losses and the user's choice stay as they are."""

import copy
import pickle

import pytest
import torch
from torch import nn

from support import assert_trains_as, release_ropes, tiny_model

pytest.importorskip("transformers")

from liger_kernel.transformers import apply_liger_kernel, revert_liger_kernel  # noqa: E402
from liger_kernel.transformers.kinds import experts, mlp  # noqa: E402

BODY = dict(fused_linear_cross_entropy=False)
INTERFACE = pytest.importorskip("transformers.integrations.moe", reason="transformers 4 has no ExpertsInterface")


@pytest.fixture(autouse=True)
def no_rope_left():
    yield
    release_ropes()


@pytest.fixture
def products(monkeypatch):
    """How often our product of gate and up is computed."""
    calls = []
    own = mlp.product
    monkeypatch.setattr(mlp, "product", lambda *args: calls.append(1) or own(*args))
    return calls


def rows(model, **flags):
    return [r for r in apply_liger_kernel(model, **BODY, **flags).rows if r.kind == "experts"]


def batch():
    ids = torch.arange(3, 27).view(2, 12)
    return dict(input_ids=ids, labels=ids, use_cache=False)


def test_a_mixture_trains_the_same_with_the_same_router_loss(products):
    plain = tiny_model("mixtral")
    model = copy.deepcopy(plain)
    assert [r.kernel for r in rows(model)] == ["swiglu silu packed"] * 2
    ours, theirs = model(**batch()), plain(**batch())
    assert len(products) == 2 and theirs.aux_loss > 0
    assert torch.equal(ours.aux_loss, theirs.aux_loss) and torch.equal(ours.logits, theirs.logits)
    for found, wanted in zip(ours.router_logits, theirs.router_logits, strict=True):
        assert torch.equal(found, wanted)
    model.zero_grad()
    assert_trains_as(model, plain, **batch())


@pytest.mark.parametrize("chosen", ["grouped_mm", "batched_mm", "liger"])
def test_the_implementation_that_the_user_chose_stays(chosen, products):
    experts.register()
    model = tiny_model("mixtral", experts_implementation=chosen)
    plain = copy.deepcopy(model)
    assert [r.reason for r in rows(model)] == [None, None]
    assert model.config._experts_implementation == chosen
    assert torch.equal(model(**batch()).logits, plain(**batch()).logits) and products


def test_experts_that_run_one_by_one_are_left_and_the_report_says_why():
    model = tiny_model("mixtral", experts_implementation="eager")
    assert {r.reason for r in rows(model)} == {"experts_implementation='eager' runs them one by one, past their gate"}
    model.set_experts_implementation("grouped_mm")  # the verdict is not kept from before
    assert [r.reason for r in rows(model)] == [None, None]
    model.set_experts_implementation("eager")
    assert all(r.reason for r in rows(model))
    assert all(experts.SLOT not in m.__dict__ for m in model.modules())


def test_our_implementation_runs_fp64_too():
    experts.register()
    model = tiny_model("mixtral", experts_implementation="liger").double()
    eager = copy.deepcopy(model)
    eager.set_experts_implementation("eager")
    apply_liger_kernel(model, **BODY)
    torch.testing.assert_close(model(**batch()).logits, eager(**batch()).logits)


class Clamped(nn.Module):
    """Experts with a gate of their own, as GPT-OSS has."""

    class config:
        _experts_implementation = "grouped_mm"

    def __init__(self, limit=None):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(2, 16, 8))
        self.limit = limit

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, -1)
        gate = nn.functional.silu(gate)
        return (gate if self.limit is None else gate.clamp(max=self.limit)) * up


def test_a_gate_is_verified_per_setting():
    found = rows(nn.Sequential(Clamped(), Clamped(limit=0.5)))
    assert found[0].kernel == "swiglu silu packed"
    assert "their gate fits no known formula" in found[1].reason


def test_the_flag_of_its_activation_switches_a_mixture_off():
    assert {r.reason for r in rows(tiny_model("mixtral"), swiglu=False)} == {"switched off (swiglu=False)"}


def test_bound_experts_survive_copies_and_are_reverted_exactly():
    model = tiny_model("mixtral")
    before = [dict(m.__dict__) for m in model.modules()]
    apply_liger_kernel(model, **BODY)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        bound = copied.model.layers[0].mlp.experts
        assert bound._apply_gate.__self__ is bound
    revert_liger_kernel(model)
    assert all(m.__dict__.keys() == b.keys() for m, b in zip(model.modules(), before, strict=True))


def test_a_gate_that_someone_else_replaced_is_left_and_its_owner_named():
    module = Clamped()
    module._apply_gate = lambda gate_up: gate_up
    (row,) = rows(nn.Sequential(module))
    assert "belongs to" in row.reason


def test_experts_without_a_gate_of_their_own_are_not_passed_over_in_silence():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(2, 8, 12))
            self.down_proj = nn.Parameter(torch.randn(2, 6, 8))

    (row,) = rows(nn.Sequential(Packed()))
    assert row.reason == experts.INSIDE


def test_experts_that_are_modules_of_their_own_are_left_alone():
    class Old(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(tiny_model("llama", layers=1).model.layers[0].mlp for _ in range(2))

    assert {r.reason for r in rows(Old())} == {experts.ALONE}
