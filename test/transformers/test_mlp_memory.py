"""A patched MLP keeps its gate and up for the backward, not their product too."""

import weakref

import pytest
import torch

from support import tiny_model

pytest.importorskip("transformers")

from liger_kernel.transformers import apply_liger_kernel, revert_liger_kernel  # noqa: E402
from liger_kernel.transformers.kinds import mlp  # noqa: E402

PAIRED, PACKED, GELU = "llama", "phi3", "gemma2"


@pytest.fixture
def products(monkeypatch):
    """Weak references to every product made since."""
    made, own = [], mlp.product

    def watched(*args):
        product = own(*args)
        made.append(weakref.ref(product))
        return product

    monkeypatch.setattr(mlp, "product", watched)
    return made


def patched(model_type, device):
    torch.manual_seed(0)
    model = tiny_model(model_type).to(device)
    apply_liger_kernel(model)
    return model


def gradients(model, ids):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("model_type", [PAIRED, PACKED, GELU])
def test_the_product_lives_no_longer_than_the_forward_and_the_bits_are_the_same(
    model_type, device, products, monkeypatch
):
    ids = torch.randint(3, 200, (2, 16), device=device)
    model = patched(model_type, device)
    loss = model(input_ids=ids, labels=ids).loss
    assert len(products) == 2 and not any(ref() is not None for ref in products)
    loss.backward()
    assert len(products) == 4  # made again, once a layer
    found = [loss.detach(), *(p.grad for p in model.parameters())]
    revert_liger_kernel(model)
    monkeypatch.setattr(mlp, "_may_remake", lambda: False)
    for a, b in zip(found, gradients(patched(model_type, device), ids), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_decides_itself_what_is_kept(reentrant, device, products):
    model = patched(PAIRED, device)
    model.config.use_cache = False
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    gradients(model, torch.randint(3, 200, (2, 16), device=device))
    assert len(products) == 4  # the forward and checkpointing's own second one


def test_a_lora_on_the_down_projection_is_called_as_ever(device, products):
    peft = pytest.importorskip("peft")
    ids = torch.randint(3, 200, (2, 16), device=device)
    grads = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = tiny_model(PAIRED).to(device)
        config = peft.LoraConfig(r=4, target_modules=["down_proj"], init_lora_weights=False)
        torch.manual_seed(1)
        model = peft.get_peft_model(model, config)
        if fused:
            apply_liger_kernel(model)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(grads[0]) == 4 and len(products) == 4
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_where_hooks_are_forbidden_the_product_is_kept(device, products):
    model = patched(PAIRED, device)
    with torch.autograd.graph.disable_saved_tensors_hooks("forbidden here"):
        gradients(model, torch.randint(3, 200, (2, 16), device=device))
    assert len(products) == 2


def test_the_environment_can_have_it_kept(device, products, monkeypatch):
    monkeypatch.setenv(mlp.KEEP, "1")
    gradients(patched(PAIRED, device), torch.randint(3, 200, (2, 16), device=device))
    assert len(products) == 2


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("model_type", [PAIRED, GELU])
def test_the_gradient_of_the_gate_takes_its_place(model_type, checkpointed, device):
    """So that a backward needs three tensors of the MLP's width, not five."""
    model, places, grads = patched(model_type, device), [], []
    model.config.use_cache = False
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def note(_module, _inputs, gate):
        again = torch._C._current_graph_task_id() != -1
        if again or not checkpointed:
            places.append(gate.data_ptr())
        if not again:  # the graph that is run backwards
            gate.register_hook(lambda g: grads.append(g.data_ptr()))

    for layer in model.model.layers:
        layer.mlp.gate_proj.register_forward_hook(note)
    gradients(model, torch.randint(3, 200, (2, 16), device=device))
    assert len(places) == 2 and sorted(grads) == sorted(places)
