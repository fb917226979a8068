"""What is special about group_norm: torch's values, its module, its helpers, its messages."""

import pytest
import torch
from torch import nn

from liger_kernel.ops.group_norm import group_norm_backward, group_norm_forward
from liger_kernel.transformers.functional import liger_group_norm
from liger_kernel.transformers.group_norm import LigerGroupNorm

from support import assert_as_good_as_torch, dtypes, outcome


@pytest.mark.parametrize("shape, groups", [((2, 6, 5, 7), 3), ((3, 8, 33), 8), ((4, 6), 1), ((2, 12, 3, 4, 5), 4)])
def test_module_is_as_exact_as_torchs(shape, groups, impl, device):
    for dtype in dtypes(impl, device):
        ours = LigerGroupNorm(shape[1], groups, eps=1e-5).to(device, dtype)
        theirs = nn.GroupNorm(groups, shape[1], eps=1e-5).to(device, dtype)
        with torch.no_grad():
            for p in theirs.parameters():
                p.normal_()
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(shape, device=device).to(dtype) + 1
        upstream = torch.randn(shape, device=device)
        wide = nn.GroupNorm(groups, shape[1], eps=1e-5).to(device, torch.float64)
        wide.load_state_dict(theirs.state_dict())
        truth = outcome(wide, x.double(), upstream)
        assert_as_good_as_torch(outcome(ours, x, upstream), outcome(theirs, x, upstream), truth, dtype, f"{shape}")


def test_a_mean_far_from_zero_does_not_cancel(impl, device):
    x = torch.randn(2, 4, 64, device=device) + 1000
    wanted = nn.functional.group_norm(x.double(), 2)
    found = liger_group_norm(x, torch.ones(4, device=device), torch.zeros(4, device=device), 4, 2, 1e-5)
    # x itself is known to 1000 * 2^-24 = 6e-5 of its spread of 1; the mean of 128 of them no better
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=3e-4)


def test_helpers_have_upstreams_signatures(impl, device):
    x = torch.randn(2, 6, 5, device=device, requires_grad=True)
    w, b = (torch.randn(6, device=device, requires_grad=True) for _ in range(2))
    y = liger_group_norm(x, w, b, 6, 3, 1e-5)
    found, kept, mean, rstd, _ = group_norm_forward(x.detach(), 6, 3, w.detach(), b.detach(), 1e-5)
    assert torch.equal(found, y) and torch.equal(kept, x) and mean.shape == rstd.shape == (2, 3)
    dy = torch.randn_like(y)
    wanted = torch.autograd.grad(y, (x, w, b), dy)
    for a, c in zip(group_norm_backward(dy, kept, w.detach(), b.detach(), mean, rstd, 6, 3), wanted, strict=True):
        assert torch.equal(a, c)


def test_frozen_parameters_get_no_gradient(impl, device):
    norm = LigerGroupNorm(4, 2).to(device).requires_grad_(False)
    x = torch.randn(2, 4, 3, device=device, requires_grad=True)
    norm(x).sum().backward()
    assert x.grad is not None and norm.weight.grad is None and norm.bias.grad is None


@pytest.mark.parametrize(
    "call, message",
    [
        (dict(num_channels=5), "does not have 5 channels"),
        (dict(num_groups=3), "3 groups do not divide 4 channels"),
        (dict(num_groups=0), "0 groups do not divide"),
        (dict(affine_scaling_weight=torch.ones(3)), r"weight of shape \(3,\)"),
        (dict(affine_shifting_bias=torch.ones(4, device="meta")), "bias on meta"),
        (dict(X=torch.ones(2, 4, 3, dtype=torch.int32)), "floating dtype"),
    ],
)
def test_bad_input_is_named(call, message):
    known = dict(X=torch.randn(2, 4, 3), affine_scaling_weight=torch.ones(4), affine_shifting_bias=torch.zeros(4),
                 num_channels=4, num_groups=2, eps=1e-5)  # fmt: skip
    with pytest.raises(ValueError, match=message):
        liger_group_norm(**known | call)


def test_module_names_what_cannot_be():
    with pytest.raises(ValueError, match="does not divide"):
        LigerGroupNorm(4, 3)
    with pytest.raises(ValueError, match="init_fn must be one of"):
        LigerGroupNorm(4, 2, init_fn="twos")
