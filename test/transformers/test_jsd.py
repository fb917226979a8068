"""What is special about jsd: impossible tokens, ignored rows, nearly equal distributions, the second backward."""

import pytest
import torch
import torch.nn.functional as F

from liger_kernel.ops import core
from liger_kernel.ops.jsd import LigerJSDFunction, jsd_backward, jsd_forward, reference
from liger_kernel.transformers.functional import liger_jsd
from liger_kernel.transformers.jsd import LigerJSD

from support import assert_as_good_as_torch, dtypes

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
quiet = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of numpy, in Triton's interpreter


def log_probabilities(*shape, device="cpu", dtype=torch.float32, spread=3.0):
    return (torch.randn(shape, device=device) * spread).log_softmax(-1).to(dtype)


def loss_and_gradient(log_q, *args, upstream=1.0):
    log_q = log_q.detach().clone().requires_grad_()
    loss = liger_jsd(log_q, *args)
    loss.backward(torch.tensor(upstream, dtype=loss.dtype, device=loss.device))
    return loss.detach(), log_q.grad


@quiet
@pytest.mark.parametrize("beta", BETAS)
def test_jsd_correctness(beta, impl, device):
    """Against torch's own kl_div, composed as the paper does."""
    for dtype in dtypes(impl, device):
        log_q, log_p = (log_probabilities(6, 517, device=device, dtype=dtype) for _ in range(2))

        def composed(q, p):
            if beta in (0.0, 1.0):
                return F.kl_div(*((q, p) if beta == 0.0 else (p, q)), reduction="batchmean", log_target=True)
            m = (beta * p.exp() + (1 - beta) * q.exp()).log()
            parts = [F.kl_div(m, log, reduction="batchmean", log_target=True) for log in (p, q)]
            return beta * parts[0] + (1 - beta) * parts[1]

        def run(q, p, loss):
            q = q.clone().requires_grad_()
            value = loss(q, p)
            value.backward()
            return value, q.grad

        truth = run(log_q.double(), log_p.double(), composed)
        theirs = [v.to(dtype) for v in run(log_q.float(), log_p.float(), composed)]
        ours = run(log_q, log_p, lambda q, p: liger_jsd(q, p, beta=beta))
        assert_as_good_as_torch(ours, theirs, truth, dtype, f"jsd beta={beta}")


@quiet
@pytest.mark.parametrize("beta", BETAS)
def test_tokens_impossible_on_both_sides_add_nothing(beta, impl, device):
    log_q, log_p = (log_probabilities(3, 70, device=device) for _ in range(2))
    cut_q, cut_p = (torch.cat((v, v.new_full((3, 7), float("-inf"))), 1) for v in (log_q, log_p))
    whole, whole_grad = loss_and_gradient(log_q, log_p, None, beta)
    loss, grad = loss_and_gradient(cut_q, cut_p, None, beta)
    # fp32's own precision: the sums are cut into other pieces
    torch.testing.assert_close(loss, whole)
    torch.testing.assert_close(grad[:, :70], whole_grad)
    assert not grad[:, 70:].any()


@quiet
@pytest.mark.parametrize("beta", BETAS)
def test_token_impossible_on_one_side_is_finite_in_a_jsd_and_infinite_in_its_kl(beta, impl, device):
    log_q, log_p = (log_probabilities(2, 9, device=device) for _ in range(2))
    log_q[0, 3], log_p[1, 5] = float("-inf"), float("-inf")
    loss, grad = loss_and_gradient(log_q, log_p, None, beta)
    if beta in (0.0, 1.0):
        assert loss == float("inf") and not grad.isnan().any()
        return
    # e^-80 is next to nothing, and has a logarithm
    near, near_grad = loss_and_gradient(log_q.clamp(min=-80), log_p.clamp(min=-80), None, beta)
    torch.testing.assert_close(loss, near)
    torch.testing.assert_close(grad, near_grad)


