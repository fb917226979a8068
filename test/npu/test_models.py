"""Unchanged user code on an npu: patched models train there as they do, patched or not, on a CPU."""

import copy
import importlib
import sys

import pytest
import torch

from liger_kernel.ops import EXPORTS, core

pytest.importorskip("transformers")

from liger_kernel.transformers import apply_liger_kernel  # noqa: E402

from support import patched_names, release_ropes, tiny_model  # noqa: E402


@pytest.fixture(autouse=True)
def ropes():
    yield
    release_ropes()


@pytest.fixture
def used(monkeypatch):
    """(op, device type, source) of every pair that was called for."""
    seen = set()
    kernels = core.kernels

    def watched(op, x, impl=None):
        seen.add((op, x.device.type, core.resolve(op, x.device.type).source))
        return kernels(op, x, impl)

    for op in EXPORTS:
        importlib.import_module(f"liger_kernel.ops.{op}")
    for name, module in list(sys.modules.items()):
        if name.startswith("liger_kernel.ops.") and module is not core and getattr(module, "kernels", None) is kernels:
            monkeypatch.setattr(module, "kernels", watched)
    return seen


def batch(model, device):
    torch.manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (2, 9))
    labels = ids.clone()
    labels[0, :3] = -100
    return {"input_ids": ids.to(device), "labels": labels.to(device)}


def moved(model, device):
    """The model on a device. The fake one cannot give a parameter new memory, so torch unties shared ones."""
    model.to(device)
    model.tie_weights()
    return model


def train(model, device, steps=3):
    """The loss of each step, and the gradients of the last."""
    # AdamW's first steps are about the sign of a gradient, whatever its size, and so magnify what rounding does to a 0.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**batch(model, device)).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return losses, [p.grad.cpu() for p in model.parameters()]


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2"])
def test_three_steps_give_the_losses_and_gradients_of_a_cpu(model_type, npu, used):
    torch.manual_seed(0)
    theirs = tiny_model(model_type)
    ours = moved(copy.deepcopy(theirs), npu)
    report = apply_liger_kernel(ours)
    assert patched_names(ours), report
    losses, grads = train(ours, npu)
    expected, expected_grads = train(theirs, "cpu")
    on_npu = {(op, source) for op, device, source in used if device == "npu"}
    assert {source for _, source in on_npu} == {"triton"}
    assert {"rms_norm", "rope", "cross_entropy"} <= {op for op, _ in on_npu}
    for ours_, theirs_ in zip(losses, expected, strict=True):
        assert abs(ours_ - theirs_) <= 1e-6 * abs(theirs_), (losses, expected)
    for g, e in zip(grads, expected_grads, strict=True):
        assert (g - e).abs().max() <= 1e-6 * max(1.0, e.abs().max().item())


def test_a_model_that_moves_takes_the_pair_of_its_device(npu, used):
    torch.manual_seed(0)
    model = tiny_model("llama")
    apply_liger_kernel(model)
    losses = []
    for device in ("cpu", npu, "cpu"):
        used.clear()
        moved(model, device)
        losses.append(model(**batch(model, device)).loss.item())
        here = torch.device(device).type
        assert {kind for _, kind, _ in used} == {here}
        wanted = "torch" if here == "cpu" else "triton"
        assert {source for op, _, source in used if core._has_triton_pair(op)} == {wanted}, used
    assert losses[0] == losses[2] and losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_autocast_gradient_checkpointing_and_adamw(npu):
    torch.manual_seed(0)
    theirs = tiny_model("llama")
    ours = moved(copy.deepcopy(theirs), npu)
    apply_liger_kernel(ours)
    found = []
    for model, device in ((ours, "npu"), (theirs, "cpu")):
        model.gradient_checkpointing_enable()
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = model(**batch(model, device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        grads = [p.grad.cpu() for p in model.parameters()]
        torch.optim.AdamW(model.parameters(), lr=1e-3).step()
        with torch.autocast(device, dtype=torch.bfloat16):
            after = model(**batch(model, device)).loss
        assert after < loss
        found.append((loss.item(), grads))
    (loss, grads), (expected, expected_grads) = found
    # bf16 has 8 bits; autocast casts at other places where an op is fused
    assert loss == pytest.approx(expected, rel=1e-2)
    for g, e in zip(grads, expected_grads, strict=True):
        assert torch.isfinite(g).all() and (g - e).norm() <= 5e-2 * e.norm() + 1e-4


def test_a_patched_model_is_saved_there_and_loaded_here(npu, tmp_path):
    torch.manual_seed(0)
    model = moved(tiny_model("llama"), npu)
    apply_liger_kernel(model)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    there = torch.load(tmp_path / "state.pt")
    assert {v.device.type for v in there.values()} == {"npu"}
    fresh = tiny_model("llama")
    apply_liger_kernel(fresh)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", map_location="cpu"))
    expected = model(**batch(model, npu)).loss.item()
    assert fresh(**batch(fresh, "cpu")).loss.item() == pytest.approx(expected, rel=1e-6)
