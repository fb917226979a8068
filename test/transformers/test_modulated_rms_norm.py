"""What is special about modulated_rms_norm: module, helpers, which rows share a scale, what in_place permits."""

import inspect

import pytest
import torch
from torch.nn.functional import rms_norm

from liger_kernel.ops.modulated_rms_norm import modulated_rms_norm_backward, modulated_rms_norm_forward
from liger_kernel.transformers import LigerModulatedRMSNorm
from liger_kernel.transformers.functional import liger_modulated_rms_norm


@pytest.mark.parametrize("affine", [True, False])
def test_module_is_the_formula(affine, impl, device):
    layer = LigerModulatedRMSNorm(16, eps=1e-5, elementwise_affine=affine).to(device)
    if affine:
        torch.nn.init.normal_(layer.weight)
    assert [n for n, _ in layer.named_parameters()] == (["weight"] if affine else [])
    x, scale, shift = (torch.randn(*s, 16, device=device) for s in ((2, 5), (2,), (2,)))
    normed = rms_norm(x, (16,), layer.weight, 1e-5)
    torch.testing.assert_close(layer(x, scale, shift), normed * (1 + scale[:, None]) + shift[:, None])
    torch.testing.assert_close(layer(x, scale), normed * (1 + scale[:, None]))


def test_constructor_and_forward_are_upstreams():
    taken = {k: p.default for k, p in inspect.signature(LigerModulatedRMSNorm).parameters.items()}
    assert taken == dict(
        hidden_size=inspect.Parameter.empty, eps=1e-6, offset=0.0, casting_mode="llama", init_fn="ones", in_place=True,
        elementwise_affine=True,
    )  # fmt: skip
    assert list(inspect.signature(LigerModulatedRMSNorm.forward).parameters) == [
        "self", "hidden_states", "scale", "shift",
    ]  # fmt: skip


