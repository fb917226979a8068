"""The fused head in live models: same loss and gradients as unpatched, and only in its window."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from support import tiny_model
from support_head import agree, both, tokens

pytest.importorskip("transformers")

from liger_kernel.transformers import apply_liger_kernel, functional, revert_liger_kernel  # noqa: E402
from liger_kernel.transformers.head import HeadLeftAlone, fuse_head, use_cross_entropy  # noqa: E402
from liger_kernel.transformers.lazy_logits import LazyLogits  # noqa: E402
from liger_kernel.transformers.models import TESTED  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("on_device"),
    pytest.mark.filterwarnings("ignore:the logits of a fused LM head were used"),
]


# Every family of models


@pytest.mark.parametrize("model_type", TESTED)
def test_loss_and_gradients_are_those_of_the_unpatched_model(model_type, fused_calls):
    model, fused, patch = both(model_type)
    assert (patch.name, patch.pattern) == ("lm_head", "linear")
    output, other = agree(model, fused, tokens())
    assert len(fused_calls) == 1
    assert isinstance(output.logits, LazyLogits) and type(output) is type(other)
    torch.testing.assert_close(output.logits.materialize(), other.logits)


@pytest.mark.parametrize("model_type", TESTED)
def test_evaluation_and_generation_see_ordinary_logits(model_type, fused_calls):
    model, fused, _ = both(model_type)
    given = tokens()
    model.eval(), fused.eval()
    with torch.no_grad():
        assert torch.equal(fused(**given).logits, model(**given).logits)
        options = dict(max_new_tokens=3, do_sample=False, pad_token_id=0)
        for m in (model, fused):
            m.config.output_router_logits = False  # transformers 4.57 cannot generate with them
        assert torch.equal(fused.generate(given["input_ids"], **options), model.generate(given["input_ids"], **options))
    assert not fused_calls


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "granite"])
def test_soft_cap_and_scale_reach_the_fused_op(model_type, fused_calls):
    config = dict(final_logit_softcapping=3.0) if "gemma" in model_type else {}
    model, fused, _ = both(model_type, **config)
    for m in (model, fused):
        with torch.no_grad():  # logits large enough for the cap and the scale to matter
            m.lm_head.weight.mul_(20.0)
    agree(model, fused, tokens(), rtol=1e-4)  # logits 20 times as large, and their rounding with them
    assert fused_calls[0].get("softcap") == config.get("final_logit_softcapping")
    assert fused_calls[0].get("logit_scale", 1.0) == (1.0 if config else 1 / 8)


def test_head_with_bias():
    model, fused, patch = both("phi3", fuse=lambda m: None)
    for m in (model, fused):
        m.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, 256))
    assert fuse_head(fused).pattern == "linear with bias"
    agree(model, fused, tokens())


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_embeddings(tied):
    agree(*both("llama", tie_word_embeddings=tied)[:2], tokens())


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bf16 weights"])
def test_bf16(model_type, autocast, device):
    model, fused, _ = both(model_type)
    if not autocast:
        model.bfloat16(), fused.bfloat16()
    given = tokens()
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        output, other = fused(**given), model(**given)
    assert output.logits.dtype == other.logits.dtype == torch.bfloat16 and output.loss.dtype == torch.float32
    # gemma2 rounds capped logits to bf16 three times, the fused op not at all: 2^-9 of a logit of 1 at most
    torch.testing.assert_close(output.loss, other.loss, rtol=1e-3, atol=0)
    assert torch.equal(output.logits.materialize(), other.logits)
    output.loss.backward()
    other.loss.backward()
    for p, q in zip(model.parameters(), fused.parameters(), strict=True):
        slack = 0.03 * p.grad.float().norm().item()  # two bf16 backward passes differ by some 2^-8 per rounding
        assert (q.grad - p.grad).float().norm() <= slack and q.grad.dtype == p.grad.dtype


# What opens the window, and the keywords


def test_logits_are_ordinary_outside_training_with_labels(fused_calls):
    _, fused, _ = both()
    given = tokens()
    assert isinstance(fused(input_ids=given["input_ids"]).logits, torch.Tensor)
    assert isinstance(fused(**given, skip_logits=False).logits, torch.Tensor)
    with torch.no_grad():
        assert isinstance(fused(**given).logits, torch.Tensor)
    assert not fused_calls


def test_skip_logits_builds_no_logits_in_evaluation(fused_calls):
    model, fused, _ = both()
    model.eval(), fused.eval()
    given = tokens()
    with torch.no_grad():
        output = fused(**given, skip_logits=True)
        torch.testing.assert_close(output.loss, model(**given).loss)
        assert len(fused_calls) == 1 and isinstance(output.logits, LazyLogits) and output.logits._value is None
        assert torch.equal(output.logits.materialize(), model(**given).logits)


@pytest.mark.parametrize("model_type", TESTED)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_token_accuracy_predicted_tokens_and_entropy_on_request(model_type, training):
    model, fused, _ = both(model_type)
    model.train(training), fused.train(training)
    given = tokens()
    output = fused(**given, return_token_accuracy=True, return_predicted_tokens=True, return_entropy=True)
    other = model(**given)
    shifted = F.pad(given["labels"], (0, 1), value=-100)[:, 1:]
    kept = shifted != -100
    top = other.logits.argmax(-1)
    assert output.token_accuracy.dim() == 0
    torch.testing.assert_close(output.token_accuracy, (top == shifted)[kept].float().mean())
    assert torch.equal(output.predicted_tokens.view_as(top)[kept], top[kept])
    entropy = torch.distributions.Categorical(logits=other.logits.detach()).entropy()
    torch.testing.assert_close(output.entropy.view_as(top), entropy.where(kept, 0.0))
    assert isinstance(output, type(other)) and isinstance(output.logits, LazyLogits if training else torch.Tensor)
    torch.testing.assert_close(output.loss, other.loss)


def test_tuple_output_carries_the_requested_values_last():
    _, fused, _ = both()
    output = fused(**tokens(), return_dict=False, return_token_accuracy=True)
    assert isinstance(output, tuple) and output[0].requires_grad and output[-1].dim() == 0


@pytest.mark.parametrize("items", [6, torch.tensor(6)], ids=str)
def test_num_items_in_batch(items, fused_calls):
    model, fused, _ = both()
    agree(model, fused, tokens(), num_items_in_batch=items)
    assert fused_calls[0]["normalizer"] is items  # divides where the gradient is formed, not after its rounding


def test_num_items_in_batch_of_a_batch_with_none():
    _, fused, _ = both()
    loss = fused(**tokens(), num_items_in_batch=torch.tensor(0)).loss
    loss.backward()
    assert loss == 0 and all(not p.grad.any() for p in fused.parameters())


def test_shift_labels_alone_give_a_loss():
    model, fused, _ = both()
    given = tokens()
    shifted = F.pad(given["labels"], (0, 1), value=-100)[:, 1:]
    wanted = model(**given).loss
    del given["labels"]
    output = fused(**given, shift_labels=shifted)
    assert isinstance(output.logits, LazyLogits)
    torch.testing.assert_close(output.loss, wanted)


def test_labels_by_position():
    model, fused, _ = both()
    given = tokens()
    args = (given["input_ids"], None, None, None, None, given["labels"])
    assert isinstance(fused(*args).logits, LazyLogits)
    torch.testing.assert_close(fused(*args).loss, model(*args).loss)


class Plain(torch.nn.Module):
    """A model of nobody's library: computes its loss inline, its forward takes no keywords but its own."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = torch.nn.Embedding(50, 16), torch.nn.Linear(16, 50)

    def get_output_embeddings(self):
        return self.out

    def forward(self, input_ids, labels=None):
        logits = self.out(self.embed(input_ids)) * 0.7
        loss = None
        if labels is not None:
            loss = torch.nn.CrossEntropyLoss()(logits[:, :-1].reshape(-1, 50), labels[:, 1:].reshape(-1))
        return (loss, logits)


