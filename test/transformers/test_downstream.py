"""What other projects do with the names, done as they do it."""

import inspect
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from support import patched_names, release_ropes, tiny_model

pytest.importorskip("transformers")

import transformers  # noqa: E402

import liger_kernel.transformers as ours  # noqa: E402
from liger_kernel.transformers import AutoLigerKernelForCausalLM, monkey_patch, revert_liger_kernel  # noqa: E402
from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN  # noqa: E402

FLAGS = ("rope", "cross_entropy", "fused_linear_cross_entropy", "rms_norm", "layer_norm")


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    for model_type in list(monkey_patch.arrange._arranged):
        revert_liger_kernel(model_type)
    release_ropes()


def batch():
    ids = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(1))
    return dict(input_ids=ids, labels=ids.clone())


def step(model):
    model.zero_grad()
    loss = model(**batch()).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("value", [None, True, False])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "stablelm"])
def test_axolotl_passes_every_flag_of_the_signature(model_type, value):
    function = MODEL_TYPE_TO_APPLY_LIGER_FN[model_type]
    parameters = inspect.signature(function).parameters
    kwargs = {flag: value for flag in FLAGS if flag in parameters}
    kwargs["cross_entropy"] = None
    kwargs["geglu" if "geglu" in parameters else "swiglu"] = value
    function(**kwargs)
    model = tiny_model(model_type, 1)
    assert bool(patched_names(model)) is (value is not False)
    assert ("forward" in model.lm_head.__dict__) is (value is not False)


def test_axolotl_inspects_any_function_of_the_mapping():
    for model_type in MODEL_TYPE_TO_APPLY_LIGER_FN:
        parameters = inspect.signature(MODEL_TYPE_TO_APPLY_LIGER_FN[model_type]).parameters
        assert all(p.default is None or isinstance(p.default, bool) for p in parameters.values()), model_type


def test_axolotl_puts_our_classes_and_functions_into_modeling_modules(monkeypatch):
    """In the first run its own, in the second with ours in their places."""
    modeling = transformers.models.llama.modeling_llama
    found = []
    for replaced in (False, True):
        if replaced:
            monkeypatch.setattr(modeling, "LlamaRMSNorm", ours.LigerRMSNorm)
            monkeypatch.setattr(modeling, "LlamaMLP", lambda config, **kwargs: ours.LigerSwiGLUMLP(config, **kwargs))
            monkeypatch.setattr(modeling, "apply_rotary_pos_emb", ours.liger_rotary_pos_emb)
            from liger_kernel.transformers.functional import liger_cross_entropy

            monkeypatch.setattr(transformers.loss.loss_utils.nn.functional, "cross_entropy", liger_cross_entropy)
        torch.manual_seed(3)
        model = tiny_model("llama", 1)
        found.append(step(model))
        assert isinstance(model.model.norm, ours.LigerRMSNorm) is replaced
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_axolotl_takes_classes_for_those_of_torch(monkeypatch):
    from liger_kernel.transformers.cross_entropy import LigerCrossEntropyLoss
    from liger_kernel.transformers.layer_norm import LigerLayerNorm

    x, target = torch.randn(6, 10, requires_grad=True), torch.tensor([1, 2, -100, 0, 9, 4])
    wanted = nn.LayerNorm(10, eps=1e-5)(x), nn.CrossEntropyLoss()(x, target)
    monkeypatch.setattr(nn, "LayerNorm", LigerLayerNorm)
    monkeypatch.setattr(nn, "CrossEntropyLoss", LigerCrossEntropyLoss)
    torch.testing.assert_close((nn.LayerNorm(10, eps=1e-5)(x), nn.CrossEntropyLoss()(x, target)), wanted)


def test_axolotl_wraps_the_room_and_the_module_of_the_head(monkeypatch):
    import liger_kernel.ops.fused_linear_cross_entropy

    room, module, called = liger_kernel.ops.fused_linear_cross_entropy, ours.LigerFusedLinearCrossEntropyLoss, []
    for name in ("fused_linear_cross_entropy_forward", "fused_linear_cross_entropy_backward"):
        own = torch.compiler.disable(getattr(room, name))
        monkeypatch.setattr(room, name, lambda *a, _own=own, _name=name, **k: called.append(_name) or _own(*a, **k))
    constructor = module.__init__

    def scaled(self, *args, **kwargs):
        constructor(self, *args, **kwargs | dict(use_token_scaling=True))

    x, weight, target = torch.randn(6, 8, requires_grad=True), torch.randn(11, 8), torch.arange(6)
    wanted = module(use_token_scaling=True)(weight, x, target)
    plain = module()(weight, x, target)
    monkeypatch.setattr(module, "__init__", scaled)
    called.clear()
    found = module()(weight, x, target)
    found.backward()
    assert torch.equal(found, wanted) and not torch.equal(found, plain)
    assert called == ["fused_linear_cross_entropy_forward", "fused_linear_cross_entropy_backward"]


def test_axolotl_subclasses_the_geglu_mlp():
    class WithIndex(ours.LigerGEGLUMLP):
        def __init__(self, config, layer_idx=None):
            super().__init__(config)

    config = SimpleNamespace(hidden_size=8, intermediate_size=12, hidden_activation="gelu_pytorch_tanh")
    assert WithIndex(config, 3)(torch.randn(2, 8)).shape == (2, 8)


