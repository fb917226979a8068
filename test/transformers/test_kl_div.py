"""What is special about kl_div: torch's own reductions and options, eps, zero probabilities, both gradients."""

import pytest
import torch
import torch.nn.functional as F

from liger_kernel.ops.kl_div import LigerKLDivLossFunction, kldiv_backward_triton, kldiv_forward_triton
from liger_kernel.transformers.functional import liger_kl_div
from liger_kernel.transformers.kl_div import LigerKLDIVLoss

from support import assert_as_good_as_torch, dtypes

REDUCTIONS = ("mean", "batchmean", "sum", "none")
quiet = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of numpy, in Triton's interpreter


def pair(*shape, device="cpu", dtype=torch.float32, log_target=False):
    x, t = (torch.randn(shape, device=device).mul(2).log_softmax(-1) for _ in range(2))
    return x.to(dtype), (t if log_target else t.exp()).to(dtype)


def run(loss, x, t, upstream):
    """The loss and the gradients of both."""
    x, t = (v.detach().clone().requires_grad_() for v in (x, t))
    value = loss(x, t)
    value.backward(upstream.to(value).expand(value.shape))
    return value.detach(), x.grad, t.grad


@quiet
@pytest.mark.filterwarnings("ignore:reduction. 'mean'")
@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_kl_div_correctness(reduction, log_target, impl, device):
    """Against torch's own, both gradients."""
    for dtype in dtypes(impl, device):
        for shape in ((5, 41), (2, 3, 700), (17,)):
            x, t = pair(*shape, device=device, dtype=dtype, log_target=log_target)
            upstream = torch.randn(shape if reduction == "none" else (), device=device)

            def torchs(a, b):
                return F.kl_div(a, b, reduction=reduction, log_target=log_target)

            truth = run(torchs, x.double(), t.double(), upstream.to(dtype))
            theirs = run(torchs, x, t, upstream)
            ours = run(lambda a, b: liger_kl_div(a, b, reduction=reduction, log_target=log_target), x, t, upstream)
            assert_as_good_as_torch(ours, theirs, truth, dtype, f"kl_div {reduction} log_target={log_target} {shape}")


@quiet
@pytest.mark.parametrize("log_target", [False, True])
def test_zero_probability_adds_nothing_even_where_the_input_is_minus_infinity(log_target, impl, device):
    x, t = pair(3, 70, device=device, log_target=log_target)
    whole = run(lambda a, b: liger_kl_div(a, b, reduction="sum", log_target=log_target), x, t, torch.tensor(1.0))
    x, t = (F.pad(v, (0, 7), value=pad) for v, pad in ((x, float("-inf")), (t, float("-inf") if log_target else 0.0)))
    loss, dx, _ = run(lambda a, b: liger_kl_div(a, b, reduction="sum", log_target=log_target), x, t, torch.tensor(1.0))
    torch.testing.assert_close(loss, whole[0])  # fp32's own precision: the sums are cut into other pieces
    assert torch.equal(dx[:, :70], whole[1]) and not dx[:, 70:].any()


@quiet
def test_impossible_for_the_input_alone_is_infinite_as_in_torch(impl, device):
    x, t = pair(2, 9, device=device)
    x[0, 3] = float("-inf")
    assert liger_kl_div(x, t) == float("inf") == F.kl_div(x, t, reduction="sum")


@quiet
@pytest.mark.parametrize("log_target", [False, True])
def test_nan_is_not_hidden(log_target, impl, device):
    for side in range(2):
        both = pair(2, 9, device=device, log_target=log_target)
        both[side][1, 4] = float("nan")
        assert liger_kl_div(*both, log_target=log_target).isnan()


@quiet
def test_eps_bounds_the_target_inside_the_log_only(impl, device):
    x, t = pair(4, 33, device=device)
    eps = float(t.median())
    expected = t * (t.clamp(min=eps).log() - x)
    torch.testing.assert_close(liger_kl_div(x, t, reduction="none", eps=eps), expected)
    assert not torch.equal(expected, F.kl_div(x, t, reduction="none"))
    # with log_target there is no log of a target
    same = [liger_kl_div(x, t.log(), reduction="none", log_target=True, eps=e) for e in (eps, 1e-10)]
    assert torch.equal(*same)


