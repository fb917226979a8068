"""Adapters of PEFT on a fused head."""

import copy
import warnings

import pytest
import torch

from support import tiny_model
from support_head import agree, tokens

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from liger_kernel.ops import head as engine  # noqa: E402
from liger_kernel.transformers import apply_liger_kernel  # noqa: E402
from liger_kernel.transformers.head import fuse_head  # noqa: E402
from liger_kernel.transformers.lazy_logits import LazyLogits  # noqa: E402
from liger_kernel.transformers.model import loss_utils  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("on_device"),
    pytest.mark.filterwarnings("ignore:the logits of a fused LM head were used"),
]

ADAPTERS = {
    "lora": dict(target_modules=["lm_head", "q_proj"]),
    "dropout": dict(target_modules=["lm_head"], lora_dropout=0.3),
    "rank stabilised": dict(target_modules=["lm_head"], use_rslora=True, r=8),
    "biases trained": dict(target_modules=["lm_head"], bias="all"),
    "lora bias": dict(target_modules=["lm_head"], lora_bias=True),
    "modules to save": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.filterwarnings("ignore:`lora_bias")
@pytest.mark.parametrize("config", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("before", [True, False], ids=["fused before", "fused after"])
def test_adapters_on_the_head_train_through_the_fused_path(config, before, fused_calls):
    base = tiny_model("llama", tie_word_embeddings=False)
    made = []
    for fuse in (False, True):
        model = copy.deepcopy(base)
        if fuse and before:
            fuse_head(model)
        torch.manual_seed(1)
        config_ = lora(**config)
        model = peft.get_peft_model(model, config_, adapter_name="mine").train()
        if fuse and not before:
            fuse_head(model.get_base_model())
        made.append(model)
    model, fused = made
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in made]
    for step in range(10):
        given = tokens()
        losses = []
        for m, optimizer in zip(made, optimizers, strict=True):
            torch.manual_seed(step)  # the same dropout
            optimizer.zero_grad()
            losses.append(m(**given).loss)
            losses[-1].backward()
            optimizer.step()
        # fp32 sums in another order, some 80 roundings; ten small steps amplify nothing
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    assert len(fused_calls) == 10
    trained = dict(fused.named_parameters())
    # a parameter went up to 0.7 far: the same slack, of the value and of the way
    for name, p in model.named_parameters():
        torch.testing.assert_close(trained[name], p, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_several_adapters_and_switched_off_ones(fused_calls):
    base = tiny_model("llama", tie_word_embeddings=False)
    made = []
    for _ in range(2):
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["lm_head"])
        model = peft.get_peft_model(copy.deepcopy(base), config, adapter_name="one").train()
        model.add_adapter("two", config)
        model.base_model.set_adapter(["one", "two"])
        made.append(model)
    model, fused = made
    fuse_head(fused.get_base_model())
    given = tokens()
    torch.testing.assert_close(fused(**given).loss, model(**given).loss)
    with fused.disable_adapter(), model.disable_adapter():
        torch.testing.assert_close(fused(**given).loss, model(**given).loss)
    fused.merge_adapter(), model.merge_adapter()
    torch.testing.assert_close(fused(**given).loss, model(**given).loss)
    assert len(fused_calls) == 3


def adapted(config, fuse=True, base=None, name="mine"):
    """A tiny model with a PEFT adapter of this configuration, its head fused where it can be."""
    torch.manual_seed(1)
    model = copy.deepcopy(base or tiny_model("llama", tie_word_embeddings=False))
    if fuse:
        fuse_head(model)
    with torch.device("cpu"):  # where VeRA's generator is; adapters then move to their layer's device
        return peft.get_peft_model(model, config, adapter_name=name).train()


def lora(**options):
    return peft.LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", "init_lora_weights": False} | options)


def test_adapter_and_tied_embeddings_both_train():
    base = tiny_model("llama", tie_word_embeddings=True)
    made = [adapted(lora(target_modules=["lm_head"]), fuse, base) for fuse in (False, True)]
    for m in made:  # the weight itself too: from the embedding and from the head
        m.get_base_model().model.embed_tokens.weight.requires_grad_()
    output, _ = agree(*made, tokens())
    assert isinstance(output.logits, LazyLogits)


def test_a_frozen_head_costs_no_weight_gradient(monkeypatch):
    made = []
    own = engine.WeightSum.__init__
    monkeypatch.setattr(engine.WeightSum, "__init__", lambda self, *args: made.append(args[:2]) or own(self, *args))
    model = adapted(lora(target_modules=["lm_head"]))
    model(**tokens()).loss.backward()
    assert made == [(256, 4)]


def test_bf16_weights_and_their_fp32_adapters(fused_calls):
    base = tiny_model("llama", tie_word_embeddings=False).bfloat16()
    model, fused = (adapted(lora(target_modules=["lm_head"]), fuse, base) for fuse in (False, True))
    assert fused.base_model.model.lm_head.lora_A["mine"].weight.dtype is torch.float32
    truth = copy.deepcopy(model).double()
    given = tokens()
    for m in (model, fused, truth):
        m(**given).loss.backward()
    assert len(fused_calls) == 1
    for p, q, t in zip(*([p for p in m.parameters() if p.requires_grad] for m in (model, fused, truth)), strict=True):
        own = (p.grad - t.grad).norm()
        # a second rounding to bf16, of the adapter's share of a logit, beside the one of the logit
        assert q.grad.dtype == p.grad.dtype and (q.grad - t.grad).norm() <= 1.5 * own + 1e-3 * t.grad.norm()


def test_materialized_logits_have_the_adapter_in_them():
    model, fused = (adapted(lora(target_modules=["lm_head"], lora_bias=True), fuse) for fuse in (False, True))
    given = tokens()
    wanted, logits = model(**given).logits, fused(**given).logits
    torch.testing.assert_close(logits.materialize(), wanted)
    sliced = fused(**given).logits[:, 1:4, 3:20]
    torch.testing.assert_close(sliced.materialize(), wanted[:, 1:4, 3:20])


def test_logits_keep_the_adapters_they_were_made_with():
    model = adapted(lora(target_modules=["lm_head"]))
    given = tokens()
    with model.disable_adapter():
        plain = model(**given, skip_logits=False).logits
        lazy = model(**given).logits
    torch.testing.assert_close(lazy.materialize(), plain)
    lazy = model(**given).logits
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="has changed since"):
        lazy.materialize()


