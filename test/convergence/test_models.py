"""Thirty steps of training, patched and unpatched, on the same data: the losses and the final weights agree."""

import copy

import pytest
import torch

from support import tiny_model

transformers = pytest.importorskip("transformers")

from liger_kernel.transformers import apply_liger_kernel, revert_liger_kernel  # noqa: E402
from liger_kernel.transformers.models import TESTED  # noqa: E402

STEPS = 30


def train(model, device):
    """The loss of every step; rows are short of text, so there is always something to learn and to ignore."""
    # eps is large because Adam divides by it where a gradient is 0: rounding would decide the sign of a step there
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)
    generator = torch.Generator().manual_seed(2)
    losses = []
    for _ in range(STEPS):
        ids = torch.randint(3, 20, (4, 24), generator=generator)
        labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.2, -100)
        output = model(input_ids=ids.to(device), labels=labels.to(device), use_cache=False)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.loss.detach())
    return torch.stack(losses).cpu()


def assert_patched(model):
    left = {r.kind for r in apply_liger_kernel(model).left}
    assert left <= {"experts"} if transformers.__version__ < "5" else not left


@pytest.mark.parametrize("model_type", TESTED)
def test_training_is_the_same_patched_and_unpatched(model_type, device):
    unpatched = tiny_model(model_type).to(device)
    patched = copy.deepcopy(unpatched)
    wanted = train(unpatched, device)
    try:
        assert_patched(patched)
        losses = train(patched, device)
    finally:
        revert_liger_kernel(patched)
    assert wanted[-1] < wanted[0] - 0.2, "nothing was learned, so nothing is compared"
    torch.testing.assert_close(losses, wanted, rtol=1e-4, atol=0)
    # Thirty steps of AdamW turn the losses' 1e-4 into at most this much of the largest weight of a parameter.
    for (name, p), q in zip(unpatched.named_parameters(), patched.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-3, atol=1e-3 * p.abs().max().item(), msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.gpu
@pytest.mark.parametrize("model_type", TESTED)
def test_bf16_training_is_as_close_as_other_kernels_are(model_type, device):
    """Two unpatched runs whose attention kernels differ drift apart by rounding; a patched run drifts no further.

    Twice their largest distance: each run is one draw of the same noise, and the distance of two draws from a third
    is seldom equal.
    """
    first = tiny_model(model_type, attn_implementation="eager").to(device, torch.bfloat16)
    other = tiny_model(model_type, attn_implementation="sdpa").to(device, torch.bfloat16)
    other.load_state_dict(first.state_dict())
    patched = copy.deepcopy(first)
    wanted, drifted = train(first, device), train(other, device)
    spread = (drifted - wanted).abs().max()
    try:
        assert_patched(patched)
        losses = train(patched, device)
    finally:
        revert_liger_kernel(patched)
    assert wanted[-1] < wanted[0] - 0.1, "nothing was learned, so nothing is compared"
    assert (losses - wanted).abs().max() <= 2 * spread