@quiet
@pytest.mark.parametrize("beta", BETAS)
def test_nan_is_not_hidden(beta, impl, device):
    for side in range(2):
        pair = [log_probabilities(2, 9, device=device) for _ in range(2)]
        pair[side][1, 4] = float("nan")
        assert liger_jsd(*pair, beta=beta).isnan()


@quiet
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_ignored_rows_count_neither_in_the_sum_nor_in_the_mean(dtype, impl, device):
    log_q, log_p = (log_probabilities(5, 33, device=device, dtype=dtype) for _ in range(2))
    labels = torch.tensor([4, -100, 0, -100, 7], device=device)
    log_q[1] = float("nan")  # padding holds anything
    log_p[3] = float("inf")
    loss, grad = loss_and_gradient(log_q, log_p, labels)
    keep = labels != -100
    kept, kept_grad = loss_and_gradient(log_q[keep], log_p[keep])
    # 1 / 3 is rounded on the host here and on the device there
    torch.testing.assert_close(loss, kept)
    torch.testing.assert_close(grad[keep], kept_grad)
    assert not grad[~keep].any()


@quiet
def test_all_rows_ignored_is_zero_with_zero_gradients(impl, device):
    log_q, log_p = (log_probabilities(3, 8, device=device) for _ in range(2))
    loss, grad = loss_and_gradient(log_q, log_p, torch.full((3,), 2, device=device), 0.5, 2)
    assert loss == 0.0 and torch.equal(grad, torch.zeros_like(grad))


@quiet
def test_equal_distributions_have_no_divergence_and_no_gradient(impl, device):
    log_q = log_probabilities(4, 300, device=device)
    loss, grad = loss_and_gradient(log_q, log_q.clone())
    # log(exp(x)) is x to the precision of an x of size ten
    assert abs(loss) < 1e-6 and grad.abs().max() < 1e-6


@quiet
@pytest.mark.parametrize("beta", [1e-6, 0.001, 0.999])
def test_nearly_equal_distributions_and_extreme_betas(beta, impl, device):
    log_q = log_probabilities(4, 300, device=device)
    log_p = (log_q + 0.01 * torch.randn_like(log_q)).log_softmax(-1)
    truth = reference(log_q.double(), log_p.double(), beta=beta)
    # each of 300 terms is rounded at the size of its probability, though their sum is far smaller
    assert abs(liger_jsd(log_q, log_p, beta=beta) - truth) < 1e-6


@quiet
def test_fp16_gradient_does_not_underflow_before_the_loss_scale(impl, device):
    log_q, log_p = (log_probabilities(64, 999, device=device, spread=0.5).half() for _ in range(2))
    scale = 2.0**12  # of a loss in fp16
    q = log_q.clone().requires_grad_()
    (liger_jsd(q, log_p).float() * scale).backward()
    truth = log_q.double().requires_grad_()
    (reference(truth, log_p.double()) * scale).backward()
    # what fp16 resolves; a gradient formed before the scale would be off by whole subnormal steps
    torch.testing.assert_close(q.grad.double(), truth.grad, rtol=4e-3, atol=float(truth.grad.abs().max()) * 1e-3)


def test_upstream_gradient_scales_and_a_second_backward_raises(impl, device):
    log_q, log_p = (log_probabilities(3, 17, device=device) for _ in range(2))
    _, once = loss_and_gradient(log_q, log_p)
    _, thrice = loss_and_gradient(log_q, log_p, upstream=3.0)
    torch.testing.assert_close(thrice, 3 * once)
    q = log_q.clone().requires_grad_()
    loss = liger_jsd(q, log_p)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="jsd: a second backward"):
        loss.backward()


def test_teacher_takes_no_gradient(impl, device):
    log_q, log_p = (log_probabilities(3, 17, device=device).requires_grad_() for _ in range(2))
    liger_jsd(log_q, log_p).backward()
    assert log_q.grad is not None and log_p.grad is None


