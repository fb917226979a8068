"""Every row of the model table, and the names other projects call."""

import copy
import importlib
import inspect
import logging
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch import nn

from support import assert_same, assert_same_logits, assert_trains_as, patched_names, release_ropes, tiny_model

pytest.importorskip("transformers")

import transformers  # noqa: E402

import liger_kernel.transformers as ours  # noqa: E402
from liger_kernel.transformers import (  # noqa: E402
    _apply_liger_kernel,
    _apply_liger_kernel_to_instance,
    _stub,
    apply_liger_kernel,
    monkey_patch,
    revert_liger_kernel,
)
from liger_kernel.transformers.kinds import rope  # noqa: E402
from liger_kernel.transformers.models import APPLY_PREFIX, TESTED  # noqa: E402
from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN  # noqa: E402

pytestmark = pytest.mark.usefixtures("on_device")
# Of a model with two layers: (norms, gated MLPs). Every norm there is, q and k norms too.
EXPERTS = 8 if transformers.__version__ < "5" else 0  # modules of their own in transformers 4, one tensor since
FOUND = {
    "gemma": (5, 2),
    "gemma2": (9, 2),
    "gemma3_text": (13, 2),
    "granite": (5, 2),
    "llama": (5, 2),
    "mistral": (5, 2),
    "mixtral": (5, EXPERTS),
    "olmo2": (9, 2),
    "phi3": (5, 2),
    "qwen2": (5, 2),
    "qwen3": (9, 2),
    "smollm3": (5, 2),
}
BODY = dict(fused_linear_cross_entropy=False)
every_row = pytest.mark.parametrize("model_type", TESTED)


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    for model_type in list(monkey_patch.arrange._arranged):
        revert_liger_kernel(model_type)
    release_ropes()


def apply_to(model_type, **kwargs):
    return getattr(ours, APPLY_PREFIX + model_type)(**kwargs)


def batch(model, rows=2, length=16):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, model.config.vocab_size, (rows, length), generator=generator, device="cpu").to(model.device)
    labels = ids.clone()
    labels[0, :5] = -100
    return dict(input_ids=ids, labels=labels, use_cache=False)


# What is patched


@every_row
def test_every_module_of_the_row_is_patched(model_type):
    model = tiny_model(model_type)
    norms = {n for n, m in model.named_modules() if type(m).__name__.endswith("RMSNorm")}
    mlps = {n for n, m in model.named_modules() if type(m).__name__.endswith("MLP")}
    assert (len(norms), len(mlps)) == FOUND[model_type]
    report = apply_to(model_type, model=model)
    alone = {n for n in mlps if ".experts." in n}  # transformers 4: left alone
    experts = {n for n, m in model.named_modules() if hasattr(type(m), "_apply_gate")}
    assert {r.module for r in report.left} == alone
    assert patched_names(model) == (norms | mlps | experts) - alone
    kinds = Counter(r.kind for r in report.patched)
    assert kinds == Counter(norm=len(norms), mlp=len(mlps - alone), rope=1, head=1, experts=len(experts))
    assert model.lm_head.forward.__self__ is model.lm_head and "forward" in model.__dict__
    modeling = sys.modules[type(model).__module__]
    assert modeling.apply_rotary_pos_emb.__module__ == modeling.__name__  # wrapped: it looks like the original
    assert rope.original(rope.Place(vars(modeling), "apply_rotary_pos_emb")) is not modeling.apply_rotary_pos_emb


@every_row
def test_before_and_after_construction_patch_the_same_modules(model_type):
    after = tiny_model(model_type)
    apply_to(model_type, model=after)
    early = tiny_model(model_type)  # alive when the arrangement is made
    apply_to(model_type)
    before = tiny_model(model_type)
    assert patched_names(before) == patched_names(after)
    early(**batch(early))
    assert patched_names(early) == patched_names(after)
    for name in patched_names(after) | {"", "lm_head"}:
        wanted = after.get_submodule(name).forward.__code__
        assert before.get_submodule(name).forward.__code__ is early.get_submodule(name).forward.__code__ is wanted, name


@pytest.mark.parametrize("build", ["from_config", "from_pretrained"])
def test_every_way_of_construction_is_arranged_for(build, tmp_path):
    first = tiny_model("llama")
    first.save_pretrained(tmp_path)
    apply_to("llama")
    if build == "from_config":
        model = transformers.AutoModelForCausalLM.from_config(first.config)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert torch.equal(model.lm_head.weight, first.lm_head.weight.to(model.device, torch.bfloat16))
    apply_to("llama", model=first)
    assert patched_names(model) == patched_names(first)
    assert "forward" in model.__dict__ and "forward" in model.lm_head.__dict__


