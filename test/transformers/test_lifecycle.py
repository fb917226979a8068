"""What else is done to a model in its life: offloading, adapters, quantisation, other flags, a second call."""

import copy
import inspect
import time
from types import MethodType

import pytest
import torch
from torch import nn

from support import assert_trains_as, patched_names, release_ropes, tiny_model

transformers = pytest.importorskip("transformers")

from liger_kernel.transformers import apply_liger_kernel, revert_liger_kernel  # noqa: E402
from liger_kernel.transformers.kinds import probe  # noqa: E402

BODY = dict(fused_linear_cross_entropy=False)  # everything but the head
IDS = torch.arange(3, 27).view(2, 12)


@pytest.fixture(autouse=True)
def no_rope_left():
    yield
    release_ropes()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


# Cost


def test_a_second_call_verifies_nothing_anew(monkeypatch):
    model = tiny_model("llama")
    apply_liger_kernel(model)
    monkeypatch.setattr(probe, "twin", lambda *args, **kwargs: pytest.fail("verified again"))
    apply_liger_kernel(model)


def test_a_model_of_a_hundred_large_layers_is_patched_in_two_seconds():
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(num_hidden_layers=100))
    probe._verified.clear()
    start = time.process_time()
    report = apply_liger_kernel(model)
    assert time.process_time() - start < 2
    assert len(report.patched) == 303 and not report.left


# Whose settings count


def test_two_models_of_one_class_have_flags_of_their_own():
    plain, norms, mlps = (tiny_model("llama") for _ in range(3))
    apply_liger_kernel(norms, swiglu=False, fused_linear_cross_entropy=False)
    apply_liger_kernel(mlps, rms_norm=False, cross_entropy=True)
    assert all(name.endswith("norm") for name in patched_names(norms))
    assert all(name.endswith("mlp") for name in patched_names(mlps))
    assert not patched_names(plain) and "forward" not in plain.__dict__
    revert_liger_kernel(norms)
    assert not patched_names(norms) and len(patched_names(mlps)) == 2


def test_one_class_is_patched_layer_by_layer_as_its_configuration_says():
    """Gemma 3n's MLPs are of one class, sparse in the first layers and plain in the others."""
    if "gemma3n_text" not in transformers.models.auto.configuration_auto.CONFIG_MAPPING:
        pytest.skip("this transformers has no Gemma 3n")
    from models import tiny

    config = tiny.tiny_config("gemma3n_text")
    config.activation_sparsity_pattern = [0.95] + [0.0] * (config.num_hidden_layers - 1)
    model = transformers.AutoModelForCausalLM.from_config(config)
    mlps = [r for r in apply_liger_kernel(model).rows if r.kind == "mlp"]
    assert "fits no known formula" in mlps[0].reason
    assert [r.kernel for r in mlps[1:]] == ["geglu gelu_tanh"] * (config.num_hidden_layers - 1)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention", "flash_attention_2"])
def test_the_attention_that_the_user_chose_stays(attention):
    flash = attention == "flash_attention_2"  # cannot be asked for where its package is not installed
    model = tiny_model("llama", attn_implementation="eager" if flash else attention).eval()
    if flash:
        model.config._attn_implementation = attention
    runs = attention in ("eager", "sdpa")  # flex attention compiles on a CPU, which takes a minute
    wanted = logits(model) if runs else None
    apply_liger_kernel(model)
    assert model.config._attn_implementation == attention
    assert wanted is None or torch.equal(logits(model), wanted)


# The kernels package, of which transformers makes modules and functions known: modules by an attribute of their class,
# functions by making modules of them. Its newest version is not the one that every transformers takes: hence by hand.


def rotary_module(function):
    """A module as kernels.use_kernel_forward_from_hub makes one of a function."""

    class Func(nn.Module):
        kernel_layer_name = "rotary_pos_emb"

        def forward(self, *args, **kwargs):
            return function(*args, **kwargs)

    signature = inspect.signature(function)
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    Func.forward.__signature__ = signature.replace(parameters=[this, *signature.parameters.values()])
    return Func()


@pytest.fixture
def modeling(monkeypatch):
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", rotary_module(modeling_llama.apply_rotary_pos_emb))
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "kernel_layer_name", "RMSNorm", raising=False)
    yield modeling_llama
    release_ropes()


def kernelize(model):
    """What use_kernels does to a module for which there is no kernel."""
    for module in model.modules():
        if hasattr(type(module), "kernel_layer_name"):
            module.forward = MethodType(type(module).forward, module)


def running(model):
    """The modules whose forward is ours."""
    own = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    return {name for name, f in own.items() if f is not None and f.__func__.__module__.startswith("liger_kernel")}