def test_no_gradient_is_formed_where_none_is_asked(device):
    log_q, log_p = (log_probabilities(3, 17, device=device).requires_grad_() for _ in range(2))
    asked = []
    pair = core.kernels("jsd", log_q)

    def spy(*args):
        asked.append(args[-1])
        return pair.forward(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(core._resolved, ("jsd", device.type), core.Kernels(spy, pair.backward))
        with torch.no_grad():
            liger_jsd(log_q, log_p)
        liger_jsd(log_q.detach(), log_p)
        liger_jsd(log_q, log_p)
    assert asked == [False, False, True]


def test_autocast_gives_an_fp32_loss(impl, device):
    log_q, log_p = (log_probabilities(3, 17, device=device, dtype=torch.float16) for _ in range(2))
    with torch.autocast(device.type, torch.bfloat16):
        loss = liger_jsd(log_q, log_p)
    assert loss.dtype == torch.float32 and liger_jsd(log_q, log_p).dtype == torch.float16


def test_student_and_teacher_of_different_dtypes(impl, device):
    log_q, log_p = log_probabilities(3, 17, device=device, dtype=torch.float16), log_probabilities(3, 17, device=device)
    loss, grad = loss_and_gradient(log_q, log_p)
    assert loss.dtype == grad.dtype == torch.float16
    truth = reference(log_q.double(), log_p.double())
    torch.testing.assert_close(loss.double(), truth, rtol=1e-3, atol=0)  # one rounding to fp16


def test_helpers_give_the_loss_and_its_gradient(impl, device):
    log_q, log_p = (log_probabilities(4, 17, device=device) for _ in range(2))
    labels = torch.tensor([1, -100, 2, 3], device=device)
    for given in (labels, None):
        loss, grad = loss_and_gradient(log_q, log_p, given, 0.3, -100)
        found, dx = jsd_forward(log_q, log_p, labels, 0.3, -100, given is not None)
        assert torch.equal(found, loss) and torch.equal(dx, grad)
    torch.testing.assert_close(jsd_backward(dx.clone(), torch.tensor(2.0, device=device)), 2 * grad)


def test_implementation_of_one_call(device):
    log_q, log_p = (log_probabilities(3, 17, device=device) for _ in range(2))
    torch.testing.assert_close(
        LigerJSDFunction.apply(log_q, log_p, None, 0.5, -100, "triton", "any"), liger_jsd(log_q, log_p)
    )
    with pytest.raises(ValueError, match="'nonsense' is not one of"):
        LigerJSDFunction.apply(log_q, log_p, None, 0.5, -100, "nonsense")


def test_module_passes_its_options_on(device):
    log_q, log_p = (log_probabilities(3, 17, device=device) for _ in range(2))
    labels = torch.tensor([0, 5, 1], device=device)
    found = LigerJSD(beta=0.2, ignore_index=5)(log_q, log_p, labels)
    assert torch.equal(found, liger_jsd(log_q, log_p, labels, 0.2, 5))
    assert not torch.equal(found, liger_jsd(log_q, log_p, labels))


def test_bad_input_is_named():
    x, labels = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
    for args, message in (
        ((x, x, None, 1.5), r"jsd: beta must be in \[0, 1\], got 1.5"),
        ((x, x, None, float("nan")), "jsd: beta must be in"),
        ((x, x, labels, 0.5, 1.0), "jsd: ignore_index must be an int, got 1.0"),
        ((x[0], x[0]), r"jsd: input must be float log-probabilities of shape \(T, V\)"),
        ((x, x.long()), "jsd: target must be float log-probabilities"),
        ((x, x[:2]), r"jsd: target of shape \(2, 4\), expected \(3, 4\)"),
        ((x, x.to("meta")), "jsd: the input is on cpu and the target on meta"),
        ((x, x, labels.float()), "jsd: shift_labels must be int64 or int32, got torch.float32"),
        ((x, x, labels[:2]), r"jsd: shift_labels of shape \(2,\), expected \(3,\)"),
        ((x, x, labels.to("meta")), "jsd: the input is on cpu and shift_labels on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            liger_jsd(*args)
    with pytest.raises(ValueError, match="jsd: beta must be in"):
        LigerJSD(beta=-0.1)
