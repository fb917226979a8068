"""How exact the fused head is where it is hard, and what it may take: memory, the host's time, ignored rows."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from liger_kernel import backends
from liger_kernel.ops import head, head_chunks, head_slabs, live_rows, row_loss
from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as fused
from liger_kernel.transformers.functional import liger_fused_linear_logprobs as logprobs

from support import assert_as_good_as_torch
from support_head import Peak

DTYPES = [torch.float32, torch.bfloat16]


def outcome(call, x, weight, bias, target, dtype):
    """Loss and gradients of a call, from leaves in dtype."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, weight, bias)]
    loss = call(*leaves, target)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]


def plain(x, weight, bias, target, reduction="mean"):
    logits = F.linear(x, weight, bias)
    return F.cross_entropy(logits if logits.dtype is torch.float64 else logits.float(), target, reduction=reduction)


def check(x, weight, bias, target, dtype, what, **options):
    x, weight, bias = (t.to(dtype) for t in (x, weight, bias))  # what dtype cannot hold is not the op's error
    truth = outcome(plain, x, weight, bias, target, torch.float64)
    torchs = outcome(plain, x, weight, bias, target, dtype)
    for reduction in ("mean", "none"):

        def ours(x, weight, bias, target, reduction=reduction):
            losses = fused(x, weight, target, bias, reduction=reduction, **options)
            return losses if reduction == "mean" else losses.sum() / losses.numel()

        found = outcome(ours, x, weight, bias, target, dtype)
        assert_as_good_as_torch(found, torchs, truth, dtype, f"{what} {reduction}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.5, 0.9, 0.99, 0.999, 0.99999])
def test_a_label_of_high_probability(p, dtype, device):
    classes = 11
    logit = math.log(p * (classes - 1) / (1 - p))
    target = torch.arange(6, device=device)
    x = F.one_hot(target, classes).double() * logit
    check(x, torch.eye(classes, device=device), torch.zeros(classes, device=device), target, dtype, f"p = {p}")


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("p", [0.5, 0.9, 0.99, 0.999, 0.99999])
def test_the_gradient_of_a_sure_label_does_not_cancel(p, reduction, device):
    """p - 1 as a difference has a relative error of 1e-7 / (1 - p), torch's own included."""
    classes = 11
    target = torch.arange(6, device=device)
    x = (F.one_hot(target, classes) * math.log(p * (classes - 1) / (1 - p))).float().requires_grad_()
    weight, wide = torch.eye(classes, device=device), x.detach().double().requires_grad_()  # the logits are x
    loss = fused(x, weight, target, reduction=reduction)
    truth = F.cross_entropy(wide, target, reduction=reduction)
    torch.testing.assert_close(loss.double(), truth, rtol=5e-6, atol=0)  # the exponentials' own error
    found, expected = (torch.autograd.grad(t.sum(), leaf)[0] for t, leaf in ((loss, x), (truth, wide)))
    torch.testing.assert_close(found.double(), expected, rtol=5e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [-1e4, -300.0, 0.0, 300.0, 1e4])
def test_an_offset_common_to_all_logits(offset, dtype, device):
    x, weight = torch.randn(7, 8, device=device), torch.randn(13, 8, device=device)
    check(x, weight, torch.full((13,), offset, device=device), torch.arange(7, device=device), dtype, f"{offset}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, classes", [(4, 3), (1, 5), (1, 1), (3, 1)])
def test_equal_logits_few_classes_and_one_row(rows, classes, dtype, device):
    x, target = torch.randn(rows, 8, device=device), torch.arange(rows, device=device) % classes
    row = torch.randn(1, 8, device=device)
    for weight in (row.expand(classes, 8), torch.randn(classes, 8, device=device)):
        check(x, weight, torch.zeros(classes, device=device), target, dtype, f"{rows} x {classes}", workspace_bytes=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3])
