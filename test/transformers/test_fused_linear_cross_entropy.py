"""What is special about the fused head; that it equals its reference is in test_contract.py."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from liger_kernel.ops import fused_linear_cross_entropy as room
from liger_kernel.ops import head, head_chunks, weight_sum
from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, functional
from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as fused
from liger_kernel.transformers.functional import liger_fused_linear_logprobs as logprobs

from support_head import low_rank_term, problem


@pytest.mark.parametrize("rows, plain", [(9, True), (10, False)])
def test_plain_torch_up_to_a_number_of_logits(rows, plain, monkeypatch):
    monkeypatch.setattr(room, "SMALL", 9 * 21)
    ran, own = [], room.LigerFusedLinearCrossEntropyFunction.apply
    monkeypatch.setattr(room.LigerFusedLinearCrossEntropyFunction, "apply", lambda *args: ran.append(1) or own(*args))
    x, weight, target, _ = problem(rows)
    torch.testing.assert_close(fused(x, weight, target), F.cross_entropy(F.linear(x, weight), target))
    assert bool(ran) != plain


def relative_error(got, truth):
    return ((got.double() - truth).norm() / truth.norm()).item()


def test_weight_gradient_is_independent_of_the_number_of_chunks(device):
    x, weight, target, _ = problem(1024, 16, 64, torch.bfloat16, device)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    F.cross_entropy(F.linear(*wide), target).backward()
    truth = wide[1].grad
    F.cross_entropy(F.linear(x, weight).float(), target).backward()
    torchs = relative_error(weight.grad, truth)
    errors = []
    for chunks in (1, 2, 4, 8, 16, 32, 64):
        weight.grad = None
        budget = 1024 // chunks * 64 * 2
        assert head_chunks.chunk_rows(1024, 64, torch.bfloat16, device, True, budget) == 1024 // chunks
        fused(x, weight, target, workspace_bytes=budget).backward()
        errors.append(relative_error(weight.grad, truth))
    assert max(errors) < 1.2 * min(errors), errors
    assert max(errors) < 1.1 * torchs, (errors, torchs)


class Allocated(TorchDispatchMode):
    """The memory of every result of at least `least` elements in fp32, for as long as it lives."""

    def __init__(self, least):
        super().__init__()
        self.least, self.seen, self.peak = least, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.dtype is torch.float32 and t.numel() >= self.least:
                self.seen[t.untyped_storage()._cdata] = (
                    StorageWeakRef(t.untyped_storage()),
                    t.untyped_storage().nbytes(),
                )
        self.peak = max(self.peak, self.now())
        return out

    def now(self):
        return sum(size for ref, size in self.seen.values() if not ref.expired())


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("chunks", [1, 4])
def test_one_fp32_buffer_of_the_weights_size_at_most_and_none_after_the_forward(chunks, reduction, monkeypatch, device):
    monkeypatch.setattr(weight_sum, "SLAB", 1024)  # of the temporaries, which are not this large in earnest
    rows, width, classes = 32, 64, 96
    x, weight, target, _ = problem(rows, width, classes, torch.bfloat16, device)
    budget = rows // chunks * classes * 2
    with Allocated(width * classes // 2) as wide:  # more than a chunk of logits or of hidden states is
        loss = fused(x, weight, target, reduction=reduction, workspace_bytes=budget)
        after_forward = wide.now()
        grads = torch.autograd.grad(loss.sum(), (x, weight))
    several = chunks > 1 and reduction == "mean"  # unreduced, dW is finished a range of classes at a time
    assert wide.peak == 4 * width * classes * several
    assert after_forward == 2 * width * classes * several  # what is left holds the gradient in bf16
    assert grads[1].untyped_storage().nbytes() == 2 * width * classes


# Multiplications and additions over T H V.
FLOPS = {
    "mean": (6, lambda x, w, y, b: fused(x, w, y, workspace_bytes=b).backward()),
    "none": (8, lambda x, w, y, b: fused(x, w, y, reduction="none", workspace_bytes=b).sum().backward()),
    "log-probabilities": (8, lambda x, w, y, b: logprobs(x, w, y, workspace_bytes=b).log_prob.sum().backward()),
    "mean, frozen weight": (4, lambda x, w, y, b: fused(x, w.detach(), y, workspace_bytes=b).backward()),
    "no grad": (2, torch.no_grad()(lambda x, w, y, b: fused(x, w, y, workspace_bytes=b))),
    "no grad, none": (2, torch.no_grad()(lambda x, w, y, b: fused(x, w, y, reduction="none", workspace_bytes=b))),
    "no grad, log-probabilities": (2, torch.no_grad()(lambda x, w, y, b: logprobs(x, w, y, workspace_bytes=b))),
    "nothing trained": (2, lambda x, w, y, b: fused(x.detach(), w.detach(), y, workspace_bytes=b)),
    "nothing trained, none": (
        2,
        lambda x, w, y, b: fused(x.detach(), w.detach(), y, reduction="none", workspace_bytes=b),
    ),
}


@pytest.mark.parametrize("name", FLOPS)
@pytest.mark.parametrize("workspace", [None, 8 * 64 * 4], ids=["one chunk", "chunks"])
def test_products(name, workspace, device):
    x, weight, target, _ = problem(32, 16, 64, device=device)
    target = target.where(target != -100, 0)  # ignored rows would be left out
    expected, call = FLOPS[name]
    in_place = {torch.ops.aten.addmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        call(x, weight, target, workspace)
    assert counter.get_total_flops() == expected * 32 * 16 * 64


def test_lean_mode_accumulates_in_bf16(device):
    x, weight, target, _ = problem(512, 16, 64, torch.bfloat16, device)
    grads = {}
    for accum in (None, torch.bfloat16):
        weight.grad = None
        fused(x, weight, target, accum_dtype=accum, workspace_bytes=8 * 64 * 2).backward()
        grads[accum] = weight.grad
    assert not torch.equal(*grads.values())
    torch.testing.assert_close(*grads.values(), rtol=0.1, atol=2e-4)  # 64 roundings to 8 bits


class Largest(TorchDispatchMode):
    def __init__(self):
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = out if isinstance(out, (tuple, list)) else [out]
        self.numel = max([self.numel, *(t.numel() for t in tensors if isinstance(t, torch.Tensor))])
        return out


@pytest.mark.parametrize("call", ["mean", "none", "log-probabilities", "no grad"])
def test_logits_never_exist_whole(call, device):
    x, weight, target, _ = problem(64, 8, 512, device=device)
    options = dict(softcap=5.0, workspace_bytes=8 * 512 * 4)
    with Largest() as largest, torch.set_grad_enabled(call != "no grad"):
        if call == "log-probabilities":
            found = logprobs(x, weight, target, return_entropy=True, return_predicted=True, **options)
            loss = (found.log_prob + found.lse + found.entropy).sum()
        else:
            loss = fused(x, weight, target, reduction="none" if call == "none" else "mean", **options).sum()
        if call != "no grad":
            loss.backward()
    assert largest.numel <= 8 * 512


@pytest.mark.parametrize("rows", [1, 7, 1000, 1 << 20])
@pytest.mark.parametrize("classes", [1, 3, 50257, 262144])
def test_a_chunk_fits_its_budget(rows, classes, monkeypatch):
    for dtype in (torch.float32, torch.bfloat16):
        fits = head_chunks.chunk_rows(rows, classes, dtype, torch.device("cpu"), True, 1 << 26)
        assert 1 <= fits <= rows and fits * head_chunks.pitch(classes) * dtype.itemsize <= 1 << 26
    monkeypatch.setenv("LIGER_KERNEL_WORKSPACE_MB", "64")
    assert head_chunks.chunk_rows(rows, classes, dtype, torch.device("cpu"), True) == fits
    monkeypatch.setenv("LIGER_KERNEL_WORKSPACE_MB", "lots")
    with pytest.raises(ValueError, match="LIGER_KERNEL_WORKSPACE_MB='lots'"):
        head_chunks.chunk_rows(rows, classes, dtype, torch.device("cpu"), True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("trained", [(True, False), (False, True), (False, False)])
def test_frozen_parts_cost_no_product(trained, reduction, monkeypatch, device):
    x, weight, target, _ = problem(device=device)
    reference = torch.autograd.grad(F.cross_entropy(F.linear(x, weight), target), (x, weight))
    x.requires_grad_(trained[0]), weight.requires_grad_(trained[1])
    asked = []
    found = room.kernels

    def watched(op, x):
        pair = found(op, x)

        def spy(*args, needs=(False,) * 3, **kwargs):
            asked.append(needs)
            return pair.forward(*args, needs=needs, **kwargs)

        return dataclasses.replace(pair, forward=spy) if op in (room.NAME, "head_slabs") else pair

    monkeypatch.setattr(room, "kernels", watched)
    loss = fused(x, weight, target, reduction=reduction)
    if any(trained):
        (loss.sum() if reduction == "mean" else loss.sum() / 8).backward()
    expected = (*trained, False)
    nothing = (False,) * 3
    assert asked == ([nothing, expected] if reduction == "none" and any(trained) else [expected])
    for leaf, wanted, truth in zip((x, weight), trained, reference):
        assert (leaf.grad is not None) == wanted
        if wanted:
            torch.testing.assert_close(leaf.grad, truth)


def test_no_gradient_work_under_no_grad(monkeypatch, device):
    x, weight, target, _ = problem(device=device)
    monkeypatch.setattr(head.WeightSum, "add", lambda *args: pytest.fail("a gradient was formed"))
    with torch.no_grad():
        loss = fused(x, weight, target)
        direct = room.LigerFusedLinearCrossEntropyFunction.apply(x, weight, target)[0]
    torch.testing.assert_close(loss, F.cross_entropy(F.linear(x, weight), target).detach())
    assert torch.equal(loss, direct)


FLOATS = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("x_dtype, w_dtype", list(itertools.product(FLOATS, FLOATS)))
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_mixed_dtypes(x_dtype, w_dtype, autocast, reduction, device):
    x, weight, target, b = problem(device=device, bias=True)
    x, weight, b = (t.detach().to(d).requires_grad_() for t, d in ((x, x_dtype), (weight, w_dtype), (b, w_dtype)))
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast is not None):
        ours = fused(x, weight, target, b, reduction=reduction)
        same = (lambda t: t) if autocast else (lambda t: t.to(x_dtype))  # without autocast F.linear takes no mixture
        truth = F.cross_entropy(F.linear(x, same(weight), same(b)).float(), target, reduction=reduction)
    assert ours.dtype == truth.dtype == torch.float32
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)
    grads, truths = (torch.autograd.grad(v.sum(), (x, weight, b)) for v in (ours, truth))
    for g, t in zip(grads, truths):
        assert g.dtype == t.dtype
        # bf16 products: a rounding here and there where torch has one less
        exact = autocast is None and x_dtype == w_dtype == torch.float32
        torch.testing.assert_close(g, t, **(dict(rtol=1e-4, atol=1e-5) if exact else dict(rtol=2e-2, atol=2e-2)))


def test_second_backward_raises():
    x, weight, target, _ = problem()
    loss = fused(x, weight, target)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_unreduced_losses_may_be_differentiated_twice():
    x, weight, target, _ = problem()
    loss = fused(x, weight, target, reduction="none")
    first = torch.autograd.grad(loss.sum(), (x, weight), retain_graph=True)
    again = torch.autograd.grad(loss.sum(), (x, weight))
    for a, b in zip(first, again):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 1, 6])
def test_no_valid_label_gives_zero_and_finite_gradients(rows, reduction, impl, device):
    x, weight, _, b = problem(max(rows, 1), device=device, bias=True)
    x = x.detach()[:rows].requires_grad_()
    out = fused(
        x, weight, torch.full((rows,), -100, device=device), b, reduction=reduction, return_token_accuracy=True,
        normalizer=None if reduction == "none" else 0,
    )  # fmt: skip
    assert out.loss.sum() == 0.0 and out.token_accuracy == 0.0
    out.loss.sum().backward()
    for leaf in (x, weight, b):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_any_split_into_micro_batches_gives_the_same_gradients(device):
    x, weight, target, _ = problem(12, device=device)
    count = (target != -100).sum()
    whole = torch.autograd.grad(fused(x, weight, target), (x, weight))
    for parts in ((6, 6), (1, 2, 9), (4, 4, 4)):
        losses = [
            fused(h, weight, y, reduction="sum", normalizer=count) for h, y in zip(x.split(parts), target.split(parts))
        ]
        for a, b in zip(torch.autograd.grad(sum(losses), (x, weight)), whole):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_leading_dims_are_kept(device):
    x, weight, target, _ = problem(12, device=device)
    out = fused(x.view(3, 4, -1), weight, target.view(3, 4), reduction="none", return_predicted_tokens=True)
    assert out.loss.shape == out.predicted_tokens.shape == (3, 4)
    torch.testing.assert_close(out.loss.flatten(), F.cross_entropy(F.linear(x, weight), target, reduction="none"))
    out.loss.sum().backward()
    assert x.grad.shape == x.shape


def test_replaced_helpers_are_called(monkeypatch):
    """axolotl wraps both globals of the room."""
    called = []
    for name in ("fused_linear_cross_entropy_forward", "fused_linear_cross_entropy_backward"):
        real = getattr(room, name)

        def wrapped(*args, _name=name, _real=real, **kwargs):
            called.append(_name)
            return _real(*args, **kwargs)

        monkeypatch.setattr(room, name, wrapped)
    x, weight, target, _ = problem()
    fused(x, weight, target).backward()
    assert called == ["fused_linear_cross_entropy_forward", "fused_linear_cross_entropy_backward"]


def test_replaced_functional_is_called_by_the_module(monkeypatch):
    """axolotl replaces the attribute to force token scaling."""
    x, weight, target, _ = problem()
    plain = LigerFusedLinearCrossEntropyLoss()(weight, x, target)
    scaled = LigerFusedLinearCrossEntropyLoss(use_token_scaling=True)(weight, x, target)
    real = functional.liger_fused_linear_cross_entropy

    def forced(input, weight, target, bias, ce_weight, *args, **kwargs):
        return real(input, weight, target, bias, ce_weight, use_token_scaling=True)

    monkeypatch.setattr(functional, "liger_fused_linear_cross_entropy", forced)
    again = LigerFusedLinearCrossEntropyLoss()(weight, x, target)
    assert torch.equal(again, scaled) and not torch.equal(again, plain)


def test_helpers_keep_the_signatures_of_upstream():
    x, weight, target, b = problem(bias=True)
    *results, dx, dw, db = room.fused_linear_cross_entropy_forward(x, weight, target, None, b)
    assert len(results) == 4
    truth = torch.autograd.grad(F.cross_entropy(F.linear(x, weight, b), target), (x, weight, b))
    for got, expected in zip(room.fused_linear_cross_entropy_backward(torch.tensor(2.0), dx, dw, db), truth):
        torch.testing.assert_close(got, 2 * expected)
    frozen = room.fused_linear_cross_entropy_forward(x, weight, target, weight_requires_grad=False)
    assert frozen[4] is not None and frozen[5] is None and frozen[6] is None
    assert room.fused_linear_cross_entropy_forward(x, weight, target, compute_gradients=False)[4] is None


def traced_arguments(reduction, dtype=torch.float32):
    x, weight, target, b = problem(dtype=dtype, bias=True)
    return (x, weight, target, b, None, torch.rand(9), torch.tensor(5.0) if reduction != "none" else None,
            *low_rank_term(), torch.tensor(0.5), torch.tensor(2.0), -100, [1e-3, 0.1], reduction, 4.0, None, True,
            [True, True, False, True], [True] * 5, dtype, 500, [0, 21])  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_custom_op_passes_opcheck(reduction):
    from liger_kernel.ops.head_compile import forward_op

    torch.library.opcheck(forward_op, traced_arguments(reduction))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_a_graph_break_and_once_for_all_lengths(reduction):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(fused, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for rows in (9, 14, 33):
        x, weight, target, b = problem(rows, bias=True)
        low_rank = low_rank_term(rows)
        options = dict(reduction=reduction, softcap=4.0, workspace_bytes=500, low_rank=low_rank, return_entropy=True)
        ours, truth = step(x, weight, target, b, **options), fused(x, weight, target, b, **options)
        torch.testing.assert_close((ours.loss, ours.entropy), (truth.loss, truth.entropy))
        leaves = x, weight, b, *low_rank
        for a, b in zip(*(torch.autograd.grad(v.loss.sum(), leaves) for v in (ours, truth))):
            torch.testing.assert_close(a, b)
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen weight", "trained weight"])
def test_low_rank_term_is_that_of_the_merged_weight(reduction, frozen, impl, device):
    x, weight, target, b = problem(device=device, bias=True)
    u, low = low_rank_term(device=device)
    weight.requires_grad_(not frozen)
    ours = fused(x, weight, target, b, reduction=reduction, softcap=4.0, low_rank=(u, low), workspace_bytes=300)
    leaves = [t.detach().double().requires_grad_() for t in (x, weight, b, u, low)]
    h, w, bias, *low_rank = leaves
    truth = room.reference(h, w, bias, target, low_rank=low_rank, reduction=reduction, softcap=4.0)[0]
    torch.testing.assert_close(ours.double(), truth, rtol=2e-5, atol=2e-5)  # fp32 sums of nine rows
    upstream = torch.randn_like(truth)
    ours.backward(upstream.to(ours))
    truth.backward(upstream)
    assert (weight.grad is None) == frozen
    for ours_of, truth_of in zip((x, weight, b, u, low), leaves):
        if ours_of.requires_grad:
            torch.testing.assert_close(ours_of.grad.double(), truth_of.grad, rtol=1e-4, atol=2e-5)


def test_low_rank_term_of_a_frozen_weight_needs_no_weight_gradient(monkeypatch, device):
    made = []
    own = head.WeightSum.__init__
    monkeypatch.setattr(head.WeightSum, "__init__", lambda self, *args: made.append(args[:2]) or own(self, *args))
    x, weight, target, _ = problem(device=device)
    fused(x, weight.requires_grad_(False), target, low_rank=low_rank_term(device=device)).backward()
    assert made == [(21, 3)]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropy_comes_with_the_loss(reduction, temperature, impl, device):
    x, weight, target, b = problem(device=device, bias=True)
    x = x.detach().view(3, 3, 8).requires_grad_()
    given = dict(reduction=reduction, temperature=temperature, softcap=4.0)
    ours = fused(x, weight, target.view(3, 3), b, return_entropy=True, workspace_bytes=300, **given)
    assert torch.equal(ours.loss, fused(x, weight, target.view(3, 3), b, workspace_bytes=300, **given))
    logits = 4.0 * torch.tanh(torch.nn.functional.linear(x, weight, b).double() / 4.0) / temperature
    log_p = logits.log_softmax(-1)
    truth = -(log_p.exp() * log_p).sum(-1).where(target.view(3, 3) != -100, 0.0)
    torch.testing.assert_close(ours.entropy.double(), truth, rtol=1e-5, atol=1e-5)  # fp32 sums of 21 classes
    assert not ours.entropy.requires_grad
    ours.loss.sum().backward()
    assert x.grad.isfinite().all()


def bad_calls():
    x, w, y, _ = problem()
    yield r"low_rank needs shapes \(9, r\) and \(21, r\)", (x, w, y), dict(low_rank=(x, w[:, :3]))
    yield "low_rank must be floats on cpu, got torch.float32 on meta", (x, w, y), dict(low_rank=(x, w.to("meta")))
    yield "hidden has H = 8 and needs a weight", (x, w[:, :7], y), {}
    yield r"target of shape \(8,\), expected \(9,\)", (x, w, y[:8]), {}
    yield "target must be int64 or int32", (x, w, y.float()), {}
    yield "hidden is on cpu and the weight on meta", (x, w.to("meta"), y), {}
    yield "the input is on cpu and the target on meta", (x, w, y.to("meta")), {}
    yield r"bias of shape \(20,\), expected \(21,\)", (x, w, y, torch.zeros(20)), {}
    yield r"class weight of shape \(21,\)", (x, w, y), dict(ce_weight=torch.ones(3))
    yield "reduction must be one of", (x, w, y), dict(reduction="avg")
    yield r"label_smoothing must be in \[0, 1\]", (x, w, y), dict(label_smoothing=-0.1)
    yield "softcap must be positive", (x, w, y), dict(softcap=-1.0)
    yield "temperature must be positive", (x, w, y), dict(temperature=0.0)
    yield "normalizer goes with", (x, w, y), dict(reduction="none", normalizer=3)
    yield r"token_weight of shape \(3,\)", (x, w, y), dict(token_weight=torch.ones(3))
    yield "accum_dtype must be a float dtype", (x, w, y), dict(accum_dtype=torch.int32)
    yield "workspace_bytes must be positive", (x, w, y), dict(workspace_bytes=0)
    yield r"target\[0\] is 21", (x, w, torch.full((9,), 21)), {}


@pytest.mark.parametrize("message, args, options", bad_calls(), ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input_is_named(message, args, options):
    with pytest.raises(ValueError, match=message):
        fused(*args, **options)


@pytest.mark.parametrize("option", [dict(reduction="avg"), dict(label_smoothing=2.0), dict(softcap=0.0)])
def test_bad_option_is_named_at_construction(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        LigerFusedLinearCrossEntropyLoss(**option)


def test_ignored_rows_go_through_no_product_on_a_cpu(monkeypatch):
    x, w = torch.randn(64, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    y = torch.randint(0, 30, (64,))
    y[torch.randperm(64)[:48]] = -100
    seen, project = [], head_chunks.project
    monkeypatch.setattr(head, "project", lambda h, *rest: (seen.append(h.shape[0]), project(h, *rest)))
    ours = torch.autograd.grad(fused(x, w, y), (x, w))
    assert sum(seen) == 16
    monkeypatch.setenv("LIGER_KERNEL_HOST_SYNC", "0")
    theirs = torch.autograd.grad(fused(x, w, y), (x, w))
    assert sum(seen) == 16 + 64
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


SMALL_CALLS = [
    {}, dict(reduction="sum"), dict(reduction="none"), dict(normalizer=7), dict(reduction="sum", normalizer="tensor"),
    dict(softcap=4.0, logit_scale=0.5, temperature=0.7), dict(label_smoothing=0.1, ce_weight=True),
    dict(ignore_index=3), dict(vocab_slice=(2, 20)), dict(bias=True), dict(all_ignored=True), dict(rows=0),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("call", SMALL_CALLS, ids=str)
def test_a_small_problem_takes_plain_torch_and_gives_the_same(call, dtype, monkeypatch, device):
    call = dict(call)
    x, weight, target, b = problem(9, dtype=dtype, device=device, bias=call.pop("bias", False))
    rows = call.pop("rows", 9)
    x, target = x.detach()[:rows].requires_grad_(), target[:rows] % (18 if "vocab_slice" in call else 21)
    if call.pop("all_ignored", False):
        target = torch.full_like(target, -100)
    if call.get("normalizer") == "tensor":
        call["normalizer"] = torch.tensor(7, device=device)
    if call.pop("ce_weight", False):
        call["ce_weight"] = torch.rand(21, device=device) + 0.1
    leaves = [t for t in (x, weight, b) if t is not None]
    engine = fused(x, weight, target, b, **call)
    monkeypatch.setattr(room, "SMALL", 1 << 16)
    monkeypatch.setattr(room.LigerFusedLinearCrossEntropyFunction, "apply", lambda *args: pytest.fail("the engine ran"))
    plain = fused(x, weight, target, b, **call)
    slack = dict(rtol=1e-5, atol=1e-6) if dtype is torch.float32 else dict(rtol=2e-2, atol=1e-2)  # of 8 bits
    assert plain.dtype == engine.dtype
    torch.testing.assert_close(plain, engine, rtol=1e-5, atol=1e-6)
    for a, e in zip(*(torch.autograd.grad(loss.sum(), leaves) for loss in (plain, engine)), strict=True):
        torch.testing.assert_close(a, e, **slack)


def test_a_small_problem_calls_the_helpers_that_somebody_replaced(monkeypatch):
    monkeypatch.setattr(room, "SMALL", 1 << 16)
    called, own = [], room.fused_linear_cross_entropy_forward
    monkeypatch.setattr(room, "fused_linear_cross_entropy_forward", lambda *a, **k: called.append(1) or own(*a, **k))
    fused(*problem()[:3])
    assert called
