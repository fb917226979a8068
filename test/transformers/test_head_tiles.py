"""The head's forward in tiles of rows and classes: what is put together is what whole rows give."""

import pytest
import torch

from liger_kernel.ops import head_chunks, head_tiles
from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy, liger_fused_linear_logprobs

ROWS, WIDTH, CLASSES = 37, 8, 300
BUDGET = 4 << 10  # bytes: 32 rows x 32 classes in fp32


@pytest.fixture
def tiles(monkeypatch, impl):
    """The tiles of each call, (rows, classes), small ones allowed and two of them put together at once."""
    seen, outputs = [], head_tiles.outputs
    monkeypatch.setattr(head_tiles, "LEAST", 1)
    monkeypatch.setattr(head_tiles, "LOT", 20)
    monkeypatch.setattr(head_tiles, "outputs", lambda *args: seen.append(args[6]) or outputs(*args))
    return seen


def problem(device, dtype=torch.float32, shift=0.0):
    hidden = torch.randn(ROWS, WIDTH, device=device, dtype=dtype)
    weight = torch.randn(CLASSES, WIDTH, device=device, dtype=dtype)
    bias = torch.randn(CLASSES, device=device, dtype=dtype) + shift
    target = torch.randint(0, CLASSES, (ROWS,), device=device)
    target[::5] = -100
    return hidden, weight, bias, target


OPTIONS = [{}, dict(softcap=5.0, logit_scale=1.5, temperature=0.7), dict(ignore_index=7)]


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_per_token_outputs_are_those_of_whole_rows(options, tiles, device):
    hidden, weight, bias, target = problem(device)
    if "ignore_index" in options:
        target[target == -100] = 7
    asked = dict(return_entropy=True, return_predicted=True, **options)
    whole = liger_fused_linear_logprobs(hidden, weight, target, bias, workspace_bytes=1 << 30, **asked)
    assert not tiles
    found = liger_fused_linear_logprobs(hidden, weight, target, bias, workspace_bytes=BUDGET, **asked)
    assert tiles and tiles[0][1] < CLASSES
    for name in ("log_prob", "lse", "entropy"):
        torch.testing.assert_close(getattr(found, name), getattr(whole, name))
    assert torch.equal(found.predicted, whole.predicted) and torch.equal(found.hit, whole.hit)


LOSSES = [
    dict(reduction="sum"), dict(reduction="none", lse_square_scale=1e-2, return_z_loss=True),
    dict(use_token_scaling=True), dict(ce_weight=True, softcap=4.0), dict(normalizer=7, return_entropy=True),
    dict(token_weight=True, return_token_accuracy=True, return_predicted_tokens=True), dict(vocab_slice=(3, 290)),
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_a_loss_without_gradients_is_that_of_whole_rows(options, tiles, device):
    hidden, weight, bias, target = problem(device)
    if "vocab_slice" in options:
        target = target.clamp(max=286)
    if "ce_weight" in options:
        options = options | dict(ce_weight=torch.rand(CLASSES, device=device))
    if "token_weight" in options:
        options = options | dict(token_weight=torch.rand(ROWS, device=device))
    whole = liger_fused_linear_cross_entropy(hidden, weight, target, bias, workspace_bytes=1 << 30, **options)
    assert not tiles
    found = liger_fused_linear_cross_entropy(hidden, weight, target, bias, workspace_bytes=BUDGET, **options)
    assert tiles
    if isinstance(whole, torch.Tensor):
        whole, found = dict(loss=whole), dict(loss=found)
    else:
        whole, found = vars(whole), vars(found)
    for name, value in whole.items():
        if value is not None:
            torch.testing.assert_close(found[name], value, msg=name)


@torch.no_grad()
def test_label_smoothing_goes_by_whole_rows(tiles, device):
    hidden, weight, bias, target = problem(device)
    loss = liger_fused_linear_cross_entropy(hidden, weight, target, bias, label_smoothing=0.1, workspace_bytes=BUDGET)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.1))
    assert not tiles


@torch.no_grad()
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_confident_rows_keep_their_digits_in_tiles(offset, tiles, device):
    """nll of a label with p of 1 - 1e-9, which lse - z_y in fp32 would give as 0 or, at an offset of 1e4, as 1e-3."""
    hidden = torch.zeros(ROWS, WIDTH, device=device)
    bias = torch.full((CLASSES,), offset, device=device)
    bias[13] = offset + 27.0
    target = torch.full((ROWS,), 13, device=device)
    found = liger_fused_linear_logprobs(
        hidden, torch.zeros(CLASSES, WIDTH, device=device), target, bias, return_entropy=True, workspace_bytes=BUDGET
    )
    assert tiles
    truth = bias.double().log_softmax(0)
    nll = torch.log1p((bias.double() - bias[13].double()).exp().sum() - 1).item()
    # 40 roundings of fp32 in sums over tiles
    assert found.log_prob.neg().sub(nll).abs().max().item() <= 40 * 2.0**-24 * nll
    entropy = -(truth.exp() * truth).sum().item()
    assert found.entropy.sub(entropy).abs().max().item() <= 40 * 2.0**-24 * entropy + 2.0**-24


@torch.no_grad()
def test_a_tile_whose_classes_are_all_masked_has_no_share(tiles, device):
    hidden, weight, bias, target = problem(device)
    bias[:100] = float("-inf")
    target = target.clamp(min=100).where(target != -100, -100)
    found = liger_fused_linear_logprobs(hidden, weight, target, bias, return_predicted=True, workspace_bytes=BUDGET)
    assert tiles
    logits = torch.nn.functional.linear(hidden, weight, bias)
    log_p = logits.log_softmax(-1).gather(1, target.clamp(min=0)[:, None]).squeeze(1)
    torch.testing.assert_close(found.log_prob, log_p.where(target != -100, 0.0))
    assert torch.equal(found.predicted, logits.argmax(-1).where(target != -100, -1))


@pytest.mark.parametrize("rows, classes", [(1, 262144), (1000, 50257), (16384, 128256), (1 << 20, 32000)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tiles_fit_their_budget(rows, classes, dtype):
    for place in ("cpu", "cuda"):  # only named
        for budget in (None, 1 << 20, 1 << 24, 1 << 30):
            device = torch.device(place)
            n_rows, width = head_tiles.tile_of(rows, classes, dtype, device, budget)
            limit = budget or head_chunks.CHUNK["cpu" if place == "cpu" else "forward"][0]
            if width < classes:
                assert 1 <= n_rows <= rows and n_rows * head_chunks.pitch(width) * dtype.itemsize <= limit


def test_the_default_tile_on_a_gpu_is_4096_rows_high():
    device = torch.device("cuda")
    for rows, classes in ((4096, 128256), (16384, 151936), (32768, 128256)):
        n_rows, width = head_tiles.tile_of(rows, classes, torch.bfloat16, device)
        assert n_rows == 4096 and width % 256 == 0


@pytest.mark.parametrize("budget", [None, 1 << 20, 1 << 24])
def test_no_number_of_rows_has_tiles_and_so_kernels_of_its_own(budget):
    device = torch.device("cuda")
    widths = {head_tiles.tile_of(rows, 128256, torch.bfloat16, device, budget)[1] for rows in range(1, 40000, 7)}
    assert len(widths) == 2 and 128256 in widths