def test_an_arrangement_is_for_every_class_of_the_type():
    apply_to("llama")
    config = tiny_model("llama").config
    for cls in (transformers.LlamaModel, transformers.LlamaForSequenceClassification):
        assert patched_names(cls(config)), cls
    assert not patched_names(tiny_model("mistral"))


def test_a_model_is_patched_once_not_part_by_part(caplog):
    apply_to("llama", **BODY)
    with caplog.at_level(logging.INFO, logger="liger_kernel"):
        tiny_model("llama")
    assert [r.message.split(":")[0] for r in caplog.records] == ["LlamaForCausalLM"]


def test_revert_by_type_undoes_the_arrangement():
    cls = transformers.LlamaForCausalLM
    before = dict(vars(cls))
    early = tiny_model("llama")
    apply_to("llama", **BODY)
    late = tiny_model("llama")
    early(**batch(early))
    revert_liger_kernel("llama")
    assert dict(vars(cls)) == before
    assert not patched_names(early) and not patched_names(late) and not patched_names(tiny_model("llama"))


def test_revert_of_a_type_that_was_not_arranged_raises():
    with pytest.raises(ValueError, match="nothing is arranged for model type 'qwen2'"):
        revert_liger_kernel("qwen2")


def test_an_arrangement_made_again_takes_the_new_flags():
    apply_to("llama", **BODY)
    model = tiny_model("llama")
    apply_to("llama", rms_norm=False, **BODY)
    assert not [n for n in patched_names(model) if "norm" in n] and patched_names(model)
    assert patched_names(tiny_model("llama")) == patched_names(model)


def test_a_reverted_model_is_not_patched_again_by_the_arrangement_for_its_type():
    early = tiny_model("llama")
    apply_to("llama")
    late = tiny_model("llama")
    for model in (early, late):
        revert_liger_kernel(model)
        model(**batch(model))
        model.model(input_ids=batch(model)["input_ids"])
        apply_to("llama", rms_norm=False)
        model(**batch(model))
        assert not patched_names(model) and "forward" not in model.__dict__
        apply_liger_kernel(model)
        assert patched_names(model) and "forward" in model.__dict__
    revert_liger_kernel("llama")
    assert not patched_names(late)


def subclasses(base):
    """Classes whose constructors go on after their base's; the last one runs its parts without its base's forward."""

    class Adds(base):
        def __init__(self, config):
            super().__init__(config)
            self.extra = nn.LayerNorm(config.hidden_size)

    class AddsMore(Adds):
        def __init__(self, config):
            super().__init__(config)
            self.lm_head = nn.Sequential(nn.LayerNorm(config.hidden_size), self.lm_head)

    class OwnForward(Adds):
        def forward(self, input_ids, labels=None, **kwargs):
            return self.lm_head(self.extra(self.model(input_ids).last_hidden_state))

    return Adds, AddsMore, OwnForward


def bound(model):
    return {n: m.forward.__code__ for n, m in model.named_modules() if "forward" in m.__dict__}


@pytest.mark.parametrize("made", ["before", "after"])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["adds", "adds more", "own forward"])
def test_modules_that_a_subclass_adds_after_its_base_constructor_are_patched(made, which):
    config, base = tiny_model("llama").config, transformers.LlamaForCausalLM
    plain = vars(base).copy()
    kind = subclasses(base)[which]
    own = vars(kind).copy()
    after, early = kind(config), kind(config)
    apply_liger_kernel(after)
    assert "extra" in patched_names(after)
    apply_to("llama")
    if made == "after":
        kind = subclasses(base)[which]
    before = kind(config)
    early(**batch(early))
    assert bound(before) == bound(early) == bound(after)
    revert_liger_kernel("llama")
    assert not bound(before) and not bound(early) and not bound(kind(config))
    assert vars(base) == plain and (made == "after" or vars(kind) == own)


def test_an_arranged_model_with_flags_of_its_own_keeps_them():
    model = tiny_model("llama")
    apply_to("llama", model=model, swiglu=False, **BODY)
    wanted = patched_names(model)
    apply_to("llama")
    model(**batch(model))
    model.model(input_ids=batch(model)["input_ids"])
    assert patched_names(model) == wanted


# Equal to the original


@every_row
def test_a_patched_model_computes_what_the_original_does(model_type):
    theirs = tiny_model(model_type)
    model = copy.deepcopy(theirs)
    inputs = batch(theirs)
    apply_to(model_type, model=model)
    assert_trains_as(model, theirs, **inputs)
    assert_same_logits(model.eval(), theirs.eval(), inputs)


@every_row
def test_bf16_logits_are_those_of_the_original(model_type):
    theirs = tiny_model(model_type).to(torch.bfloat16)
    model = copy.deepcopy(theirs)
    inputs = batch(theirs)
    apply_to(model_type, model=model, **BODY)
    assert_same_logits(model, theirs, inputs)


