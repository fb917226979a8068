"""The loss path of a fused head: its values, and every hook that other projects replace."""

import copy
import importlib

import pytest
import torch
import torch.nn.functional as F

from support import tiny_model

pytest.importorskip("transformers")

from liger_kernel.transformers import functional  # noqa: E402
from liger_kernel.transformers.head import fuse_head  # noqa: E402
from liger_kernel.transformers.model import loss_utils, output_classes  # noqa: E402

pytestmark = pytest.mark.usefixtures("on_device")
V, H = 61, 16


def batch():
    hidden, weight = torch.randn(2, 7, H), torch.randn(V, H)
    labels = torch.randint(0, V, (2, 7))
    labels[0, :3] = -100
    return hidden, weight, labels


def stock(hidden, weight, labels, **kwargs):
    from transformers.loss.loss_utils import ForCausalLMLoss

    return ForCausalLMLoss(F.linear(hidden, weight), labels, vocab_size=V, **kwargs)


@pytest.mark.parametrize("items", [None, 5, torch.tensor(5), torch.tensor(7.0)], ids=str)
def test_loss_is_transformers_loss(items):
    hidden, weight, labels = batch()
    loss = loss_utils.LigerForCausalLMLoss(hidden, weight, labels, H, num_items_in_batch=items)
    torch.testing.assert_close(loss, stock(hidden, weight, labels, num_items_in_batch=items))


def test_shift_labels_are_not_shifted_again():
    hidden, weight, labels = batch()
    loss = loss_utils.LigerForCausalLMLoss(hidden, weight, None, H, shift_labels=labels)
    torch.testing.assert_close(loss, stock(hidden, weight, None, shift_labels=labels))


def test_no_labels_at_all_is_an_error():
    hidden, weight, _ = batch()
    with pytest.raises(ValueError, match="labels or shift_labels"):
        loss_utils.LigerForCausalLMLoss(hidden, weight, None, H)


def test_what_transformers_passes_along_is_dropped_and_options_are_kept():
    hidden, weight, labels = batch()
    loss = loss_utils.LigerForCausalLMLoss(
        hidden, weight, labels, H, final_logit_softcapping=5.0, logit_scale=0.5, cache_position=None, use_cache=False
    )
    logits = 5.0 * torch.tanh(F.linear(hidden, weight) * 0.5 / 5.0)
    wanted = F.cross_entropy(logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1))
    torch.testing.assert_close(loss, wanted)


def test_requested_results_come_with_the_loss():
    hidden, weight, labels = batch()
    result = loss_utils.LigerForCausalLMLoss(
        hidden, weight, labels, H, num_items_in_batch=4, return_token_accuracy=True, return_predicted_tokens=True
    )
    assert isinstance(result, functional.CrossEntropyOutput)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:].reshape(-1)
    kept = shifted != -100
    top = F.linear(hidden, weight).argmax(-1).reshape(-1)
    torch.testing.assert_close(result.loss, stock(hidden, weight, labels, num_items_in_batch=4))
    torch.testing.assert_close(result.token_accuracy, (top == shifted)[kept].float().mean())
    assert torch.equal(result.predicted_tokens[kept], top[kept])


def test_unpacking_gives_four_values_of_any_result():
    loss, accuracy = torch.tensor(1.0), torch.tensor(0.5)
    unpack = loss_utils.unpack_cross_entropy_result
    assert unpack(loss) == (loss, None, None, None)
    assert unpack((loss, None, accuracy)) == (loss, None, accuracy, None)
    assert unpack(functional.CrossEntropyOutput(loss=loss, token_accuracy=accuracy)) == (loss, None, accuracy, None)


# The replacements, as axolotl, ms-swift and mini_trainer make them


@pytest.fixture
def model():
    model = tiny_model("gemma2")
    fuse_head(model)
    return model


def tokens():
    ids = torch.randint(3, 200, (2, 9))
    return dict(input_ids=ids, labels=ids.clone())