@pytest.mark.parametrize("lead", [(), (1,), (1, 1), (3,), (3, 1), (3, 4)])
def test_a_scale_is_for_the_rows_of_the_dimensions_it_has(lead, impl, device):
    x = torch.randn(3, 4, 8, device=device)
    scale, shift = (torch.randn(*lead, 8, device=device, requires_grad=True) for _ in range(2))
    spread = [t[:, None] if lead == (3,) else t for t in (scale, shift)]
    wanted = rms_norm(x, (8,), eps=1e-6) * (1 + spread[0]) + spread[1]
    found = liger_modulated_rms_norm(x, None, scale, shift, in_place=False)
    torch.testing.assert_close(found, wanted)
    dy = torch.randn_like(x)
    for a, b in zip(torch.autograd.grad(found, (scale, shift), dy), torch.autograd.grad(wanted, (scale, shift), dy)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("lead", [(), (5,)])
def test_helpers_have_upstreams_signatures(lead, impl, device):
    x, w, scale, shift = (
        torch.randn(*s, 8, device=device, requires_grad=True) for s in ((5, 3), (), (*lead,), (*lead,))
    )
    y = liger_modulated_rms_norm(x, w, scale, shift, in_place=False)
    dy = torch.randn_like(y)
    wanted = torch.autograd.grad(y, (x, w, scale, shift), dy)
    with torch.no_grad():
        found, rstd, *launch, mode, run = modulated_rms_norm_forward(x, w, scale, shift, 1e-6, 0.0, "llama")
        assert torch.equal(found, y) and rstd.shape == (15,) and (mode, run) == (0, 3 if lead else 15)
        grads = modulated_rms_norm_backward(dy, x, w, scale, shift, rstd, 0.0, mode, *launch, run, False)
    for a, b in zip(grads, wanted, strict=True):
        assert torch.equal(a, b)


def test_more_shares_than_programs(device):
    """Rows, columns and shares enough that every program takes several of each."""
    from liger_kernel.ops.kernels import modulated_rms_norm as triton_room
    from liger_kernel.ops.kernels.blocks import RowTiles

    x, scale = torch.randn(42, 70, device=device), torch.randn(3, 70, device=device)
    w, dy = torch.randn(70, device=device), torch.randn(42, 70, device=device)
    _, rstd = triton_room.modulated_rms_norm_forward(x, w, scale, scale, 14, 1e-6, 0.0, "gemma")
    found = [
        triton_room.modulated_rms_norm_backward(
            dy, x, w, scale, scale, rstd, 14, 0.0, "gemma", False, (True, True, True),
            triton_room.Shares(RowTiles(rows=2, block=block, loop=block < 70, num_warps=1, programs=1), shares),
        )
        for block, shares in ((128, 3), (128, 1), (32, 3))
    ]  # fmt: skip
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # sums of 14 and of 42 in fp32, in another order


def test_the_gradient_of_a_shift_per_row_is_not_overwritten_in_place(impl, device):
    """It has the values of dy, and in_place=True permits dx there."""
    x, scale, shift = (torch.randn(6, 8, device=device, requires_grad=True) for _ in range(3))
    dy = torch.randn(6, 8, device=device)
    y = liger_modulated_rms_norm(x, None, scale, shift, in_place=True)
    _, _, dshift = torch.autograd.grad(y, (x, scale, shift), dy)
    assert torch.equal(dshift, dy)


def test_in_place_writes_over_the_gradient_only_where_it_may(device):
    from liger_kernel.ops.kernels import modulated_rms_norm as triton_room

    x, dy, scale = torch.randn(4, 6, device=device), torch.randn(4, 6, device=device), torch.randn(1, 6, device=device)
    _, rstd = triton_room.modulated_rms_norm_forward(x, None, scale, None, 4, 1e-6, 0.0, "llama")
    rest = (x, None, scale, None, rstd, 4, 0.0, "llama")
    kept = dy.clone()
    apart, *_ = triton_room.modulated_rms_norm_backward(dy, *rest, False, (False, True, False))
    assert torch.equal(dy, kept)
    over, *_ = triton_room.modulated_rms_norm_backward(dy, *rest, True, (False, True, False))
    assert over is dy and torch.equal(over, apart)


def test_frozen_arguments_get_no_gradient_and_leave_the_others_alone(impl, device):
    values = [torch.randn(*s, 8, device=device) for s in ((2, 3), (), (2,), (2,))]
    dy = torch.randn(2, 3, 8, device=device)
    every = [v.clone().requires_grad_() for v in values]
    liger_modulated_rms_norm(*every, in_place=False).backward(dy)
    for alone in range(4):
        some = [v.clone().requires_grad_(i == alone) for i, v in enumerate(values)]
        liger_modulated_rms_norm(*some, in_place=False).backward(dy)
        assert [v.grad is not None for v in some] == [i == alone for i in range(4)]
        assert torch.equal(some[alone].grad, every[alone].grad)


@pytest.mark.parametrize(
    "call, message",
    [
        (dict(scale=torch.ones(3, 8)), r"scale of shape \(3, 8\) does not fit"),  # torch would take it for dimension 1
        (dict(scale=torch.ones(1, 3, 8)), "scale of shape"),
        (dict(scale=torch.ones(2, 7)), "scale of shape"),
        (dict(shift=torch.ones(8)), "3 rows share a scale and 6 a shift"),
        (dict(scale=torch.ones(2, 8, device="meta")), "scale on meta"),
        (dict(W=torch.ones(7)), r"weight of shape \(7,\)"),
        (dict(casting_mode="bert"), "casting_mode"),
        (dict(X=torch.ones(2, 3, 8, dtype=torch.int32)), "floating dtype"),
    ],
)
def test_bad_input_is_named(call, message):
    known = dict(X=torch.randn(2, 3, 8), W=torch.ones(8), scale=torch.ones(2, 8), shift=torch.ones(2, 8))
    with pytest.raises(ValueError, match=message):
        liger_modulated_rms_norm(**known | call)
