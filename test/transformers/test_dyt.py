"""What is special about dyt: its module, its helpers, small arguments, its messages."""

import dataclasses

import pytest
import torch

from liger_kernel import backends
from liger_kernel.ops.dyt import liger_dyt_bwd, liger_dyt_fwd, reference
from liger_kernel.transformers import LigerDyT
from liger_kernel.transformers.functional import liger_dyt


@pytest.mark.parametrize("beta", [True, False])
def test_module_is_the_papers_layer(beta, impl, device):
    layer = LigerDyT(10, beta=beta, init_alpha=0.7).to(device)
    x = torch.randn(3, 4, 10, device=device)
    torch.testing.assert_close(layer(x), torch.tanh(0.7 * x))  # gamma is 1 and beta 0 at the start
    assert [n for n, _ in layer.named_parameters()] == ["alpha", "gamma", "beta"][: 3 if beta else 2]
    assert layer.alpha.shape == (1,)


def test_small_arguments_keep_their_precision(impl, device):
    x = torch.logspace(-12, 1, 64, device=device)[None]
    one = torch.ones(1, device=device)
    found = liger_dyt(x, one, torch.ones(64, device=device), None)
    torch.testing.assert_close(found, torch.tanh(x), rtol=1e-6, atol=0)


def test_a_single_row_without_a_batch(impl, device):
    """The torch pair's backward flattened dimensions that one row does not have."""
    tensors = [torch.randn(*shape, device=device) for shape in ((8,), (1,), (8,), (8,))]
    found, wanted = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
    dy = torch.randn(8, device=device)
    liger_dyt(*found).backward(dy)
    reference(*wanted).backward(dy)
    for ours, theirs in zip(found, wanted):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_helpers_have_upstreams_results(impl, device):
    x = torch.randn(5, 8, device=device, requires_grad=True)
    alpha = torch.tensor([0.5], device=device, requires_grad=True)
    gamma, beta = (torch.randn(8, device=device, requires_grad=True) for _ in range(2))
    y = liger_dyt(x, alpha, gamma, beta)
    assert (
        torch.equal(liger_dyt_fwd(x, alpha, gamma, beta), y) and not liger_dyt_fwd(x, alpha, gamma, beta).requires_grad
    )
    dy = torch.randn_like(y)
    wanted = torch.autograd.grad(y, (x, alpha, gamma, beta), dy)
    with torch.no_grad():
        found = liger_dyt_bwd(dy, x, alpha, gamma, beta)
        assert liger_dyt_bwd(dy, x, alpha, gamma, None)[3] is None
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


def test_a_persistent_device_starts_no_more_programs_than_cores(device, monkeypatch):
    """Wide rows have more strips than an NPU has cores."""
    from liger_kernel.ops.kernels import dyt as triton_dyt

    facts = dataclasses.replace(backends.device_of(device), persistent=True, cores=lambda device: 3)
    monkeypatch.setitem(backends._BY_TYPE, device.type, facts)
    started, launch = [], triton_dyt.launch

    def watched(kernel, programs, *args, **meta):
        started.append(programs)
        launch(kernel, programs, *args, **meta)

    monkeypatch.setattr(triton_dyt, "launch", watched)
    x, alpha, gamma = (torch.randn(size, device=device) for size in ((5, 512 * 4), (1,), (512 * 4,)))
    y = triton_dyt.dyt_forward(x, alpha, gamma, None)
    dx, *_ = triton_dyt.dyt_backward(torch.ones_like(x), x, alpha, gamma, False)
    assert started[:2] == [3, 3]
    t = torch.tanh(alpha * x)
    torch.testing.assert_close(y, gamma * t)
    torch.testing.assert_close(dx, alpha * gamma * (1 - t * t))


def test_more_strips_than_programs(device):
    """Rows and columns enough that every program takes several of both."""
    from liger_kernel.ops.kernels import dyt as triton_dyt

    x, gamma, beta = torch.randn(37, 70, device=device), *(torch.randn(70, device=device) for _ in range(2))
    alpha = torch.tensor([0.4], device=device)
    strips = triton_dyt.Strips(rows=2, block=16, shares=3, num_warps=1)
    y = triton_dyt.dyt_forward(x, alpha, gamma, beta, strips)
    torch.testing.assert_close(y, gamma * torch.tanh(0.4 * x) + beta)
    dx, d_alpha, d_gamma, d_beta = triton_dyt.dyt_backward(torch.ones_like(x), x, alpha, gamma, True, strips)
    t = torch.tanh(0.4 * x)
    inner = gamma * (1 - t * t)
    torch.testing.assert_close(dx, 0.4 * inner)
    torch.testing.assert_close(d_alpha, (inner * x).sum().view(1), rtol=1e-5, atol=1e-4)  # a sum of 2590 in fp32
    torch.testing.assert_close(d_gamma, t.sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(d_beta, torch.full_like(beta, 37))


@pytest.mark.parametrize(
    "call, message",
    [
        (dict(alpha=torch.ones(2)), "alpha must have one element"),
        (dict(gamma=torch.ones(5)), r"gamma of shape \(5,\)"),
        (dict(beta=torch.ones(4, device="meta")), "beta on meta"),
        (dict(x=torch.ones(2, 4, dtype=torch.int32)), "floating dtype"),
    ],
)
def test_bad_input_is_named(call, message):
    known = dict(x=torch.randn(2, 4), alpha=torch.ones(1), gamma=torch.ones(4), beta=torch.zeros(4))
    with pytest.raises(ValueError, match=message):
        liger_dyt(**known | call)