@pytest.mark.parametrize("name", ["LigerForCausalLMLoss", "fixed_fused_linear_cross_entropy"])
def test_a_replaced_loss_that_drops_keywords_still_trains_the_adapter(name, monkeypatch):
    def replaced(hidden_states, lm_head_weight, target=None, *args, labels=None, **kwargs):
        if target is None:
            target = torch.nn.functional.pad(labels, (0, 1), value=-100)[..., 1:].reshape(-1)
        return torch.nn.functional.cross_entropy(hidden_states.flatten(0, -2) @ lm_head_weight.T, target)

    model, fused = (adapted(lora(target_modules=["lm_head"]), fuse) for fuse in (False, True))
    monkeypatch.setattr(loss_utils, name, replaced)
    agree(model, fused, tokens())


def test_the_active_copy_of_a_saved_head_is_the_fused_one():
    made = []
    for fuse in (False, True):
        model = adapted(lora(target_modules=["q_proj"], modules_to_save=["lm_head"]), fuse, name="one")
        model.add_adapter("two", lora(target_modules=["q_proj"], modules_to_save=["lm_head"]))
        made.append(model)
    for name in ("two", "one"):
        for m in made:
            m.zero_grad()
            m.set_adapter(name)
        output, _ = agree(*made, tokens())
        assert isinstance(output.logits, LazyLogits)
        assert output.logits.head is made[1].get_base_model().lm_head.modules_to_save[name]


FALLBACKS = {
    "dora": (peft.LoraConfig, dict(r=4, use_dora=True), "LoRA variant"),
    "ia3": (peft.IA3Config, dict(feedforward_modules=[]), "peft.tuners.ia3.layer.Linear"),
    "loha": (peft.LoHaConfig, dict(r=4), "peft.tuners.loha.layer.Linear"),
    "lokr": (peft.LoKrConfig, dict(r=4), "peft.tuners.lokr.layer.Linear"),
    "oft": (peft.OFTConfig, dict(oft_block_size=4), "peft.tuners.oft.layer.Linear"),
    "vera": (peft.VeraConfig, dict(r=4), "peft.tuners.vera.layer.Linear"),
    "adalora": (peft.AdaLoraConfig, dict(r=4, total_step=9), "peft.tuners.adalora.layer.SVDLinear"),
}


@pytest.mark.parametrize(("kind", "options", "reason"), FALLBACKS.values(), ids=FALLBACKS)
def test_what_does_not_fold_falls_back_to_real_logits_and_says_so_once(kind, options, reason, fused_calls):
    config = kind(task_type="CAUSAL_LM", target_modules=["lm_head"], **options)
    base = tiny_model("llama", tie_word_embeddings=False)
    model, fused = (adapted(config, fuse, base) for fuse in (False, True))
    given = tokens()
    with pytest.warns(UserWarning, match=f"not fused any more.*{reason}"):
        assert isinstance(fused(**given).logits, torch.Tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output, other = agree(model, fused, given)
        assert torch.equal(output.logits, other.logits)
    assert not fused_calls


@pytest.mark.parametrize(("kind", "options", "reason"), FALLBACKS.values(), ids=FALLBACKS)
def test_wrapped_before_patching_the_report_names_the_reason(kind, options, reason, fused_calls):
    model = adapted(kind(task_type="CAUSAL_LM", target_modules=["lm_head"], **options), fuse=False)
    patched = copy.deepcopy(model)
    report = apply_liger_kernel(patched)
    left = next(entry for entry in str(report).splitlines() if entry.startswith("head "))
    assert reason in left
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given = tokens()
        output, other = patched(**given), model(**given)
    assert isinstance(output.logits, torch.Tensor) and not fused_calls
    torch.testing.assert_close(output.loss, other.loss)


def test_without_a_fused_head_the_requested_results_come_from_the_logits():
    fused = adapted(peft.IA3Config(task_type="CAUSAL_LM", target_modules=["lm_head"], feedforward_modules=[]))
    plain = adapted(lora(target_modules=["q_proj"], init_lora_weights=True))
    given = tokens()
    wanted = dict(return_token_accuracy=True, return_predicted_tokens=True, return_entropy=True)
    with pytest.warns(UserWarning, match="not fused any more"):
        output = fused(**given, **wanted)
    other = plain(**given, **wanted)  # neither adapter has learned anything yet
    for name in ("loss", "token_accuracy", "predicted_tokens", "entropy"):
        torch.testing.assert_close(output[name], other[name])
    with pytest.raises(ValueError, match="use_token_scaling needs the fused head"):
        fused(**given, use_token_scaling=True)


def test_adapter_on_the_head_compiles_in_one_graph():
    base = tiny_model("llama", layers=1, tie_word_embeddings=False)
    model, fused = (adapted(lora(target_modules=["lm_head"]), fuse, base) for fuse in (False, True))
    fused(**tokens())  # finds the adapter, which came after the head was fused: tracing does not look for it
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    output, _ = agree(model, compiled, tokens())
    assert isinstance(output.logits, LazyLogits)
