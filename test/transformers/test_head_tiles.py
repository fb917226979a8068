"""The head's forward in tiles of rows and classes: what is put together is what whole rows give."""

import pytest
import torch

from liger_kernel.ops import core, head_chunks, head_tiles
from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy, liger_fused_linear_logprobs

from support_head import Peak

ROWS, WIDTH, CLASSES = 37, 8, 1200
BUDGET = 6 << 10  # bytes: tiles of 2 rows and 608 classes in fp32


@pytest.fixture
def tiles(monkeypatch, impl):
    """The tile of each call, small ones allowed."""
    seen, outputs = [], head_tiles.outputs
    monkeypatch.setattr(head_tiles, "LEAST", 1)
    monkeypatch.setattr(head_tiles, "outputs", lambda *args: seen.append(args[6]) or outputs(*args))
    return seen


def problem(device, dtype=torch.float32, labels=torch.int64):
    """16 bits: eighths below 128, as logits of 16 bits hold them: two GEMMs would round others differently."""
    shapes = (ROWS, WIDTH), (CLASSES, WIDTH), (CLASSES,)
    if dtype == torch.float32:
        hidden, weight, bias = (torch.randn(shape, device=device) for shape in shapes)
    else:
        whole = [torch.randint(-8, 9, shape, device=device).to(dtype) for shape in shapes]
        hidden, weight, bias = whole[0], whole[1] / 8, whole[2] / 8
    target = torch.randint(0, CLASSES, (ROWS,), device=device, dtype=labels)
    target[::5] = -100
    return hidden, weight, bias, target


OPTIONS = [{}, dict(softcap=5.0, logit_scale=1.5, temperature=0.7), dict(ignore_index=7)]


