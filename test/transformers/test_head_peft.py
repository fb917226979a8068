"""Adapters of PEFT on a fused head."""

import copy
import warnings

import pytest
import torch

from support import tiny_model
from support_head import tokens

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from liger_kernel.transformers.head import fuse_head  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("on_device"),
    pytest.mark.filterwarnings("ignore:the logits of a fused LM head were used"),
]

ADAPTERS = {
    "lora": dict(target_modules=["lm_head", "q_proj"]),
    "dropout": dict(target_modules=["lm_head"], lora_dropout=0.3),
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
        config_ = peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **config)
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


def test_dora_falls_back_to_real_logits_and_says_so_once(fused_calls):
    model = tiny_model("llama", tie_word_embeddings=False)
    fuse_head(model)
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["lm_head"], use_dora=True)
    model = peft.get_peft_model(model, config).train()
    with pytest.warns(UserWarning, match="not fused any more.*LoRA variant"):
        assert isinstance(model(**tokens()).logits, torch.Tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**tokens())
    assert not fused_calls