def test_a_vocabulary_of_262144(rows, dtype, device):
    x, weight = torch.randn(rows, 4, device=device), torch.randn(262144, 4, device=device)
    target = torch.tensor([262143, 0, 77], device=device)[:rows]
    check(x, weight, torch.zeros(262144, device=device), target, dtype, "V = 262144", workspace_bytes=1 << 21)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_recomputed_gradients_do_not_depend_on_the_slabs(dtype, device, monkeypatch):
    monkeypatch.setattr(head_slabs, "TILE_ROWS", 8)
    x, weight = torch.randn(48, 16, device=device), torch.randn(200, 16, device=device)
    x, weight = (t.to(dtype).requires_grad_() for t in (x, weight))
    target, upstream = torch.randint(0, 200, (48,), device=device), torch.randn(48, device=device)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    losses = F.cross_entropy(F.linear(*wide), target, reduction="none")
    truths = torch.autograd.grad(losses, wide, upstream.double())
    errors = []
    for rows, classes in ((48, 16), (48, 64), (48, 112), (48, 208), (8, 16), (16, 16)):
        budget = rows * classes * dtype.itemsize
        assert head_slabs.slab_of(48, 200, dtype, device, budget) == (rows, min(classes, 200))
        found = torch.autograd.grad(
            fused(x, weight, target, reduction="none", workspace_bytes=budget), (x, weight), upstream
        )
        errors.append([((f.double() - t).norm() / t.norm()).item() for f, t in zip(found, truths)])
    F.cross_entropy(F.linear(x, weight).float(), target, reduction="none").backward(upstream)
    torchs = [((p.grad.double() - t).norm() / t.norm()).item() for p, t in zip((x, weight), truths)]
    for of_one_gradient, torchs_own in zip(zip(*errors), torchs):
        assert max(of_one_gradient) < 1.2 * min(of_one_gradient), errors
        assert max(of_one_gradient) < 1.1 * torchs_own, (errors, torchs)


@pytest.mark.parametrize("rows", [1000, 1 << 14, 1 << 17, 1 << 20])
@pytest.mark.parametrize("classes", [3, 32000, 50257, 262144])
def test_chunks_and_slabs_fit_their_budget(rows, classes):
    device = torch.device("cpu")
    for budget in (1 << 24, 1 << 28, 1 << 32):
        chunk = head_chunks.chunk_rows(rows, classes, torch.bfloat16, device, True, budget)
        assert chunk * head_chunks.pitch(classes) * 2 <= budget
        tall, slab = head_slabs.slab_of(rows, classes, torch.bfloat16, device, budget)
        assert tall * head_chunks.pitch(slab) * 2 <= budget  # 0 classes where none fit: row chunks are taken then


@pytest.mark.parametrize("call", ["mean", "none", "log-probabilities", "no grad"])
def test_what_is_allocated_stays_within_the_budget_at_any_length(call, monkeypatch, device):
    for room in (row_loss, head_slabs):  # torch's row kernels go through a chunk in tiles of their own
        monkeypatch.setattr(room, "TILE", 1 << 16)
    width, budget = 4, 1 << 23
    for rows, classes in ((1024, 4096), (16384, 2048), (262144, 128)):
        weight = torch.randn(classes, width, device=device, requires_grad=True)
        x = torch.randn(rows, width, device=device, requires_grad=True)
        target = masked(rows, classes, 0.1, device)
        with Peak() as peak, torch.set_grad_enabled(call != "no grad"):
            if call == "log-probabilities":
                loss = logprobs(x, weight, target, workspace_bytes=budget).log_prob.sum()
            else:
                reduction = "none" if call == "none" else "mean"
                loss = fused(x, weight, target, reduction=reduction, workspace_bytes=budget).sum()
            if call != "no grad":
                torch.autograd.grad(loss, (x, weight))
        # beside a chunk: hidden without its ignored rows, gradients (twice that of hidden while its rows are put back),
        # and 128 bytes a row of labels, indices and statistics, as in the test on a card
        beside = 4 * width * (3 * rows + 3 * classes) + 128 * rows + 4 * row_loss.TILE
        assert peak.peak <= budget + beside, (rows, peak.peak, budget + beside)
        assert budget + beside < rows * classes * 4  # the whole logits are more


def test_a_default_chunk_on_a_gpu_is_full_tiles_or_everything():
    device = torch.device("cuda")  # only named, none is needed
    for rows, classes, width in ((8192, 128256, 4096), (16384, 151936, 1024), (16384, 32000, 4096)):
        chunk = head_chunks.chunk_rows(rows, classes, torch.bfloat16, device, True, None, 2 * classes * width)
        assert chunk % 512 == 0 and chunk * head_chunks.pitch(classes) * 2 <= 560 << 20
    # no more than two chunks and the other half of an fp32 sum take
    assert head_chunks.chunk_rows(4096, 128256, torch.bfloat16, device, True, None, 2 * 128256 * 4096) == 4096
    assert head_chunks.chunk_rows(4096, 128256, torch.bfloat16, device, True) == 2048
    assert head_chunks.chunk_rows(4096, 128256, torch.bfloat16, device, True, 1 << 29, 2 * 128256 * 4096) == 2048


