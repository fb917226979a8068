"""Helpers that tests share."""

import copy

import torch

from liger_kernel.selftest import disagreement


def dtypes(impl: str, device: torch.device) -> list[torch.dtype]:
    """What an implementation computes in: Triton's interpreter has no bf16 arithmetic."""
    interpreted = impl == "triton" and device.type == "cpu"
    return [torch.float32, torch.float16] if interpreted else [torch.float32, torch.float16, torch.bfloat16]


def assert_as_good_as_torch(ours, torchs, truths, dtype, what, times=1):
    """Our error against the truth is at most `times` torch's own, plus the slack of the dtype."""
    wrong, _ = disagreement(ours, torchs, truths, dtype, times)
    assert wrong is None, f"{what} {wrong}"


def draws(device: torch.device) -> int:
    """How often its own error a whole model may add to it: on a CPU no kernel of a patched one rounds elsewhere.

    On a GPU every one may, so that its error is a second draw of the same noise, carried through all layers.
    """
    return 1 if device.type == "cpu" else 2


def assert_same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """On a CPU the same bits; elsewhere the same values, rounded once or twice differently."""
    if found.device.type == "cpu":
        assert torch.equal(found, wanted)
    else:
        torch.testing.assert_close(found, wanted)


def outcome(module: torch.nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> list:
    """The output of a module, and the gradients of its input and of its parameters."""
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(upstream.to(y))
    return [y.detach(), x.grad, *(p.grad for p in module.parameters())]


def assert_same_module(ours: torch.nn.Module, theirs: torch.nn.Module, x: torch.Tensor) -> None:
    """With the same weights the same output and gradients: on a CPU bit for bit, elsewhere as close to fp64."""
    ours.load_state_dict(theirs.state_dict())
    upstream = torch.randn_like(x)
    truth = outcome(copy.deepcopy(theirs).double(), x.double(), upstream)
    found, wanted = outcome(ours, x, upstream), outcome(theirs, x, upstream)
    if x.device.type != "cpu":
        assert_as_good_as_torch(found, wanted, truth, x.dtype, type(ours).__name__)
        return
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


def assert_trains_as(ours: torch.nn.Module, theirs: torch.nn.Module, **inputs) -> None:
    """The same loss and gradients of a model's parameters, as close to fp64 as theirs."""
    found = []
    for model in (ours, theirs, in_fp64(theirs)):
        loss = model(**inputs).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    times = draws(loss.device)
    assert_as_good_as_torch(*found, torch.float32, type(theirs).__name__, times)


def assert_same_logits(ours: torch.nn.Module, theirs: torch.nn.Module, inputs: dict) -> None:
    """The same logits: on a CPU bit for bit, elsewhere as close to fp64 as theirs."""
    with torch.no_grad():
        found, wanted = ours(**inputs).logits, theirs(**inputs).logits
        if found.device.type == "cpu":
            assert torch.equal(found, wanted)
            return
        truth = in_fp64(theirs)(**inputs).logits
    assert found.dtype is wanted.dtype
    assert_as_good_as_torch([found], [wanted], [truth], found.dtype, type(theirs).__name__, draws(found.device))


def in_fp64(model: torch.nn.Module) -> torch.nn.Module:
    """A copy that computes the truth."""
    truth = copy.deepcopy(model).double()
    if hasattr(truth, "set_experts_implementation"):
        truth.set_experts_implementation("eager")  # torch has no grouped product in fp64
    return truth


def release_ropes() -> None:
    """Put every rotary function back, whatever models still use ours."""
    from liger_kernel.transformers.kinds import rope

    for entry in list(rope._replaced.values()):
        entry.users.clear()
    rope.release(torch.nn.Identity())


def tiny_model(model_type: str, layers: int = 2, **config) -> torch.nn.Module:
    """A small model of a type with a row, in training mode, its norms' weights away from their initial value."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from liger_kernel.transformers.models import MODELS, TINY

    row = MODELS[model_type].tiny if model_type in MODELS else None
    config = CONFIG_MAPPING[model_type](**(TINY | (row or {}) | {"num_hidden_layers": layers} | config))
    model = AutoModelForCausalLM.from_config(config).train()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn_like(p))
    return model


def patched_names(model: torch.nn.Module) -> set[str]:
    """The modules of a model that have a forward of ours."""
    from liger_kernel.transformers.kinds.probe import RECORD

    return {name for name, module in model.named_modules() if RECORD in module.__dict__}
