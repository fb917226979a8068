"""AutoLigerKernelForCausalLM: our flags are ours, every other keyword goes through."""

import pytest
import torch

from support import patched_names, tiny_model

pytest.importorskip("transformers")

from liger_kernel.transformers import AutoLigerKernelForCausalLM, apply_liger_kernel  # noqa: E402
from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN  # noqa: E402

pytestmark = pytest.mark.usefixtures("on_device")


@pytest.fixture(params=["from_config", "from_pretrained"])
def load(request, tmp_path):
    def load(model, **kwargs):
        if request.param == "from_config":
            return AutoLigerKernelForCausalLM.from_config(model.config, **kwargs)
        model.save_pretrained(tmp_path)
        loaded = AutoLigerKernelForCausalLM.from_pretrained(tmp_path, **kwargs)
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value.to(loaded.device, loaded.dtype)), name
        return loaded

    return load


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "phi3"])
def test_the_model_is_patched(load, model_type):
    model = tiny_model(model_type)
    loaded = load(model)
    apply_liger_kernel(model)
    assert type(loaded) is type(model)
    assert patched_names(loaded) == patched_names(model)
    assert "forward" in loaded.__dict__ and "forward" in loaded.lm_head.__dict__


def test_flags_are_consumed_and_other_keywords_go_through(load):
    flags = dict(rms_norm=False, rope=False, fused_linear_cross_entropy=False)
    loaded = load(tiny_model("llama"), **flags, dtype=torch.bfloat16, attn_implementation="eager")
    assert {n.split(".")[-1] for n in patched_names(loaded)} == {"mlp"}
    assert loaded.dtype is torch.bfloat16 and loaded.config._attn_implementation == "eager"
    assert not [flag for flag in flags if hasattr(loaded.config, flag)]


def test_a_type_without_a_row_is_patched_all_the_same(load):
    from transformers import StableLmConfig, StableLmForCausalLM

    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, vocab_size=128)
    model = StableLmForCausalLM(StableLmConfig(**sizes, num_key_value_heads=2))
    assert "model.layers.0.mlp" in patched_names(load(model))


def test_a_users_own_entry_counts(load, monkeypatch):
    seen = []
    monkeypatch.setitem(MODEL_TYPE_TO_APPLY_LIGER_FN, "llama", lambda swiglu=True, model=None: seen.append(swiglu))
    loaded = load(tiny_model("llama"), swiglu=False, rope=True)
    assert seen == [False] and not patched_names(loaded)
