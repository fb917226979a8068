"""What is special about cross_entropy; that it equals its reference is in test_contract.py."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from liger_kernel.ops import row_loss
from liger_kernel.ops.core import kernels
from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
from liger_kernel.transformers import LigerCrossEntropyLoss
from liger_kernel.transformers.functional import CrossEntropyOutput, liger_cross_entropy


def logits_and_labels(rows=9, classes=17, dtype=torch.float32, device="cpu"):
    x = torch.randn(rows, classes, dtype=dtype, device=device) * 3
    target = torch.randint(0, classes, (rows,), device=device)
    target[rows // 2] = -100
    return x.requires_grad_(), target


OPTIONS = list(itertools.product(("mean", "sum", "none"), (0.0, 0.2), (False, True)))


@pytest.mark.parametrize("reduction, smoothing, weighted", OPTIONS)
def test_cross_entropy_correctness(reduction, smoothing, weighted, impl, device):
    x, target = logits_and_labels(device=device)
    weight = torch.rand(17, device=device) + 0.1 if weighted else None
    options = dict(reduction=reduction, label_smoothing=smoothing)
    ours = liger_cross_entropy(x, target, weight, **options)
    wide = x.detach().double().requires_grad_()
    truth = F.cross_entropy(wide, target, None if weight is None else weight.double(), **options)
    torch.testing.assert_close(ours.double(), truth, rtol=2e-6, atol=2e-6)  # a few fp32 units in the last place
    upstream = torch.randn_like(truth)
    ours.backward(upstream.to(ours))
    truth.backward(upstream)
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("offset", [0.0, 100.0, 1e4])
@pytest.mark.parametrize("p", [0.5, 0.9, 0.99, 0.999, 0.99999])
@pytest.mark.parametrize("classes", [3, 1000])
def test_gradient_of_a_sure_token_does_not_cancel(p, offset, classes, impl, device):
    """p_y - 1 as a difference has a relative error of 1e-7 / (1 - p)."""
    x = torch.randn(4, classes, dtype=torch.float64, device=device)
    target = torch.tensor([0, 1, 2, 1], device=device)
    others = x.exp().scatter(1, target[:, None], 0.0).sum(1)
    x.scatter_(1, target[:, None], (others * p / (1 - p)).log()[:, None])
    x = (x + offset).float()
    ours, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    loss, truth = liger_cross_entropy(ours, target), F.cross_entropy(wide, target)
    loss.backward()
    truth.backward()
    at = target[:, None]
    # The exponentials' own error; a hundredth of what cancellation would give at p = 0.99999.
    torch.testing.assert_close(ours.grad.gather(1, at).double(), wide.grad.gather(1, at), rtol=5e-6, atol=0)
    torch.testing.assert_close(loss.double(), truth, rtol=5e-6, atol=0)


@pytest.mark.parametrize("value", [0.0, -5.0, 1e4, 3e38])
@pytest.mark.parametrize("classes", [1, 3, 5000])
def test_rows_of_equal_logits(value, classes, impl, device):
    x = torch.full((2, classes), value, device=device, requires_grad=True)
    loss = liger_cross_entropy(x, torch.tensor([0, classes - 1], device=device), reduction="sum")
    loss.backward()
    torch.testing.assert_close(loss, 2 * torch.tensor(float(classes), device=device).log())
    assert x.grad.double().sum().abs() < 1e-6  # rows sum to zero, up to a rounding of p


def test_a_huge_vocabulary(impl, device):
    x, target = logits_and_labels(2, 262144, device=device)
    loss = liger_cross_entropy(x, target)
    torch.testing.assert_close(loss.double(), F.cross_entropy(x.double(), target), rtol=2e-6, atol=0)


def test_masked_classes_stay_finite(impl, device):
    x, target = logits_and_labels(device=device)
    with torch.no_grad():
        x[:, 3] = float("-inf")
        target[target == 3] = 4
    stats = row_loss.empty_stats(9, x.device, torch.float32, ("entropy",))
    loss = row_loss.RowLoss()
    stats = row_loss.compute(x.detach(), row_loss.prepare(target, loss, x, reduction="none"), loss, ("entropy",))
    p = x.detach().double().softmax(-1)
    truth = -torch.special.xlogy(p, p).sum(-1).masked_fill(target == -100, 0.0)
    torch.testing.assert_close(stats.entropy.double(), truth, rtol=1e-6, atol=2e-6)
    liger_cross_entropy(x, target).backward()
    assert x.grad.isfinite().all() and not x.grad[:, 3].any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_no_valid_label_gives_zero_and_finite_gradients(rows, reduction, impl, device):
    x = torch.randn(rows, 7, device=device, requires_grad=True)
    target = torch.full((rows,), -100, device=device)
    out = liger_cross_entropy(
        x, target, reduction=reduction, lse_square_scale=0.1, return_token_accuracy=True, return_z_loss=True
    )
    assert out.loss.sum() == 0.0 and out.token_accuracy == 0.0 and out.z_loss.sum() == 0.0
    out.loss.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_garbage_in_ignored_rows_does_not_leak(impl, device):
    x, target = logits_and_labels(device=device)
    with torch.no_grad():
        x[4] = float("nan")
    loss = liger_cross_entropy(x, target)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all() and not x.grad[4].any()


@pytest.mark.parametrize("bad", [17, -1, 2**40, -101])
def test_label_out_of_range_is_named_on_a_cpu(bad):
    x, target = logits_and_labels()
    target[6] = bad
    with pytest.raises(ValueError, match=rf"target\[6\] is {bad}, .*\[0, 17\).*ignore_index=-100"):
        liger_cross_entropy(x, target)


@pytest.mark.parametrize("bad", [17, -1, 2**40])
def test_label_out_of_range_makes_its_row_nan_in_the_kernel(bad, impl, device):
    x, target = logits_and_labels(device=device)
    target[6] = bad
    loss, dx = row_loss.RowLoss(), torch.empty_like(x)
    stats = row_loss.compute(x.detach(), row_loss.prepare(target, loss, x), loss, (), dx)
    nan = torch.arange(9, device=device) == 6
    assert torch.equal(stats.loss.isnan(), nan) and torch.equal(dx.isnan().all(1), nan)
    assert torch.equal(dx.isnan().any(1), nan)


@pytest.mark.parametrize(
    "weight, options",
    [(math.inf, dict(label_smoothing=0.1)), (math.nan, dict(label_smoothing=0.1)), (1.0, dict(scale=math.inf)),
     (1.0, dict(scale=math.nan, softcap=5.0))],
    ids=str,
)  # fmt: skip
def test_what_is_not_finite_for_every_row_is_no_gradient_of_an_ignored_one(weight, options, impl, device):
    """A batch of ignored tokens alone had NaN gradients where a live one would have them."""
    x, y = torch.randn(2, 17, device=device), torch.tensor([-100, 3], device=device)
    weights = torch.ones(17, device=device)
    weights[5] = weight
    if "scale" in options:
        options = options | dict(scale=torch.tensor(options["scale"], device=device))
    loss = row_loss.RowLoss(**options)
    given = row_loss.prepare(y, loss, x, weights)
    dx = torch.full_like(x, 7.0)
    kernels("cross_entropy", x).forward(x, given, loss, row_loss.empty_stats(2, x.device, x.dtype, ()), dx)
    assert (dx[0] == 0).all()


def test_label_out_of_range_leaves_the_statistics_of_its_row(impl, device):
    """The kernel counted the first class twice."""
    x, y = torch.randn(2, 17, device=device), torch.tensor([17, -3], device=device)
    loss = row_loss.RowLoss()
    found = row_loss.empty_stats(2, x.device, x.dtype, ("lse", "predicted"))
    kernels("cross_entropy", x).forward(x, row_loss.Given(y), loss, found, None)
    torch.testing.assert_close(found.lse, x.logsumexp(1))
    assert torch.equal(found.predicted, x.argmax(1))


@pytest.mark.gpu
def test_debug_checks_labels_on_a_gpu(monkeypatch, device):
    x, target = logits_and_labels(device=device)
    target[6] = 17
    assert liger_cross_entropy(x, target).isnan()
    monkeypatch.setenv("LIGER_KERNEL_DEBUG", "1")
    with pytest.raises(ValueError, match=r"target\[6\] is 17"):
        liger_cross_entropy(x, target)


def test_second_backward_raises_where_the_gradient_was_handed_out():
    x, target = logits_and_labels()
    loss = liger_cross_entropy(x, target)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_second_backward_of_unreduced_losses_accumulates(device):
    x, target = logits_and_labels(device=device)
    loss = liger_cross_entropy(x, target, reduction="none").sum()
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    loss.backward()
    torch.testing.assert_close(x.grad, 2 * first)


@pytest.mark.parametrize("factor", [1.0, 0.25, -3.0])
def test_gradient_arriving_at_the_loss_scales_ours(factor, impl, device):
    x, target = logits_and_labels(device=device)
    plain = torch.autograd.grad(liger_cross_entropy(x, target), x)[0]
    scaled = torch.autograd.grad(liger_cross_entropy(x, target) * factor, x)[0]
    torch.testing.assert_close(scaled, plain * factor)


def test_fp16_gradients_do_not_underflow_before_the_loss_scale(impl, device):
    x = torch.full((32, 5), -11.0, dtype=torch.float16, device=device)
    x[:, 1] = 0.0  # p of the others / 32 is 5e-7, where fp16 has steps of 6e-8
    x.requires_grad_()
    target = torch.full((32,), 1, device=device)
    with torch.autocast(device.type, dtype=torch.float16):  # the loss is fp32, as under a GradScaler
        loss = liger_cross_entropy(x, target)
    (loss * 65536).backward()
    wide = x.detach().double().requires_grad_()
    (F.cross_entropy(wide, target) * 65536).backward()
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=2e-3, atol=0)  # one rounding to fp16


def spy_on_gradients(monkeypatch):
    made = []
    real = row_loss.compute

    def spy(x, given, loss, fields, dx=None):
        made.append(dx is not None)
        return real(x, given, loss, fields, dx)

    monkeypatch.setattr("liger_kernel.ops.cross_entropy.compute", spy)
    return made


def test_no_gradient_work_without_a_gradient(monkeypatch):
    made = spy_on_gradients(monkeypatch)
    x, target = logits_and_labels()
    with torch.no_grad():
        liger_cross_entropy(x, target)
    liger_cross_entropy(x.detach(), target)
    liger_cross_entropy(x, target)
    assert made == [False, False, True]


def test_predicted_tokens_and_accuracy(impl, device):
    x, target = logits_and_labels(device=device)
    with torch.no_grad():
        x[0], x[1] = 2.0, torch.arange(17.0)
        x[1, 3] = 16.0  # a tie: the first wins, as in torch.argmax
    target[0], target[1], target[2] = 0, 16, x[2].argmax()
    out = liger_cross_entropy(x, target, return_token_accuracy=True, return_predicted_tokens=True)
    truth = x.argmax(-1).where(target != -100, -1)
    assert isinstance(out, CrossEntropyOutput) and out.predicted_tokens.dtype == torch.int64
    assert torch.equal(out.predicted_tokens, truth)
    torch.testing.assert_close(out.token_accuracy, (truth == target).sum() / 8)


def test_z_loss_is_a_part_of_the_loss(device):
    x, target = logits_and_labels(device=device)
    out = liger_cross_entropy(x, target, lse_square_scale=0.1, return_z_loss=True)
    z = (0.1 * x.logsumexp(-1).square())[target != -100].mean()
    torch.testing.assert_close(out.z_loss, z)
    torch.testing.assert_close(out.loss, F.cross_entropy(x, target) + z)
    assert not out.z_loss.requires_grad


def test_shapes_of_torch(device):
    x = torch.randn(2, 5, 3, 4, device=device, requires_grad=True)
    target = torch.randint(0, 5, (2, 3, 4), device=device)
    for reduction in ("mean", "none"):
        torch.testing.assert_close(
            liger_cross_entropy(x, target, reduction=reduction), F.cross_entropy(x, target, reduction=reduction)
        )
    torch.testing.assert_close(
        liger_cross_entropy(x[0, :, 0, 0], target[0, 0, 0]), F.cross_entropy(x[0, :, 0, 0], target[0, 0, 0])
    )


def test_arguments_of_torch_still_decide(device):
    x, target = logits_and_labels(device=device)
    with pytest.warns(UserWarning, match="size_average and reduce"):
        torch.testing.assert_close(
            liger_cross_entropy(x, target, size_average=False), F.cross_entropy(x, target, reduction="sum")
        )
        assert liger_cross_entropy(x, target, reduce=False).shape == (9,)


def test_probabilities_as_target_go_to_torch_even_when_ours_replaced_it(monkeypatch, device):
    x, _ = logits_and_labels(device=device)
    p = torch.rand(9, 17, device=device).softmax(-1)
    truth = F.cross_entropy(x, p, label_smoothing=0.1)
    monkeypatch.setattr(F, "cross_entropy", liger_cross_entropy)
    torch.testing.assert_close(F.cross_entropy(x, p, label_smoothing=0.1), truth)
    with pytest.raises(ValueError, match="probabilities"):
        liger_cross_entropy(x, p, softcap=3.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_is_fp32_under_autocast(dtype, device):
    x, target = logits_and_labels(dtype=dtype, device=device)
    with torch.autocast(device.type, dtype=dtype):
        assert liger_cross_entropy(x, target).dtype == F.cross_entropy(x, target).dtype == torch.float32
    assert liger_cross_entropy(x, target).dtype == F.cross_entropy(x, target).dtype == dtype


def test_rows_far_apart_are_read_in_place(impl, device):
    wide = torch.randn(9, 40, device=device)
    target = torch.randint(0, 17, (9,), device=device)
    torch.testing.assert_close(
        liger_cross_entropy(wide[:, :17], target), F.cross_entropy(wide[:, :17], target), rtol=2e-6, atol=2e-6
    )


BAD = {
    "reduction must be one of": dict(reduction="avg"),
    r"label_smoothing must be in \[0, 1\]": dict(label_smoothing=1.5),
    "softcap must be positive": dict(softcap=0.0),
    "ignore_index must be an int": dict(ignore_index=1.5),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_option_is_named(message):
    x, target = logits_and_labels()
    with pytest.raises(ValueError, match=message):
        liger_cross_entropy(x, target, **BAD[message])
    with pytest.raises(ValueError, match=message):
        LigerCrossEntropyLoss(**BAD[message])


def test_bad_tensor_is_named():
    x, target = logits_and_labels()
    with pytest.raises(ValueError, match="target must be int64 or int32, got torch.int16"):
        liger_cross_entropy(x, target.short())
    with pytest.raises(ValueError, match=r"target of shape \(8,\), expected \(9,\)"):
        liger_cross_entropy(x, target[:8])
    with pytest.raises(ValueError, match=r"class weight of shape \(17,\)"):
        liger_cross_entropy(x, target, torch.ones(16))
    with pytest.raises(ValueError, match="the input is on cpu and the target on meta"):
        liger_cross_entropy(x, target.to("meta"))
    with pytest.raises(ValueError, match="float logits"):
        LigerCrossEntropyFunction.apply(target[:, None], target, None)


def test_module_has_the_options_of_the_functional():
    x, target = logits_and_labels()
    weight = torch.rand(17)
    options = dict(ignore_index=3, lse_square_scale=0.1, label_smoothing=0.1, reduction="sum", softcap=5.0)
    target = target.where(target != -100, 3)
    module = LigerCrossEntropyLoss(weight, **options, return_predicted_tokens=True)
    torch.testing.assert_close(module(x, target).loss, liger_cross_entropy(x, target, weight, **options))
    assert module(x, target).predicted_tokens.shape == target.shape
    torch.testing.assert_close(LigerCrossEntropyLoss()(x, target), F.cross_entropy(x, target))


def test_helpers_keep_the_signatures_of_upstream():
    from liger_kernel.ops import cross_entropy_backward, cross_entropy_forward

    x, target = logits_and_labels()
    loss, z_loss, accuracy, predicted, dx = cross_entropy_forward(
        x, target, None, -100, 0.0, 0.0, "mean", None, False, True, True
    )
    assert z_loss is None and accuracy.dim() == 0 and predicted.shape == target.shape
    truth = F.cross_entropy(x, target)
    torch.testing.assert_close(loss, truth.detach())
    torch.testing.assert_close(cross_entropy_backward(dx, torch.tensor(2.0)), 2 * torch.autograd.grad(truth, x)[0])


def test_kernel_can_be_imported_from_the_room():
    pytest.importorskip("triton")
    from liger_kernel.ops.cross_entropy import liger_cross_entropy_kernel

    assert callable(liger_cross_entropy_kernel.run)