def masked(rows, classes, share, device):
    target = torch.randint(0, classes, (rows,), device=device)
    return target.masked_fill(torch.rand(rows, device=device) < share, -100)


@pytest.mark.parametrize("later", [False, True])  # whether the device answers while other work is queued
@pytest.mark.parametrize("share", [0.75, 0.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_rows_change_no_gradient_whether_the_host_asks_or_not(reduction, share, later, monkeypatch, device):
    monkeypatch.setattr(live_rows, "WORTH_WAITING", 0)
    monkeypatch.setattr(live_rows, "AHEAD", 16 * 40)
    backend = dataclasses.replace(backends.device_of(device), answers_later=later)
    monkeypatch.setattr(live_rows, "device_of", lambda device: backend)
    x, weight = (torch.randn(*s, device=device, requires_grad=True) for s in ((64, 8), (40, 8)))
    target, found = masked(64, 40, share, device), []
    products = []
    project = head_chunks.project
    for module in (head, head_chunks, head_slabs):
        monkeypatch.setattr(module, "project", lambda h, *rest: products.append(h.shape[0]) or project(h, *rest))
    for wait in ("1", "0"):
        monkeypatch.setenv("LIGER_KERNEL_HOST_SYNC", wait)
        loss = fused(x, weight, target, reduction=reduction)
        found.append([loss.detach(), *torch.autograd.grad(loss.sum(), (x, weight))])
    live = int((target != -100).sum())
    asking = [64, 16] if later else []  # of 64 rows, 16 have their logits before the answer is there
    waiting = asking + [live] if live < 64 else asking or [64]
    assert products == (waiting * 2 + [64] * 2 if reduction == "none" else [*waiting, 64])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    assert not found[0][1][target == -100].any()


# On a card


@pytest.mark.gpu
def test_peak_memory_stays_within_the_budget_at_any_length(device):
    width, classes, budget = 256, 32000, 64 << 20
    weight = torch.randn(classes, width, dtype=torch.bfloat16, device=device, requires_grad=True)
    for rows in (1024, 16384, 262144):
        x = torch.randn(rows, width, dtype=torch.bfloat16, device=device, requires_grad=True)
        target = masked(rows, classes, 0.1, device)
        for reduction in ("mean", "none"):
            for _ in range(2):  # the first call compiles
                torch.cuda.synchronize()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                loss = fused(x, weight, target, reduction=reduction, workspace_bytes=budget)
                grads = torch.autograd.grad(loss.sum(), (x, weight))
                torch.cuda.synchronize()
                peak = torch.cuda.max_memory_allocated() - before
                del loss, grads
            # besides a chunk: hidden without its ignored rows, gradients (twice that of hidden while its rows are put
            # back), the fp32 sum of the smaller of them, and 128 bytes a row of labels, indices and statistics
            small = min(rows, classes) if reduction == "none" else classes
            beside = 2 * width * (3 * rows + classes) + 4 * width * small + 128 * rows + (8 << 20)
            assert peak <= budget + beside, (rows, reduction, peak >> 20, (budget + beside) >> 20)


def as_exact_as_torch(rows, width, classes, budgets, device):
    """Loss and gradients of a bf16 head of any size against fp64, which is computed some rows at a time."""
    x = torch.randn(rows, width, dtype=torch.bfloat16, device=device, requires_grad=True)
    weight = (torch.randn(classes, width, device=device) / width**0.5).bfloat16().requires_grad_()
    target = masked(rows, classes, 0.1, device)
    target[-1] = classes - 1  # the last logit counts
    count = (target != -100).sum()
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    loss, step = 0.0, max(1, (1 << 27) // classes)
    for i in range(0, rows, step):
        part = F.cross_entropy(F.linear(wide[0][i : i + step], wide[1]), target[i : i + step], reduction="sum") / count
        part.backward()
        loss += part.detach()
    truth = [loss, *(t.grad for t in wide)]
    own = F.cross_entropy(F.linear(x, weight).float(), target)
    torchs = [own.detach(), *torch.autograd.grad(own, (x, weight))]
    del own
    for budget in budgets:
        for reduction in ("mean", "none"):
            losses = fused(x, weight, target, reduction=reduction, workspace_bytes=budget)
            ours = losses if reduction == "mean" else losses.sum() / count
            found = [ours.detach(), *torch.autograd.grad(ours, (x, weight))]
            assert_as_good_as_torch(found, torchs, truth, torch.bfloat16, f"{reduction} in {budget} bytes")


@pytest.mark.gpu
def test_logits_of_more_than_two_to_the_31_elements(device):
    if torch.cuda.mem_get_info()[0] < 70 << 30:
        pytest.skip("torch's own loss needs 70 GiB of device memory")
    assert 20000 * 128256 > 2**31
    as_exact_as_torch(20000, 64, 128256, (1 << 40, 1 << 28), device)


def test_the_comparison_of_large_logits_on_small_ones(device):
    as_exact_as_torch(50, 16, 300, (1 << 40, 40000), device)


def big_enough_to_ask(device):
    x = torch.randn(512, 256, dtype=torch.bfloat16, device=device, requires_grad=True)
    weight = torch.randn(4096, 256, dtype=torch.bfloat16, device=device, requires_grad=True)
    return x, weight, masked(512, 4096, 0.5, device)


STEPS = {
    "mean": lambda x, w, y: fused(x, w, y, workspace_bytes=1 << 20),
    "none": lambda x, w, y: fused(x, w, y, reduction="none", workspace_bytes=1 << 20).sum(),
    "logprobs": lambda x, w, y: sum(
        (o.log_prob + o.lse + o.entropy).sum() for o in [logprobs(x, w, y, return_entropy=True, temperature=0.7)]
    ),
}


@pytest.mark.parametrize("later", [False, True])
def test_the_count_reaches_the_host_whatever_device_is_the_default(later, device):
    target = masked(64, 40, 0.5, device)
    with torch.device("meta"):
        rows = live_rows.LiveRows(target, -100, later)
    assert rows.some_ignored()
    assert rows.indices().tolist() == [i for i, label in enumerate(target.tolist()) if label != -100]
    assert not live_rows.LiveRows(target.clamp(min=0), -100, later).some_ignored()


@pytest.mark.gpu
@pytest.mark.parametrize("name", STEPS)
def test_the_host_never_waits_where_that_is_an_error_or_a_graph_is_captured(name, monkeypatch, device):
    monkeypatch.setattr(live_rows, "WORTH_WAITING", 0)
    given = big_enough_to_ask(device)
    leaves = given[:2]

    def step():
        return torch.autograd.grad(STEPS[name](*given), leaves)

    asked = [g.clone() for g in step()]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = [g.clone() for g in step()]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(asked, expected):
        assert (a.double() - b.double()).norm() < 2e-2 * b.double().norm()  # other chunks, so other bf16 roundings
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        monkeypatch.setenv("LIGER_KERNEL_HOST_SYNC", "0")
        step()
        monkeypatch.delenv("LIGER_KERNEL_HOST_SYNC")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_a_captured_temperature_may_change_between_replays(device):
    x, weight, target = big_enough_to_ask(device)
    temperature = torch.ones((), device=device)

    def step():
        return torch.autograd.grad(fused(x, weight, target, temperature=temperature), (x, weight))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for value in (0.5, 2.0):
        temperature.fill_(value)
        graph.replay()
        for a, b in zip(found, step(), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.gpu
def test_two_hundred_lengths_compile_nothing_new(device):
    from liger_kernel.ops.kernels import launch

    weight = torch.randn(5000, 64, dtype=torch.bfloat16, device=device, requires_grad=True)

    def step(rows):
        x = torch.randn(rows, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
        for call in STEPS.values():
            call(x, weight, masked(rows, 5000, 0.2, device)).backward()

    step(96), step(1001)
    before = len(launch._handles)
    for rows in torch.randint(1, 3000, (200,)).tolist():
        step(rows)
    assert len(launch._handles) == before > 0


@pytest.mark.parametrize("rows", [0, 6])
@pytest.mark.parametrize("call", ["none", "log-probabilities"])
def test_without_a_row_to_learn_from_the_recomputed_gradient_of_the_weight_was_what_lay_in_memory(
    call, rows, poisoned_memory, device
):
    x, weight = (torch.randn(n, 8, device=device, requires_grad=True) for n in (rows, 40))
    target = torch.full((rows,), -100, device=device)
    if call == "none":
        loss = fused(x, weight, target, reduction="none", workspace_bytes=1 << 20).sum()
    else:
        loss = logprobs(x, weight, target).log_prob.sum()
    for gradient in torch.autograd.grad(loss, (x, weight)):
        assert not gradient.any()


def test_fewer_rows_always_have_a_slab_where_more_have_one(monkeypatch):
    monkeypatch.setattr(head_slabs, "TILE_ROWS", 8)
    for budget in range(64, 8192, 64):
        fits = [head_slabs.slab_of(n, 200, torch.float32, torch.device("cpu"), budget)[1] > 0 for n in range(1, 200)]
        assert fits == sorted(fits, reverse=True), budget