@every_row
def test_fp32_norms_in_a_bf16_model_keep_their_dtype(model_type, device):
    theirs = tiny_model(model_type).to(torch.bfloat16)
    for module in theirs.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.float()
    model = copy.deepcopy(theirs)
    inputs = batch(theirs)
    apply_to(model_type, model=model, **BODY)
    norm = next(n for n, m in model.named_modules() if type(m).__name__.endswith("RMSNorm"))
    mine, original = model.get_submodule(norm), theirs.get_submodule(norm)
    x = torch.randn(3, mine.weight.numel(), dtype=torch.bfloat16)
    assert mine(x).dtype is original(x).dtype
    assert_same(mine(x), original(x))
    with torch.autocast(device.type, torch.bfloat16):
        assert_same_logits(model, theirs, inputs)


# The interface


def test_a_named_function_rejects_an_unknown_flag():
    with pytest.raises(TypeError, match=r"^apply_liger_kernel_to_llama\(\) got an unexpected keyword argument 'geglu'"):
        ours.apply_liger_kernel_to_llama(model=tiny_model("llama"), geglu=True)


def test_too_many_arguments_name_the_function():
    with pytest.raises(TypeError, match=r"^apply_liger_kernel_to_llama\(\) too many positional arguments"):
        ours.apply_liger_kernel_to_llama(*[True] * 7)


def test_a_model_of_another_type_is_named_in_a_warning_and_patched(caplog):
    model = tiny_model("qwen2")
    apply_to("llama", model=model)
    assert "apply_liger_kernel_to_llama is given a qwen2 model" in caplog.text
    assert patched_names(model)


def test_a_model_of_its_type_or_around_one_is_not_warned_of(caplog):
    model = tiny_model("llama")
    wrapped = nn.Module()
    wrapped.config, wrapped.text = transformers.PretrainedConfig(), model
    for given in (model, wrapped, nn.Sequential(nn.LayerNorm(8))):
        apply_to("llama", model=given)
    assert "is given a" not in caplog.text


def test_a_named_function_takes_its_flags_by_position():
    model = tiny_model("llama")
    ours.apply_liger_kernel_to_llama(False, False, False, True, False, model)
    assert patched_names(model) and all("norm" in n for n in patched_names(model))


def test_an_explicit_cross_entropy_beats_the_default_of_the_fused_one():
    model = tiny_model("llama")
    report = ours.apply_liger_kernel_to_llama(cross_entropy=True, model=model)
    assert [r.kernel.split()[0] for r in report.patched if r.kind == "head"] == ["cross_entropy"]


@pytest.mark.parametrize("where", ["model", "type"])
def test_both_losses_at_once_raise(where):
    model = dict(model=tiny_model("llama")) if where == "model" else {}
    with pytest.raises(ValueError, match="cannot both be True"):
        ours.apply_liger_kernel_to_llama(cross_entropy=True, fused_linear_cross_entropy=True, **model)
    assert not patched_names(tiny_model("llama"))


def test_the_flag_of_the_mlp_counts_whatever_its_activation():
    model = tiny_model("llama", hidden_act="gelu_pytorch_tanh")
    report = ours.apply_liger_kernel_to_llama(model=model, **BODY)
    assert {r.kernel for r in report.patched if r.kind == "mlp"} == {"geglu gelu_tanh"}
    ours.apply_liger_kernel_to_llama(model=model, swiglu=False, **BODY)
    assert not [n for n in patched_names(model) if "mlp" in n]


def test_values_may_be_none():  # as axolotl passes every flag of the signature
    model = tiny_model("llama")
    function = MODEL_TYPE_TO_APPLY_LIGER_FN["llama"]
    flags = dict.fromkeys(f for f in inspect.signature(function).parameters if f != "model")
    assert not function(**flags, model=model).left


def test_an_instance_is_patched_with_unknown_flags_dropped():
    model = tiny_model("llama")
    _apply_liger_kernel_to_instance(model=model, rms_norm=False, relu_squared=True, geglu=False, strict=True, **BODY)
    assert {n.split(".")[-1] for n in patched_names(model)} == {"mlp"}


def test_without_the_fused_head_the_models_forward_is_untouched():  # trl has replaced it with its own
    model = tiny_model("llama")
    model.forward = mine = lambda *args, **kwargs: None
    _apply_liger_kernel_to_instance(model=model, fused_linear_cross_entropy=False)
    assert model.forward is mine and "forward" not in model.lm_head.__dict__ and "_loss_function" not in model.__dict__
    assert patched_names(model)


def test_a_second_train_changes_nothing():
    model = tiny_model("llama")
    _apply_liger_kernel_to_instance(model=model)
    before = [dict(m.__dict__) for m in model.modules()]
    _apply_liger_kernel_to_instance(model=model)
    assert all(m.__dict__ == b for m, b in zip(model.modules(), before, strict=True))