def test_veomni_rotates_one_tensor_beside_an_uninitialised_one(impl, device):
    from liger_kernel.ops.rope import rope_backward, rope_forward

    q, dummy = torch.randn(1, 3, 5, 16, device=device), torch.empty(1, 1, 5, 16, device=device).fill_(float("nan"))
    angle = torch.rand(1, 5, 8, device=device)
    cos, sin = (torch.cat((t, t), -1) for t in (angle.cos(), angle.sin()))
    y, _, cos_out, sin_out = rope_forward(q, dummy, cos, sin)
    torch.testing.assert_close(y, ours.liger_rotary_pos_emb(q, q[:, :1], cos, sin)[0])
    back, _ = rope_backward(y, dummy, cos_out, sin_out)
    torch.testing.assert_close(back, q)  # a rotation's transpose is its inverse


def test_internvl_binds_methods_to_modules_of_its_own():
    class InternLM2MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w3, self.w2 = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x):
            return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))

    mlp, x = InternLM2MLP(), torch.randn(4, 8)
    wanted = mlp(x)
    monkey_patch._bind_method_to_module(mlp, "forward", ours.LigerBlockSparseTop2MLP.forward)
    torch.testing.assert_close(mlp(x), wanted)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe",
                                  "qwen3_5_moe_text"])  # fmt: skip
def test_llama_factory_drives_every_parameter_but_the_model(name):
    function = getattr(ours, f"apply_liger_kernel_to_{name}")
    ops = {p: v.default for p, v in inspect.signature(function).parameters.items() if p != "model"}
    assert all(isinstance(default, bool) for default in ops.values())
    model = tiny_model("qwen3", 1)
    function(**dict.fromkeys(ops, False) | {"rms_norm": True}, model=model)
    assert patched_names(model) and all("norm" in n for n in patched_names(model))
    function(**ops | dict(fused_linear_cross_entropy=False, cross_entropy=True), model=model)  # it needs the logits
    assert isinstance(model(**batch()).logits, torch.Tensor)


def test_nemo_patches_a_class_of_its_own_with_mistrals_function():
    class Bidirectional(transformers.MistralModel):
        pass

    model = Bidirectional(tiny_model("mistral", 1).config)
    ours.apply_liger_kernel_to_mistral(model=model, rope=False, cross_entropy=False, fused_linear_cross_entropy=False)
    assert {n.split(".")[-1] for n in patched_names(model)} == {
        "mlp", "norm", "input_layernorm", "post_attention_layernorm"
    }  # fmt: skip


def test_oumi_applies_by_type_after_the_model_is_built():
    model = tiny_model("llama", 1)
    ours._apply_liger_kernel("llama")
    assert not patched_names(model)
    assert type(model(**batch()).logits).__name__ == "LazyLogits" and patched_names(model)


def test_skyrl_builds_on_the_meta_device_and_fills_in_later():
    config = tiny_model("llama", 1).config
    with torch.device("meta"):
        model = AutoLigerKernelForCausalLM.from_config(config, trust_remote_code=True)
    assert model.lm_head.weight.is_meta and patched_names(model)
    plain = tiny_model("llama", 1)
    model = model.to_empty(device="cpu")
    model.load_state_dict(plain.state_dict())
    model.model.rotary_emb.inv_freq.copy_(plain.model.rotary_emb.inv_freq)
    torch.testing.assert_close(model.train()(**batch()).loss, plain(**batch()).loss)


@pytest.mark.parametrize("method", ["from_pretrained", "from_config"])
def test_every_keyword_that_is_no_flag_goes_through(method, monkeypatch):
    seen, model = [], tiny_model("llama", 1)

    def recorded(cls, *args, **kwargs):
        seen.append((args, kwargs))
        return model

    monkeypatch.setattr(transformers.AutoModelForCausalLM, method, classmethod(recorded))
    keywords = dict(
        config=model.config, revision="main", trust_remote_code=True, low_cpu_mem_usage=True, from_tf=False,
        attn_implementation="flash_attention_2", quantization_config=object(), torch_dtype=torch.bfloat16, dtype="auto",
        device_map="auto", use_cache=False, experts_implementation="eager",
    )  # fmt: skip
    if method == "from_config":
        del keywords["config"]
    getattr(AutoLigerKernelForCausalLM, method)("path", **keywords, fused_linear_cross_entropy=False, swiglu=True)
    assert seen == [(("path",), keywords)]
    assert patched_names(model) and "forward" not in model.lm_head.__dict__


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM

class RemoteConfig(LlamaConfig):
    model_type = "remote_llama"

class RemoteForCausalLM(LlamaForCausalLM):
    config_class = RemoteConfig
"""


def test_a_model_whose_code_comes_with_it_is_loaded_and_patched(tmp_path, monkeypatch):
    from transformers import dynamic_module_utils

    folder, cache = tmp_path / "remote_model", tmp_path / "modules"
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
    monkeypatch.syspath_prepend(str(cache))
    plain = tiny_model("llama", 1)
    plain.save_pretrained(folder)
    (folder / "modeling_remote.py").write_text(REMOTE)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "remote_llama",
        "architectures": ["RemoteForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_remote.RemoteConfig",
            "AutoModelForCausalLM": "modeling_remote.RemoteForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoLigerKernelForCausalLM.from_pretrained(
        pretrained_model_name_or_path=folder, trust_remote_code=True, rope=False
    )
    shutil.rmtree(cache)
    assert type(model).__module__.startswith("transformers_modules.")
    torch.testing.assert_close(model.train()(**batch()).loss, plain(**batch()).loss)
    assert type(model(**batch()).logits).__name__ == "LazyLogits"
    assert {n.split(".")[-1] for n in patched_names(model)} == {
        "mlp", "norm", "input_layernorm", "post_attention_layernorm"
    }  # fmt: skip
