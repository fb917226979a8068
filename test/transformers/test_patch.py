"""The engine: its flags, that it undoes itself exactly, who else may own a forward, and its report."""

import copy
import json
import logging
import pickle
import sys

import pytest
import torch
from torch import nn

from support import assert_same, assert_trains_as, patched_names, release_ropes, tiny_model

pytest.importorskip("transformers")

from liger_kernel.transformers import apply_liger_kernel, functional, revert_liger_kernel  # noqa: E402
from liger_kernel.transformers.kinds import norm, probe  # noqa: E402

pytestmark = pytest.mark.usefixtures("on_device")
BODY = dict(fused_linear_cross_entropy=False)  # everything but the head
ALL = {"rms_norm", "swiglu", "rope"}


@pytest.fixture(autouse=True)
def no_rope_left():
    yield
    release_ropes()


class NoNorm(nn.LayerNorm):
    """Behaves like a norm, fits no formula."""

    def forward(self, value):
        return 1.001 * super().forward(value)


def kinds_of(report):
    return {r.kernel.split()[0] for r in report.patched}


# Flags


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
    model = nn.Sequential(nn.LayerNorm(8), NoNorm(8))
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
    assert all(torch.equal(loaded[name].to(value.device), value) for name, value in wanted.items())


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
    module = nn.LayerNorm(8)
    model = nn.Sequential(module)
    apply_liger_kernel(model)
    hooks.add_hook_to_module(module, hooks.ModelHook())
    revert_liger_kernel(model)
    assert module._old_forward.__func__ is nn.LayerNorm.forward
    assert torch.equal(module(torch.ones(2, 8)), nn.LayerNorm.forward(module, torch.ones(2, 8)))


def test_a_forward_that_someone_else_replaced_is_left_and_its_owner_named():
    module = nn.LayerNorm(8)
    mine = module.forward = lambda x: x
    row = next(r for r in apply_liger_kernel(nn.Sequential(module)).rows if r.module == "0")
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
    assert_trains_as(model, plain, input_ids=ids, labels=ids)
    grads = {n for n, p in model.named_parameters() if p.grad is not None}
    assert any("lora_A" in n and "gate_proj" in n for n in grads)


def test_gradient_checkpointing_gives_the_same_gradients():
    ids = torch.arange(3, 19)[None]
    plain = tiny_model("llama")
    model = copy.deepcopy(plain)
    apply_liger_kernel(model, **BODY)
    model.gradient_checkpointing_enable(dict(use_reentrant=False))
    assert_trains_as(model, plain, input_ids=ids, labels=ids, use_cache=False)


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
    assert_same(model(input_ids=ids, use_cache=False).logits, wanted)
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


def test_the_report_is_a_table_of_rich_on_a_terminal_and_plain_without_rich(monkeypatch):
    pytest.importorskip("rich")
    report = apply_liger_kernel(tiny_model("llama", layers=3), **BODY)
    plain = str(report)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    drawn = str(report)
    assert drawn != plain and "┃" in drawn and "model.layers.*.input_layernorm" in drawn
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert str(report) == plain


def test_the_report_as_json_holds_every_row():
    report = apply_liger_kernel(tiny_model("llama"), **BODY)
    read = json.loads(report.to_json())
    assert [r["module"] for r in read["patched"]] == [r.module for r in report.patched]
    assert read["left"][0]["reason"] == "switched off (fused_linear_cross_entropy=False)"
    assert all(r["error"] <= probe.MAX_ERROR for r in read["patched"])