@pytest.mark.parametrize("model_type", [None, "no_such_type"])
def test_an_unknown_or_missing_model_type_is_passed_over(model_type, caplog):
    model = nn.Sequential(nn.LayerNorm(8))
    if model_type is not None:
        model.config = transformers.PretrainedConfig()
        model.config.model_type = model_type
    with caplog.at_level(logging.INFO, logger="liger_kernel"):
        _apply_liger_kernel_to_instance(model=model)
        _apply_liger_kernel(model_type, rope=False)
    assert not patched_names(model) and caplog.text.count("nothing is applied") == 2


def test_a_users_own_entry_counts(monkeypatch):
    seen = []

    def apply_liger_kernel_to_mine(rms_norm=True, model=None):
        seen.append((rms_norm, model))

    monkeypatch.setitem(MODEL_TYPE_TO_APPLY_LIGER_FN, "llama", apply_liger_kernel_to_mine)
    model = tiny_model("llama")
    _apply_liger_kernel_to_instance(model=model, rms_norm=False, swiglu=True)
    _apply_liger_kernel("llama", rms_norm=True, rope=True)
    assert seen == [(False, model), (True, None)]
    assert not patched_names(model)


# Patching a module by hand


def test_a_method_is_bound_to_one_instance():
    module, other = nn.Linear(2, 2), nn.Linear(2, 2)
    monkey_patch._bind_method_to_module(module, "forward", lambda self, x: (self, x))
    assert module(1) == (module, 1) and "forward" not in other.__dict__


@pytest.mark.parametrize("model_type, options", [("llama", {}), ("gemma", dict(offset=1.0, casting_mode="gemma"))])
def test_a_norm_patched_by_hand_computes_the_same(model_type, options):
    norm = tiny_model(model_type).model.norm
    x = torch.randn(3, 64)
    wanted = norm(x)
    monkey_patch._patch_rms_norm_module(norm, in_place=False, **options)
    assert type(norm.forward.__self__) is type(norm) and norm.forward.__func__ is ours.LigerRMSNorm.forward
    assert norm.variance_epsilon == 1e-6 and norm.in_place is False
    torch.testing.assert_close(norm(x), wanted)


def test_a_layer_norm_patched_by_hand_computes_the_same():
    norm = nn.LayerNorm(16, eps=1e-3)
    x = torch.randn(3, 16) * 0.1
    wanted = norm(x)
    monkey_patch._patch_layer_norm_module(norm)
    assert norm.forward.__func__ is ours.LigerLayerNorm.forward
    torch.testing.assert_close(norm(x), wanted)


def test_an_mlp_patched_by_hand_computes_the_same():
    for model_type, patch in (
        ("llama", lambda m: monkey_patch._patch_swiglu_module(m, ours.LigerSwiGLUMLP)),
        ("phi3", lambda m: monkey_patch._patch_swiglu_module(m, ours.LigerPhi3SwiGLUMLP)),
        ("gemma", monkey_patch._patch_geglu_module),
    ):
        mlp = tiny_model(model_type).model.layers[0].mlp
        x = torch.randn(3, 64)
        wanted = mlp(x)
        patch(mlp)
        assert mlp.forward.__func__.__module__.startswith("liger_kernel.")
        torch.testing.assert_close(mlp(x), wanted)


def test_what_a_hand_patched_is_left_to_it():
    model = tiny_model("llama")
    monkey_patch._patch_rms_norm_module(model.model.norm)
    row = next(r for r in apply_liger_kernel(model, **BODY).rows if r.module == "model.norm")
    assert row.reason == "its forward belongs to liger_kernel.transformers.rms_norm.LigerRMSNorm.forward"


def test_modules_that_peft_trains_a_copy_of_are_both_patched_by_hand():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"])
    wrapper = peft.get_peft_model(tiny_model("llama"), config).base_model.model.model.norm
    monkey_patch._patch_rms_norm_module(wrapper)
    parts = [wrapper.original_module, *wrapper.modules_to_save.values()]
    assert len(parts) == 2 and all(p.forward.__func__ is ours.LigerRMSNorm.forward for p in parts)


# The package


def test_the_stub_is_fresh():
    assert _stub.PATH.read_text() == _stub.text(), "run python -m liger_kernel.transformers._stub"


def test_the_engine_is_not_imported_with_the_package():
    code = (
        "import sys, liger_kernel.transformers;"
        "print([m for m in sys.modules if m == 'transformers' or m.endswith(('monkey_patch', 'auto_model', 'patch'))"
        " and m.startswith('liger_kernel')])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_the_older_name_of_the_trainer_entry():
    module = importlib.import_module("liger_kernel.transformers.trainer_integration")
    assert module._apply_liger_kernel is _apply_liger_kernel