def test_a_loss_computed_inline_is_fused(fused_calls):
    model = Plain()
    fused = copy.deepcopy(model)
    fuse_head(fused)
    ids = torch.randint(0, 50, (2, 9))
    loss = fused(ids, labels=ids, skip_logits=None, num_items_in_batch=None)[0]
    wanted = model(ids, labels=ids)[0]
    loss.backward(), wanted.backward()
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(fused.out.weight.grad, model.out.weight.grad)
    assert len(fused_calls) == 1


def test_a_loss_function_of_the_user_gets_what_it_needs(fused_calls):
    def smoothed(logits, labels, vocab_size, **kwargs):
        logits, labels = logits[..., :-1, :].reshape(-1, vocab_size), labels[..., 1:].reshape(-1)
        return F.cross_entropy(logits, labels, label_smoothing=0.2)

    def unusual(logits, labels, vocab_size, **kwargs):
        return (logits[..., :-1, :].softmax(-1).gather(-1, labels[..., 1:, None].clamp(min=0))).mean()

    for loss_function, fused_times in ((smoothed, 1), (unusual, 0)):
        model, fused, _ = both(fuse=lambda m: None)
        model.loss_function = fused.loss_function = loss_function
        fuse_head(fused)
        agree(model, fused, tokens())
        assert len(fused_calls) == fused_times
        fused_calls.clear()