@torch.no_grad()
@pytest.mark.parametrize("dtype, labels", [(torch.float32, torch.int64), (torch.float16, torch.int32)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_per_token_outputs_are_those_of_whole_rows(options, dtype, labels, tiles, device):
    hidden, weight, bias, target = problem(device, dtype, labels)
    if "ignore_index" in options:
        target[target == -100] = 7
    asked = dict(return_entropy=True, return_predicted=True, **options)
    whole = liger_fused_linear_logprobs(hidden, weight, target, bias, workspace_bytes=1 << 30, **asked)
    assert not tiles
    found = liger_fused_linear_logprobs(hidden, weight, target, bias, workspace_bytes=BUDGET, **asked)
    assert tiles and tiles[0].classes < CLASSES and tiles[0].lot < ROWS
    for name in ("log_prob", "lse", "entropy"):
        torch.testing.assert_close(getattr(found, name), getattr(whole, name))
    assert torch.equal(found.predicted, whole.predicted) and torch.equal(found.hit, whole.hit)


LOSSES = [
    dict(reduction="sum"), dict(reduction="none", lse_square_scale=1e-2, return_z_loss=True),
    dict(use_token_scaling=True), dict(ce_weight=True, softcap=4.0), dict(normalizer=7, return_entropy=True),
    dict(token_weight=True, return_token_accuracy=True, return_predicted_tokens=True), dict(vocab_slice=(3, 1190)),
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_a_loss_without_gradients_is_that_of_whole_rows(options, tiles, device):
    hidden, weight, bias, target = problem(device)
    if "vocab_slice" in options:
        target = target.clamp(max=1186)
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


INF = float("inf")
ODD = {
    "a tile of -inf": (slice(0, 608), -INF), "the first class of each tile": (slice(0, None, 608), -INF),
    "a NaN": (5, float("nan")), "+inf": (5, INF), "all -inf": (slice(None), -INF),
    "all but one tile the least number": (slice(0, 608), torch.finfo(torch.float32).min),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("where, value", ODD.values(), ids=ODD)
def test_odd_logits_give_what_they_give_in_whole_rows(where, value, tiles, device):
    hidden, weight, bias, target = problem(device)
    bias[where] = value
    asked = dict(return_entropy=True, return_predicted=True)
    whole = liger_fused_linear_logprobs(hidden, weight, target, bias, workspace_bytes=1 << 30, **asked)
    found = liger_fused_linear_logprobs(hidden, weight, target, bias, workspace_bytes=BUDGET, **asked)
    assert tiles and tiles[0].classes == 608
    for name in ("log_prob", "lse", "entropy"):
        torch.testing.assert_close(getattr(found, name), getattr(whole, name), equal_nan=True, msg=name)
    if value == -INF and where != slice(None):
        logits = torch.nn.functional.linear(hidden, weight, bias)
        log_p = logits.log_softmax(-1)
        live = target != -100
        truth = log_p.gather(1, target.clamp(min=0)[:, None]).squeeze(1).where(live, 0.0)
        torch.testing.assert_close(found.log_prob, truth)
        entropy = -(log_p.exp() * log_p).nan_to_num(nan=0.0).sum(-1).where(live, 0.0)
        torch.testing.assert_close(found.entropy, entropy)
        assert torch.equal(found.predicted, logits.argmax(-1).where(live, -1))


@torch.no_grad()
@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_but_ignored_rows(rows, tiles, device):
    hidden, weight, bias, _ = problem(device)
    target = torch.full((rows,), -100, device=device)
    found = liger_fused_linear_logprobs(hidden[:rows], weight, target, bias, workspace_bytes=BUDGET)
    assert not found.log_prob.any() and not found.lse.any()
    assert liger_fused_linear_cross_entropy(hidden[:rows], weight, target, bias, workspace_bytes=BUDGET) == 0


BUDGETS = [None, 1 << 19, 1 << 20, 1 << 24, 1 << 30]


@pytest.mark.parametrize("rows, classes", [(1, 262144), (1000, 50257), (16384, 128256), (1 << 20, 32000)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tiles_and_their_parts_fit_their_budget(rows, classes, dtype):
    for place in ("cpu", "cuda"):  # only named
        for budget in BUDGETS:
            tile = head_tiles.Tile.choose(rows, classes, dtype, torch.device(place), budget)
            limit = budget or head_chunks.CHUNK["cpu" if place == "cpu" else "forward"][0]
            if tile is not None:
                assert 1 <= tile.rows <= rows and tile.classes < classes
                parts = tile.lot * -(-classes // tile.classes) * head_tiles.PART
                assert tile.rows * head_chunks.pitch(tile.classes) * dtype.itemsize + parts <= limit * 1.05


@torch.no_grad()
@pytest.mark.parametrize("budget", [1 << 20, 1 << 22, 1 << 26])
def test_parts_take_the_memory_they_are_counted_with(budget, monkeypatch, device):
    """16384 x 128256 logits, whose products and row kernels are left out: many tiles of a row are put together."""
    monkeypatch.setattr(head_tiles, "project", lambda *args: True)
    monkeypatch.setattr(head_tiles, "kernels", lambda *args: core.Kernels(lambda *args: None, lambda *args: None))
    hidden, weight = torch.zeros(16384, 1, device=device), torch.zeros(128256, 1, device=device)
    target = torch.randint(0, 128256, (16384,), device=device)
    with Peak() as peak:
        liger_fused_linear_logprobs(
            hidden, weight, target, return_entropy=True, return_predicted=True, workspace_bytes=budget
        )
    assert peak.peak <= budget + 128 * 16384  # and the outputs with their temporaries


def test_the_default_tile_on_a_gpu_is_4096_rows_high():
    device = torch.device("cuda")
    for rows, classes in ((4096, 128256), (16384, 151936), (32768, 128256)):
        tile = head_tiles.Tile.choose(rows, classes, torch.bfloat16, device)
        assert tile.rows == 4096 and tile.classes % 256 == 0 and tile.lot >= min(rows, 16384)


@pytest.mark.parametrize("budget", BUDGETS[:-1])
def test_no_number_of_rows_has_tiles_and_so_kernels_of_its_own(budget):
    device = torch.device("cuda")
    tiles = [head_tiles.Tile.choose(rows, 128256, torch.bfloat16, device, budget) for rows in range(1, 40000, 7)]
    assert len({tile.classes for tile in tiles if tile}) == 1


@pytest.mark.gpu
@torch.no_grad()
def test_tiles_under_a_captured_graph_and_without_a_wait(tiles, impl, device):
    if impl != "triton":
        pytest.skip("the torch pair is no kernel of a GPU")
    given = problem(device)
    call = lambda: liger_fused_linear_logprobs(given[0], given[1], given[3], given[2], workspace_bytes=BUDGET)  # noqa: E731
    expected = call().log_prob
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call().log_prob
    graph.replay()
    assert len(tiles) == 3
    torch.testing.assert_close(found, expected)
