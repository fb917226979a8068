"""What is special about poly_norm: its module, its helpers, what in_place permits, its messages."""

import pytest
import torch
from torch.nn.functional import rms_norm

from liger_kernel.ops.poly_norm import poly_norm_backward, poly_norm_forward
from liger_kernel.transformers import LigerPolyNorm
from liger_kernel.transformers.functional import liger_poly_norm


def test_module_is_the_mean_of_the_normalised_powers_and_1_at_the_start(impl, device):
    x = torch.randn(3, 4, 10, device=device)
    wanted = 1 + sum(rms_norm(x**p, (10,), eps=1e-6) for p in (1, 2, 3)) / 3
    layer = LigerPolyNorm().to(device)
    torch.testing.assert_close(layer(x), wanted)
    assert {n: tuple(p.shape) for n, p in layer.named_parameters()} == {"weight": (3,), "bias": ()}


def test_helpers_have_upstreams_signatures(impl, device):
    x = torch.randn(5, 8, device=device, requires_grad=True)
    w, b = (torch.randn(size, device=device, requires_grad=True) for size in (3, 1))
    y = liger_poly_norm(x, w, b, in_place=False)
    found, kept, rstd, *launch = poly_norm_forward(x.detach(), w.detach(), b.detach())
    assert torch.equal(found, y) and torch.equal(kept, x) and rstd.shape == (5, 3)
    dy = torch.randn_like(y)
    wanted = torch.autograd.grad(y, (x, w, b), dy)
    found = poly_norm_backward(dy, kept, w.detach(), rstd, *launch, False)
    for a, c in zip(found, wanted, strict=True):
        assert torch.equal(a.view(c.shape), c)


def test_in_place_writes_over_the_gradient_only_where_it_may(device):
    from liger_kernel.ops.kernels import poly_norm as triton_poly_norm

    x, dy, w = torch.randn(4, 6, device=device), torch.randn(4, 6, device=device), torch.ones(3, device=device)
    _, rstd = triton_poly_norm.poly_norm_forward(x, w, w[:1], 1e-6)
    kept = dy.clone()
    apart, *_ = triton_poly_norm.poly_norm_backward(dy, x, w, rstd, False, True)
    assert torch.equal(dy, kept)
    over, *_ = triton_poly_norm.poly_norm_backward(dy, x, w, rstd, True, True)
    assert over is dy and torch.equal(over, apart)


def test_frozen_parameters_get_no_gradient(impl, device):
    layer = LigerPolyNorm().to(device).requires_grad_(False)
    x = torch.randn(2, 4, device=device, requires_grad=True)
    layer(x).square().sum().backward()
    frozen, x.grad = x.grad, None
    assert layer.weight.grad is None and layer.bias.grad is None
    layer.requires_grad_(True)(x).square().sum().backward()
    assert torch.equal(x.grad, frozen) and layer.weight.grad is not None


@pytest.mark.parametrize(
    "call, message",
    [
        (dict(W=torch.ones(4)), r"weight must be of shape \(3,\)"),
        (dict(B=torch.ones(2)), "bias must have one element"),
        (dict(B=torch.ones(1, device="meta")), "bias on meta"),
        (dict(X=torch.ones(2, 4, dtype=torch.int32)), "floating dtype"),
        (dict(X=torch.tensor(1.0)), "no dimension"),
    ],
)
def test_bad_input_is_named(call, message):
    known = dict(X=torch.randn(2, 4), W=torch.ones(3), B=torch.zeros(1))
    with pytest.raises(ValueError, match=message):
        liger_poly_norm(**known | call)
