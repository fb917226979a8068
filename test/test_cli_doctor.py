"""`liger-kernel doctor`: what would be patched, from a configuration alone."""

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("rich")

import transformers  # noqa: E402

from liger_kernel.cli import doctor, main  # noqa: E402
from liger_kernel.transformers import apply_liger_kernel, revert_liger_kernel  # noqa: E402

SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=1024)


@pytest.fixture
def folder(tmp_path):
    """A model's folder with its configuration and no weights."""
    config = transformers.LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path)
    return str(tmp_path)


def test_it_says_what_is_patched_and_what_that_saves(folder, capsys):
    assert main(["doctor", folder, "--batch", "2", "--seq", "64"]) == 0
    out = capsys.readouterr().out
    assert "LlamaForCausalLM: 9 of 9 found are patched" in out
    assert "norm: 5 of 5 patched, worst verified error" in out
    assert "fused_linear_cross_entropy linear" in out
    assert "Estimated for 2 x 64 tokens in bfloat16, 0.2 M parameters" in out
    assert "logits and loss    1.6 MB -> " in out  # 12 bytes for each of 128 x 1024 logits
    assert "less kept for the backward" in out


def test_the_json_has_the_report_and_the_estimate(folder, capsys):
    assert main(["doctor", folder, "--json", "--dtype", "float32"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "LlamaForCausalLM" and not found["left"] and len(found["patched"]) == 9
    estimate = found["estimate"]
    assert (estimate["batch"], estimate["seq"], estimate["dtype"]) == (1, 2048, "float32")
    assert estimate["kinds"]["mlp"]["patched"] == estimate["kinds"]["mlp"]["found"] == 2
    assert estimate["head"]["pattern"] == "fused_linear_cross_entropy linear"
    assert 0 < estimate["head"]["fused"] < estimate["head"]["unfused"] == 12 * 2048 * 1024


def test_a_type_is_enough_and_what_is_left_has_its_reason(monkeypatch, capsys):
    config = transformers.LlamaConfig(**SIZES, hidden_act="relu")
    mapping = {"llama": lambda: config}
    monkeypatch.setattr("transformers.models.auto.configuration_auto.CONFIG_MAPPING", mapping)
    assert main(["doctor", "llama", "--seq", "32"]) == 0
    out = capsys.readouterr().out
    assert "mlp: 0 of 2 patched" in out and "fits no known formula" in out


def test_a_model_without_a_language_head_says_so(tmp_path, capsys):
    transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48
    ).save_pretrained(tmp_path)
    assert main(["doctor", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "logits and loss    no fused head" in out and "activations        unknown" in out


@pytest.mark.parametrize("name", ["no-such-model-type", "./no/such/folder"])
def test_what_is_no_model_exits_2_with_a_sentence(name, capsys):
    assert main(["doctor", name]) == 2
    assert f"{name} is no model folder, hub id or model type" in capsys.readouterr().err


def test_what_is_saved_is_what_a_model_with_values_keeps_less():
    """The same count on a CPU, where the tensors exist and have addresses."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).train()
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).train()
    ids = torch.zeros(2, 16, dtype=torch.long)

    def kept():
        sizes = {}
        own = {p.data_ptr() for p in model.parameters()}

        def pack(t):
            if t.untyped_storage().data_ptr() not in own:
                sizes[t.untyped_storage().data_ptr()] = t.untyped_storage()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            held = model.model(input_ids=ids)
        del held
        return sum(s.nbytes() for s in sizes.values())

    before, meta_before = kept(), doctor.kept_bytes(empty, 2, 16)
    apply_liger_kernel(model)
    apply_liger_kernel(empty)
    after, meta_after = kept() - doctor._remade(model, 32), doctor.kept_bytes(empty, 2, 16)
    revert_liger_kernel(model)
    revert_liger_kernel(empty)
    assert before - after == meta_before - meta_after > 0