# Left alone


class Packed(torch.Tensor):
    """A weight that is not what it seems, as torchao's are."""


class Unreadable(torch.nn.Module):
    """A quantised head, whose weight costs its dequantisation to read."""

    @property
    def weight(self):
        raise AssertionError("the weight was read")


def test_what_cannot_be_fused_is_left_alone_with_its_reason():
    class Special(torch.nn.Linear):
        pass

    def replaced(model, head):
        model.out = head
        return model

    quantised = torch.nn.Linear(16, 50, bias=False)
    quantised.weight = torch.nn.Parameter(torch.ones(50, 16, dtype=torch.int8), requires_grad=False)
    packed = torch.nn.Linear(16, 50, bias=False)
    packed.weight = torch.nn.Parameter(torch.ones(50, 16).as_subclass(Packed))
    taken = Plain()
    taken.out.forward = lambda x: x
    for model, reason in (
        (torch.nn.Linear(3, 3), "no labels"),
        (tiny_model("llama").model, "no labels"),
        (replaced(Plain(), None), "no output embeddings"),
        (replaced(Plain(), Special(16, 50)), "Special, not a torch.nn.Linear"),
        (replaced(Plain(), torch.nn.Embedding(50, 16)), "Embedding, not a torch.nn.Linear"),
        (replaced(Plain(), quantised), "int8"),
        (replaced(Plain(), packed), "weight is a .*Packed, not a plain tensor"),
        (replaced(Plain(), Unreadable()), "Unreadable, not a torch.nn.Linear"),
        (taken, "replaced the head's forward"),
    ):
        before = dict(model.__dict__)
        with pytest.raises(HeadLeftAlone, match=reason):
            fuse_head(model)
        assert model.__dict__ == before


# Explicit cross_entropy=True


@pytest.mark.parametrize("items", [None, 6, torch.tensor(6)], ids=str)
def test_use_cross_entropy_computes_the_same_loss_on_real_logits(items, monkeypatch):
    calls = []
    own = functional.liger_cross_entropy

    def counted(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    monkeypatch.setattr(functional, "liger_cross_entropy", counted)
    model, fused, patch = both("gemma2", use_cross_entropy)
    before = dict(fused.__dict__)
    assert use_cross_entropy(fused).name == patch.name and fused.__dict__ == before
    output, other = agree(model, fused, tokens(), num_items_in_batch=items)
    assert len(calls) == 1 and torch.equal(output.logits, other.logits)
    patch.undo()
    assert fused.__dict__.keys() == model.__dict__.keys()


def test_use_cross_entropy_leaves_another_loss_alone():
    model = tiny_model("llama")
    model.loss_function = F.cross_entropy
    with pytest.raises(HeadLeftAlone, match="cross_entropy, not transformers' ForCausalLMLoss"):
        use_cross_entropy(model)


# torch.compile


# Stock transformers compiles these without a graph break, and so must we.
COMPILED = ("cohere", "falcon_h1", "gemma2", "granite", "granitemoe", "inkling2_text", "llama", "mixtral", "nemotron_h",
            "olmo2", "phi3", "qwen3")  # fmt: skip
SAMPLE = ("llama", "gemma2")


@pytest.mark.parametrize(
    "model_type", [pytest.param(t, marks=[] if t in SAMPLE else [pytest.mark.slow]) for t in COMPILED]
)
def test_compiles_in_one_graph(model_type):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    model = tiny_model(model_type, layers=1)
    patched = copy.deepcopy(model)
    report = apply_liger_kernel(patched)
    assert "fused_linear_cross_entropy" in str(report)
    given = tokens()
    patched(**given)  # in its first call transformers takes a lock where a model returns its router's logits
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    try:
        compiled = torch.compile(patched, fullgraph=True, backend=counter)
        output, other = agree(model, compiled, given, num_items_in_batch=torch.tensor(9))
        assert counter.frame_count == 1 and isinstance(output.logits, LazyLogits)
        # aot_eager takes norms and attention apart: fp32 sums in another order
        torch.testing.assert_close(output.logits.materialize(), other.logits, rtol=1e-5, atol=1e-5)
    finally:
        revert_liger_kernel(patched)
