"""Every function and every key that upstream has, and one for each other type of transformers."""

import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
from torch import nn

from support import patched_names, release_ropes, tiny_model

pytest.importorskip("transformers")

import transformers  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES  # noqa: E402

import liger_kernel.transformers as ours  # noqa: E402
from liger_kernel.transformers import _apply_liger_kernel_to_instance, monkey_patch, revert_liger_kernel  # noqa: E402
from liger_kernel.transformers.models import APPLY_PREFIX, MODELS, TINY  # noqa: E402
from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN  # noqa: E402

LOSS = "cross_entropy fused_linear_cross_entropy"
DECODER = f"rope {LOSS} rms_norm swiglu model"
GEMMA_VISION = f"rope {LOSS} layer_norm rms_norm geglu model"
LLAMA_VISION = f"rope {LOSS} layer_norm rms_norm swiglu model"
GEMMA = f"rope {LOSS} rms_norm geglu model"
# liger-kernel 0.8.5: function -> its positional parameters
UPSTREAM = {
    "llava": f"{LOSS} model",
    "llama4": f"{DECODER} layer_norm",
    "mllama": LLAMA_VISION,
    "nemotron": f"relu_squared {LOSS} model",
    "muse_glimmer": LLAMA_VISION,
    "pixtral": "rope rms_norm swiglu model",
    "gemma": GEMMA,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "gemma4_text": GEMMA,
    "gemma3": GEMMA_VISION,
    "gemma4": GEMMA_VISION,
    "paligemma": GEMMA_VISION,
    "qwen2_vl": f"rope {LOSS} rms_norm layer_norm swiglu model",
    "internvl": f"{LOSS} rms_norm layer_norm model",
    "smolvlm": f"{LOSS} rms_norm layer_norm model",
} | dict.fromkeys(
    (
        "granite", "llama", "smollm3", "ministral", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe",
        "gpt_oss", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "phi3", "olmo2", "olmo3", "glm4", "glm4v",
        "glm4v_moe", "falcon_h1", "qwen3_next", "qwen3_5", "qwen3_5_moe", "hunyuan_v1_dense",
        "hunyuan_v1_moe", "deepseek_v2", "deepseek_v3", "deepseek_v4", "exaone4",
    ),
    DECODER,
)  # fmt: skip
# a key of upstream's mapping -> the function it leads to, where that has another name
PARTS = {
    "llama4_text": "llama4",
    "mllama_text_model": "mllama",
    "qwen2_vl_text": "qwen2_vl",
    "qwen2_5_vl_text": "qwen2_5_vl",
    "qwen3_5_text": "qwen3_5",
    "qwen3_5_moe_text": "qwen3_5_moe",
    "qwen3_vl_text": "qwen3_vl",
    "qwen3_vl_moe_text": "qwen3_vl_moe",
}


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    for model_type in list(monkey_patch.arrange._arranged):
        revert_liger_kernel(model_type)
    release_ropes()


def positional(function):
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


def test_there_are_upstreams_53_keys_and_45_functions():
    assert len(UPSTREAM) == 45 and len(UPSTREAM) + len(PARTS) == 53
    assert set(UPSTREAM) == set(MODELS)


@pytest.mark.parametrize("name", UPSTREAM)
def test_a_function_has_upstreams_flags_in_upstreams_order(name):
    function = getattr(ours, APPLY_PREFIX + name)
    assert positional(function) == UPSTREAM[name].split()
    assert function.__name__ == APPLY_PREFIX + name
    assert function is MODEL_TYPE_TO_APPLY_LIGER_FN[name] is getattr(monkey_patch, APPLY_PREFIX + name)
    for parameter in inspect.signature(function).parameters.values():
        # everything verified is on, also where upstream's default was off
        assert parameter.default is (None if parameter.name == "model" else parameter.name != "cross_entropy")


@pytest.mark.parametrize("part", PARTS)
def test_the_part_of_a_family_leads_to_its_function(part):
    assert MODEL_TYPE_TO_APPLY_LIGER_FN[part] is getattr(ours, APPLY_PREFIX + PARTS[part])
    assert getattr(ours, APPLY_PREFIX + part) is MODEL_TYPE_TO_APPLY_LIGER_FN[part]


def test_every_type_of_transformers_has_a_function():
    assert set(CONFIG_MAPPING_NAMES) <= set(MODEL_TYPE_TO_APPLY_LIGER_FN)
    assert len(set(MODEL_TYPE_TO_APPLY_LIGER_FN)) == len(MODEL_TYPE_TO_APPLY_LIGER_FN)
    for model_type in ("stablelm", "bert", "gpt-sw3", "kosmos-2.5"):
        function = MODEL_TYPE_TO_APPLY_LIGER_FN[model_type]
        name = APPLY_PREFIX + re.sub(r"\W", "_", model_type)
        assert function.__name__ == name and getattr(ours, name) is function
        assert positional(function) == f"rope {LOSS} rms_norm layer_norm swiglu geglu relu_squared model".split()