@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated", "ignore:reduction. 'mean'")
def test_deprecated_arguments_mean_what_they_mean_in_torch(device):
    x, t = pair(4, 7, device=device)
    for options in (dict(reduce=False), dict(size_average=False), dict(size_average=False, reduce=False)):
        torch.testing.assert_close(liger_kl_div(x, t, **options), F.kl_div(x, t, **options))
    torch.testing.assert_close(liger_kl_div(x, t, True, True, "sum"), F.kl_div(x, t, reduction="sum"))


def test_positional_order_is_that_of_torch(device):
    x, t = pair(4, 7, device=device, log_target=True)
    torch.testing.assert_close(liger_kl_div(x, t, None, None, "sum", True), F.kl_div(x, t, None, None, "sum", True))


def test_empty_batch_is_zero(impl, device):
    for reduction in ("mean", "batchmean", "sum"):
        x = torch.zeros(0, 5, device=device, requires_grad=True)
        loss = liger_kl_div(x, torch.zeros(0, 5, device=device), reduction=reduction)
        loss.backward()
        assert loss == 0.0 and x.grad.shape == (0, 5)


def test_only_the_gradient_that_is_needed_is_formed(impl, device):
    x, t = pair(3, 17, device=device)
    a = x.clone().requires_grad_()
    liger_kl_div(a, t).backward()
    b = t.clone().requires_grad_()
    liger_kl_div(x, b).backward()
    assert a.grad.any() and b.grad.any() and x.grad is None and t.grad is None


def test_backward_twice_gives_the_same(impl, device):
    x, t = pair(3, 17, device=device)
    x.requires_grad_()
    loss = liger_kl_div(x, t)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_autocast_gives_an_fp32_loss_as_in_torch(impl, device):
    x, t = pair(3, 17, device=device, dtype=torch.float16)
    with torch.autocast(device.type, torch.bfloat16):
        assert all(liger_kl_div(x, t, reduction=r).dtype == torch.float32 for r in ("sum", "none"))
    assert liger_kl_div(x, t.float()).dtype == torch.float32  # the wider of the two


def test_helpers_give_the_loss_and_the_gradient_of_its_sum(impl, device):
    for log_target in (False, True):
        x, t = pair(4, 17, device=device, log_target=log_target)
        x.requires_grad_()
        loss = kldiv_forward_triton(x, t, log_target, "sum", 1e-10)
        truth = F.kl_div(x, t, reduction="sum", log_target=log_target)
        torch.testing.assert_close(loss, truth)
        upstream = torch.tensor(2.0, device=device)
        room = torch.empty_like(t)
        found = kldiv_backward_triton(t, upstream, room, log_target)
        assert found is room
        torch.testing.assert_close(found, torch.autograd.grad(2 * truth, x)[0])


def test_gradcheck():
    for log_target in (False, True):
        x, t = (v.requires_grad_() for v in pair(3, 7, dtype=torch.float64, log_target=log_target))
        for reduction in REDUCTIONS:
            assert torch.autograd.gradcheck(
                lambda a, b, r=reduction, log=log_target: LigerKLDivLossFunction.apply(a, b, r, log), (x, t)
            )


@pytest.mark.filterwarnings("ignore:reduction. 'mean'")
def test_module_is_torchs_with_eps_first(device):
    x, t = pair(4, 17, device=device, log_target=True)
    for options in ({}, {"reduction": "batchmean"}, {"log_target": True, "reduction": "sum"}):
        module = LigerKLDIVLoss(1e-10, **options)
        assert isinstance(module, torch.nn.KLDivLoss)
        given = t if options.get("log_target") else t.exp()
        torch.testing.assert_close(module(x, given), torch.nn.KLDivLoss(**options)(x, given))
    assert not torch.equal(LigerKLDIVLoss(eps=0.5)(x, t.exp()), LigerKLDIVLoss()(x, t.exp()))


def test_bad_input_is_named():
    x = torch.zeros(3, 4)
    for args, options, message in (
        ((x, x), {"reduction": "median"}, "reduction must be one of .*, got 'median'"),
        ((x, x), {"eps": -1.0}, "kl_div: eps must not be negative, got -1.0"),
        ((x.long(), x), {}, "kl_div: input must be a float tensor with a dimension, got torch.int64"),
        ((x, x.long()), {}, "kl_div: target must be a float tensor"),
        ((torch.tensor(1.0), torch.tensor(1.0)), {}, "kl_div: input must be a float tensor with a dimension"),
        ((x, x[:1]), {}, r"kl_div: target of shape \(1, 4\), expected \(3, 4\)"),
        ((x, x.to("meta")), {}, "kl_div: the input is on cpu and the target on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            liger_kl_div(*args, **options)
