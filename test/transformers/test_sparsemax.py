"""What is special about sparsemax: it lies on the simplex, far from zero too, its module, its messages."""

import dataclasses

import pytest
import torch

from liger_kernel import backends
from liger_kernel.ops.kernels.blocks import RowTiles
from liger_kernel.transformers import LigerSparsemax
from liger_kernel.transformers.functional import liger_sparsemax


def test_known_values(impl, device):
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.5, 0.0], [float("-inf"), 3.0]], device=device)
    wanted = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.75, 0.25], [0.0, 1.0]], device=device)
    assert torch.equal(liger_sparsemax(x), wanted)


def test_a_row_of_equals_or_far_from_zero_sums_to_one(impl, device):
    equal, far = torch.full((1, 5000), 7.0, device=device), 1000 + torch.randn(4, 300, device=device)
    torch.testing.assert_close(liger_sparsemax(equal), torch.full_like(equal, 1 / 5000))
    y = liger_sparsemax(far)
    torch.testing.assert_close(y.sum(-1), torch.ones(4, device=device))
    assert (y >= 0).all() and (y == 0).any(-1).all()


def test_many_steps_to_the_threshold_in_one_block_and_in_many(device):
    """Elements that crowd towards the maximum leave the support a few at a time."""
    from liger_kernel.ops.kernels import sparsemax as triton_sparsemax

    x = -torch.logspace(-3, 0, 200, device=device).repeat(3, 1) * torch.tensor([[1.0], [0.3], [3.0]], device=device)
    wanted = liger_sparsemax(x.double()).float()
    for tiles in (RowTiles(4, 256, False, 1, 1), RowTiles(2, 16, True, 1, 1)):
        y = triton_sparsemax.sparsemax_forward(x, tiles)
        torch.testing.assert_close(y, wanted)
        dx = triton_sparsemax.sparsemax_backward(x, wanted, tiles)
        live = wanted > 0
        mean = torch.where(live, x, 0).sum(-1, keepdim=True) / live.sum(-1, keepdim=True)
        torch.testing.assert_close(dx, torch.where(live, x - mean, 0))


@pytest.mark.parametrize("block", [256, 16], ids=["one block", "column loop"])
def test_a_core_without_threads_takes_a_row_at_a_time(block, device, monkeypatch):
    from liger_kernel.ops.kernels import sparsemax as triton_sparsemax

    facts = dataclasses.replace(backends.device_of(device), threads=False, persistent=True, cores=lambda device: 3)
    monkeypatch.setitem(backends._BY_TYPE, device.type, facts)
    monkeypatch.setattr(triton_sparsemax, "_forward_kernel", None)
    x = torch.randn(7, 200, device=device)
    x[1] = -torch.logspace(-3, 0, 200, device=device)
    x[2], x[3, :9], x[4, 5] = float("-inf"), float("-inf"), float("nan")
    y = triton_sparsemax.sparsemax_forward(x, RowTiles(1, block, block < 200, 1, 1))
    torch.testing.assert_close(y, liger_sparsemax(x.double()).float(), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_element_equal_to_tau_gets_no_gradient(dtype, impl, device):
    x = torch.tensor([[3, 2.5, 2.25, 1], [0, -0.25, -0.25, -0.5]], dtype=dtype, device=device, requires_grad=True)
    y = liger_sparsemax(x)
    y.backward(torch.tensor([[1.0, 2, 4, 8]] * 2, dtype=dtype, device=device))
    wanted = torch.tensor([[0.75, 0.25, 0, 0], [0.5, 0.25, 0.25, 0]], dtype=dtype, device=device)
    assert torch.equal(y, wanted)
    wanted = torch.tensor([[-0.5, 0.5, 0, 0], [-4 / 3, -1 / 3, 5 / 3, 0]], dtype=dtype, device=device)
    torch.testing.assert_close(x.grad, wanted)


def test_a_row_without_a_finite_element_is_nan(impl, device):
    x = torch.randn(3, 5, device=device)
    x[1] = float("-inf")
    x[2, 3] = float("nan")
    assert liger_sparsemax(x).isnan().all(-1).tolist() == [False, True, True]


def test_module_takes_a_dim(impl, device):
    x = torch.randn(2, 6, 5, device=device)
    assert torch.equal(LigerSparsemax(1)(x), liger_sparsemax(x.transpose(1, 2)).transpose(1, 2))


@pytest.mark.parametrize(
    "call, message",
    [(dict(dim=2), "has no dim 2"), (dict(input=torch.ones(2, 4, dtype=torch.int32)), "floating dtype")],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        liger_sparsemax(**dict(input=torch.randn(2, 4)) | call)