def test_a_type_nobody_knows_has_none():
    assert "no_such_type" not in MODEL_TYPE_TO_APPLY_LIGER_FN and MODEL_TYPE_TO_APPLY_LIGER_FN.get(None) is None
    with pytest.raises(KeyError, match="no_such_type"):
        MODEL_TYPE_TO_APPLY_LIGER_FN["no_such_type"]
    with pytest.raises(AttributeError, match="no_such_type"):
        ours.apply_liger_kernel_to_no_such_type  # noqa: B018


def test_names_without_a_row_are_refused_politely_without_transformers(monkeypatch):
    monkeypatch.setattr(ours, "is_transformers_available", lambda: False)
    with pytest.raises(ImportError, match="needs transformers"):
        ours.apply_liger_kernel_to_qwen3_next  # noqa: B018
    with pytest.raises(AttributeError):
        ours.apply_liger_kernel_to_stablelm  # noqa: B018


def test_looking_a_row_up_imports_no_auto_mapping():
    code = (
        "import sys; from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as F;"
        "assert 'llama' in F and F['qwen2_vl_text'] is F['qwen2_vl'];"
        "print('transformers.models.auto.configuration_auto' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "False"


def test_the_mapping_is_changed_like_a_dict():
    with mock.patch.dict(MODEL_TYPE_TO_APPLY_LIGER_FN, {"mine": print}):
        assert MODEL_TYPE_TO_APPLY_LIGER_FN["mine"] is print and "mine" in list(MODEL_TYPE_TO_APPLY_LIGER_FN)
        del MODEL_TYPE_TO_APPLY_LIGER_FN["llama"]
        assert "llama" not in MODEL_TYPE_TO_APPLY_LIGER_FN and "llama" not in list(MODEL_TYPE_TO_APPLY_LIGER_FN)
    assert "mine" not in MODEL_TYPE_TO_APPLY_LIGER_FN
    assert MODEL_TYPE_TO_APPLY_LIGER_FN["llama"] is ours.apply_liger_kernel_to_llama


# What they do


def small(model_type, **config):
    """A language model of a type in one layer."""
    return tiny_model(model_type, 1, **config)


GENERIC = {
    "stablelm": {},
    "nemotron": {},
    "olmo3": {},
    "exaone4": {},
    "glm4": dict(head_dim=16),
    "ministral": dict(head_dim=16),
    "hunyuan_v1_dense": dict(head_dim=16),
    "qwen3_moe": dict(head_dim=16, num_experts=4, moe_intermediate_size=32),
    "deepseek_v3": dict(n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=32,
                        q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16,
                        num_key_value_heads=4, first_k_dense_replace=0),
}  # fmt: skip


@pytest.mark.parametrize("model_type", GENERIC)
def test_the_function_of_a_type_patches_its_norms_mlps_and_head(model_type):
    model = small(model_type, **GENERIC[model_type])
    report = getattr(ours, APPLY_PREFIX + model_type)(model=model)
    norms = {n for n, m in model.named_modules() if type(m).__name__.endswith(("RMSNorm", "LayerNorm"))}
    norms -= {n for n in norms if type(model.get_submodule(n)).__name__ == "NemotronLayerNorm1P"}
    assert norms <= patched_names(model)
    assert {r.module for r in report.patched if r.kind == "head"} == {"lm_head"}
    assert all(r.kind in ("norm", "rope", "mlp", "activation", "experts") for r in report.left), report


def test_the_arrangement_for_a_family_is_for_its_parts_too():
    if "llama4_text" not in CONFIG_MAPPING_NAMES:
        pytest.skip("the installed transformers has no Llama 4")
    ours.apply_liger_kernel_to_llama4(fused_linear_cross_entropy=False)
    text = small("llama4_text", num_local_experts=2, intermediate_size_mlp=64, head_dim=16, interleave_moe_layer_step=2)
    assert patched_names(text)
    revert_liger_kernel("llama4")
    assert not patched_names(text)


def test_a_part_of_a_family_is_not_warned_of(caplog):
    config = CONFIG_MAPPING["qwen2_vl_text"](**TINY, rope_parameters=dict(rope_type="default", mrope_section=[2, 3, 3]))
    text = transformers.AutoModel.from_config(config)
    ours.apply_liger_kernel_to_qwen2_vl(model=text)
    assert "is given a" not in caplog.text


def test_relu_squared_is_patched_and_its_flag_is_honoured():
    model = small("nemotron")
    x = torch.randn(3, 64)
    before = model.model.layers[0].mlp(x)
    report = ours.apply_liger_kernel_to_nemotron(model=model)
    name = "model.layers.0.mlp.act_fn"
    assert next(r for r in report.patched if r.module == name).kernel == "relu_squared"
    assert torch.equal(model.model.layers[0].mlp(x), before)
    ours.apply_liger_kernel_to_nemotron(relu_squared=False, model=model)
    assert name not in patched_names(model)


def test_other_activations_are_no_relu_squared():
    from liger_kernel.transformers.kinds import identify

    assert all(identify(m()) is None for m in (nn.ReLU, nn.SiLU, nn.GELU, nn.Identity, nn.Dropout, nn.Tanh))


def test_one_flag_of_two_counts_for_the_mlp_of_a_type_without_a_row():
    def mlps(**flags):
        model = small("stablelm")
        _apply_liger_kernel_to_instance(model=model, **flags)
        return [n for n in patched_names(model) if n.endswith("mlp")]

    assert mlps() and mlps(swiglu=True, geglu=False)
    assert not mlps(swiglu=False) and not mlps(geglu=False)


@pytest.mark.parametrize("name", ["llava", "internvl", "smolvlm", "nemotron"])
def test_what_upstream_hands_on_to_the_text_model_is_taken_by_name(name):
    function = getattr(ours, APPLY_PREFIX + name)
    assert "rope" in inspect.signature(function).parameters and "rope" not in positional(function)
    model = small("llama")
    function(model=model, rope=False, fused_linear_cross_entropy=False)
    with pytest.raises(TypeError, match=f"^{APPLY_PREFIX}{name}\\(\\) got an unexpected keyword argument 'spiral'"):
        function(model=model, spiral=True)


class _Remote(transformers.LlamaForCausalLM):
    """A class whose code is not in transformers."""


def test_a_model_whose_code_is_not_in_transformers_is_patched():
    config = small("llama").config
    config.model_type = "no_such_type"
    model = _Remote(config)
    _apply_liger_kernel_to_instance(model=model, rms_norm=False, unknown_flag=True)
    assert {n.split(".")[-1] for n in patched_names(model)} == {"mlp"}


@pytest.mark.parametrize("kind", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_heads_that_are_no_language_models_are_left_and_the_body_is_patched(kind):
    config = small("llama").config
    config.num_labels = 3
    theirs = getattr(transformers, f"LlamaFor{kind}")(config).eval()
    x = torch.randint(3, 200, (2, 8))
    wanted = theirs(input_ids=x)[0]
    report = _report(theirs)
    assert {n.split(".")[-1] for n in patched_names(theirs)} == {
        "norm", "mlp", "input_layernorm", "post_attention_layernorm"
    }  # fmt: skip
    assert [r.kind for r in report.left] == ["head"]
    torch.testing.assert_close(theirs(input_ids=x)[0], wanted)


def _report(model):
    return MODEL_TYPE_TO_APPLY_LIGER_FN[model.config.model_type](model=model)


def masked_lm(model_type):
    no_dropout = dict.fromkeys(
        ["hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"], 0.0
    )
    sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
                 embedding_size=32, dim=32, n_layers=1, n_heads=2, hidden_dim=48)  # fmt: skip
    return transformers.AutoModelForMaskedLM.from_config(CONFIG_MAPPING[model_type](**sizes, **no_dropout))


ENCODERS = ["albert", "bert", "deberta-v2", "distilbert", "electra", "mpnet", "roberta"]


@pytest.mark.parametrize("model_type", ENCODERS)
def test_encoders_train_their_masked_head_fused(model_type):
    model = masked_lm(model_type).train()
    x = torch.randint(3, 60, (2, 8))
    labels = x.masked_fill(torch.arange(8) % 3 > 0, -100)

    def step():
        model.zero_grad()
        output = model(input_ids=x, labels=labels)
        output.loss.backward()
        return output, [p.grad for p in model.parameters()]

    (theirs, wanted), _ = step(), _report(model)
    ours, found = step()
    assert type(ours.logits).__name__ == "LazyLogits"
    torch.testing.assert_close(ours.loss, theirs.loss)
    assert all((f is None) == (w is None) for f, w in zip(found, wanted, strict=True))
    # fp32 rounding of sums in another order
    torch.testing.assert_close(*([g for g in gs if g is not None] for gs in (found, wanted)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model_type", ENCODERS)
def test_encoders_have_their_layer_norms_patched(model_type):
    model = masked_lm(model_type).eval()
    x = torch.randint(3, 60, (2, 8))
    wanted = model(input_ids=x).logits
    _report(model)
    norms = {n for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
    assert norms and norms <= patched_names(model)
    torch.testing.assert_close(model(input_ids=x).logits, wanted)


# The document

DOCUMENT = Path(__file__).parents[2] / "docs/add-a-model.md"


def test_both_ways_of_the_document_work(monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert len(blocks) == 3
    document = ModuleType("document")
    monkeypatch.setitem(sys.modules, "document", document)
    with mock.patch.dict(MODEL_TYPE_TO_APPLY_LIGER_FN), mock.patch.dict(MODELS):
        for block in blocks:
            exec(compile(block, str(DOCUMENT), "exec"), vars(document))
        assert MODEL_TYPE_TO_APPLY_LIGER_FN["mymodel"] is document.apply_liger_kernel_to_mymodel
    printed = capsys.readouterr().out
    assert "MyModel: 9 of 9 found are patched" in printed
    assert "Flags: rope, cross_entropy, fused_linear_cross_entropy, layer_norm." in printed