def test_a_replaced_functional_is_called_with_its_options(model, monkeypatch):
    own = functional.liger_fused_linear_cross_entropy
    seen = []

    def scaled(*args, **kwargs):
        seen.append(kwargs)
        return own(*args, **{**kwargs, "use_token_scaling": True})

    monkeypatch.setattr(functional, "liger_fused_linear_cross_entropy", scaled)
    given = tokens()
    loss = model(**given, num_items_in_batch=16).loss
    monkeypatch.undo()
    assert len(seen) == 1 and seen[0]["softcap"] == 30.0 and seen[0]["reduction"] == "sum"
    torch.testing.assert_close(loss, model(**given, num_items_in_batch=16, use_token_scaling=True).loss)
    assert loss < model(**given, num_items_in_batch=16).loss


def test_a_replaced_per_token_loss_reaches_the_output(model, monkeypatch):
    def per_token(
        hidden_states, lm_head_weight, target, num_items_in_batch=None, ignore_index=-100,
        final_logit_softcapping=None, **kwargs,
    ):  # fmt: skip
        return functional.liger_fused_linear_cross_entropy(
            hidden_states, lm_head_weight, target, reduction="none", ignore_index=ignore_index,
            softcap=final_logit_softcapping,
        )  # fmt: skip

    given = tokens()
    mean = model(**given).loss
    monkeypatch.setattr(loss_utils, "fixed_fused_linear_cross_entropy", per_token)
    losses = model(**given).loss
    assert losses.shape == (18,)
    torch.testing.assert_close(losses.sum() / 16, mean)  # the last token of each of the 2 rows predicts nothing


def test_a_replaced_causal_loss_is_called_with_keywords(model, monkeypatch):
    own = loss_utils.LigerForCausalLMLoss
    seen = []

    def sharded(hidden_states, *args, **kwargs):
        seen.append(sorted(kwargs))
        return own(hidden_states, *args, **kwargs)

    monkeypatch.setattr(loss_utils, "LigerForCausalLMLoss", sharded)
    model(**tokens())
    assert len(seen) == 1 and {"lm_head_weight", "labels", "hidden_size"} <= set(seen[0])


# The modules and classes that go with it


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3_moe", "smollm3"])
def test_lce_forward_fuses_the_head_for_one_call(name):
    lce_forward = importlib.import_module(f"liger_kernel.transformers.model.{name}").lce_forward
    model = tiny_model("llama")
    plain = copy.deepcopy(model)
    before = dict(model.__dict__)
    given = tokens()
    output = lce_forward(model, given["input_ids"], labels=given["labels"])
    assert type(output.logits).__name__ == "LazyLogits"
    assert model.__dict__ == before and "forward" not in model.lm_head.__dict__
    torch.testing.assert_close(output.loss, plain(**given).loss)


def test_lce_forward_bound_to_an_instance_runs_the_fused_forward():
    from types import MethodType

    from liger_kernel.transformers.model.llama import lce_forward

    model = tiny_model("llama")
    model.forward = MethodType(lce_forward, model)
    assert type(model(**tokens()).logits).__name__ == "LazyLogits"


def test_an_unknown_model_module_does_not_exist():
    with pytest.raises(ImportError):
        importlib.import_module("liger_kernel.transformers.model.no_such_model")
    with pytest.raises(ImportError):
        from liger_kernel.transformers.model.llama import causal_forward  # noqa: F401


def test_output_classes_extend_those_of_transformers():
    from transformers.modeling_outputs import CausalLMOutputWithPast

    made = output_classes.LigerCausalLMOutputWithPast
    output = made(loss=torch.tensor(1.0), token_accuracy=torch.tensor(0.5))
    assert issubclass(made, CausalLMOutputWithPast) and made is output_classes.LigerCausalLMOutputWithPast
    assert output.token_accuracy == 0.5 and output.predicted_tokens is None and output["token_accuracy"] == 0.5
    assert hasattr(output_classes, "LigerMoeCausalLMOutputWithPast")
    with pytest.raises(AttributeError, match="LigerNothing"):
        output_classes.LigerNothing  # noqa: B018