def test_a_rotation_that_the_kernels_package_made_a_module_of_is_patched_and_comes_back(modeling):
    was = modeling.apply_rotary_pos_emb
    model = tiny_model("llama").eval()
    wanted = logits(model)
    assert not apply_liger_kernel(model).left
    assert inspect.isfunction(modeling.apply_rotary_pos_emb)
    assert list(inspect.signature(modeling.apply_rotary_pos_emb).parameters)[:4] == ["q", "k", "cos", "sin"]
    assert torch.equal(logits(model), wanted)
    revert_liger_kernel(model)
    assert modeling.apply_rotary_pos_emb is was


def test_use_kernels_owns_its_modules_and_the_report_says_so(modeling):
    model = tiny_model("llama")
    model._use_kernels = True
    kernelize(model)
    left = {r.kind: r.reason for r in apply_liger_kernel(model).left}
    assert left.keys() == {"norm", "rope"} and all("use_kernels=True" in reason for reason in left.values())
    model._use_kernels = False
    assert not apply_liger_kernel(model).left


def test_a_patch_that_was_written_over_is_not_reported_but_bound_again(modeling):
    model = tiny_model("llama")
    apply_liger_kernel(model)
    kernelize(model)
    assert not any(name.endswith("norm") for name in running(model))
    assert not apply_liger_kernel(model).left
    assert sum(name.endswith("norm") for name in running(model)) == 5


# Where weights are


@pytest.mark.parametrize("patched", ["before", "after"])
def test_layers_offloaded_by_a_device_map_run_patched_under_their_hooks(patched, tmp_path):
    pytest.importorskip("accelerate")
    tiny_model("llama").save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "lm_head": "cpu",
              "model.layers.1": "disk", "model.norm": "disk"}  # fmt: skip
    load = transformers.AutoModelForCausalLM.from_pretrained
    wanted = logits(load(tmp_path / "model").eval())
    if patched == "after":
        model = load(tmp_path / "model", device_map=places, offload_folder=tmp_path / "off").eval()
        report = apply_liger_kernel(model)
    else:
        from accelerate import dispatch_model

        model = load(tmp_path / "model").eval()
        report = apply_liger_kernel(model)
        model = dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path / "off")
    assert model.model.norm.weight.device.type == "meta" and not report.left
    assert torch.equal(logits(model), wanted)
    assert model.model.norm.weight.device.type == "meta"


# Linears that are more than a weight


@pytest.mark.parametrize("patched", ["before", "after"])
def test_adapters_train_the_same_patched_before_or_after_them(patched):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "gate_proj", "down_proj"], r=2, init_lora_weights=False)
    model, plain = tiny_model("llama"), None
    if patched == "before":
        plain = copy.deepcopy(model)
        apply_liger_kernel(model, **BODY)
        torch.manual_seed(1)
        plain = peft.get_peft_model(plain, config)
        torch.manual_seed(1)
        model = peft.get_peft_model(model, config)
    else:
        model = peft.get_peft_model(model, config)
        plain = copy.deepcopy(model)
        apply_liger_kernel(model, **BODY)
    assert len(patched_names(model)) == 7
    assert_trains_as(model, plain, input_ids=IDS, labels=IDS, use_cache=False)


class Opaque(nn.Module):
    """A quantised linear as some libraries have it: it can be called, and has no weight to read."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features, self._linear = linear.in_features, linear.out_features, [linear]

    @property
    def weight(self):
        raise RuntimeError("packed")

    def forward(self, x):
        return self._linear[0](x)


def test_quantised_linears_are_called_and_never_read():
    model = tiny_model("llama").eval()
    wanted = logits(model)
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, Opaque(getattr(layer.mlp, name)))
    report = apply_liger_kernel(model, **BODY)
    assert {"model.layers.0.mlp", "model.layers.1.mlp"} <= {r.module for r in report.patched}
    assert torch.equal(logits(model), wanted)


def test_a_4_bit_model_with_adapters_trains_with_the_same_loss(tmp_path, device):
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    tiny_model("llama").save_pretrained(tmp_path)
    quantised = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    losses = []
    for patched in (False, True):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=quantised, device_map={"": device.type}
        )
        torch.manual_seed(1)
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "gate_proj", "down_proj"], r=2))
        if patched:
            assert not apply_liger_kernel(model).left
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
        ids, steps = IDS.to(device), []
        for _ in range(5):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            steps.append(loss.item())
        losses.append(torch.tensor(steps))
    assert losses[0][-1] < losses[0][0] - 0.01, "nothing was learned, so nothing is compared"
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)  # fp32 rounding through five steps
