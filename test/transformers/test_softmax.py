"""What is special about softmax: torch's own bits, masked rows, messages."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch

from liger_kernel.ops.softmax import LigerSoftmaxFunction
from liger_kernel.transformers.functional import liger_softmax
from liger_kernel.transformers.softmax import LigerSoftmax

from support import dtypes

SHAPES = [(2, 16, 64), (9, 7, 41), (5, 1), (3, 2101), (2, 40000)]


@pytest.mark.parametrize("shape", SHAPES)
def test_softmax_correctness(shape, impl, device):
    for dtype in dtypes(impl, device):
        x = 3 * torch.randn(shape, dtype=dtype, device=device)
        # an exp of another maker: some units in the last place of fp32, then one rounding
        rtol = 4e-6 if dtype is torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(liger_softmax(x), torch.softmax(x, -1), rtol=rtol, atol=torch.finfo(dtype).tiny)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_cpu_both_passes_have_the_bits_of_torch(dtype):
    for shape in SHAPES:
        x = 3 * torch.randn(shape, dtype=dtype)
        upstream = torch.randn_like(x)
        a, b = (x.clone().requires_grad_() for _ in range(2))
        ours, theirs = liger_softmax(a), torch.softmax(b, -1)
        ours.backward(upstream)
        theirs.backward(upstream)
        assert torch.equal(ours, theirs) and torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("columns", [70, 96, 33])
def test_a_walk_in_lanes_of_neighbours(columns, device, monkeypatch):
    """What a GPU does with 16-bit rows of 16385 columns and more; on a CPU a lane has the whole block."""
    kernels = pytest.importorskip("liger_kernel.ops.kernels.softmax")
    monkeypatch.setattr(kernels, "device_of", lambda device: SimpleNamespace(threads=True))
    x = torch.randn(5, columns, device=device, dtype=torch.float16) * 8
    y = kernels.softmax_forward(x, tiles=kernels.RowTiles(1, 32, True, 1, 2))
    torch.testing.assert_close(y, x.float().softmax(-1).half())


def test_a_long_row_of_16_bits(device):
    x = torch.randn(3, 20000, device=device, dtype=torch.float16) * 8
    torch.testing.assert_close(liger_softmax(x), x.float().softmax(-1).half())


@pytest.mark.parametrize("n", [41, 40000])
def test_masked_entries_are_zero_and_hurt_no_gradient(n, impl, device):
    x = torch.randn(4, n, device=device)
    x[0, ::2] = float("-inf")
    x[1, 1:] = float("-inf")
    x[2, :-1] = torch.finfo(torch.float32).min
    x[3] = torch.finfo(torch.float32).min  # all masked by the lowest number: uniform, as in torch
    a, b = (x.clone().requires_grad_() for _ in range(2))
    ours, theirs = liger_softmax(a), torch.softmax(b, -1)
    upstream = torch.randn_like(x)
    ours.backward(upstream)
    theirs.backward(upstream)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("n", [41, 40000])
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # of numpy, in Triton's interpreter
def test_row_of_minus_infinity_is_nan_as_in_torch_and_no_other_row_is(n, impl, device):
    x = torch.randn(3, n, device=device)
    x[1] = float("-inf")
    y = liger_softmax(x)
    assert y[1].isnan().all() and not y[0].isnan().any() and not y[2].isnan().any()


def test_large_values_do_not_overflow(impl, device):
    for n in (5, 40000):
        x = torch.full((2, n), 3e38, device=device)
        torch.testing.assert_close(liger_softmax(x), torch.full_like(x, 1 / n))


def test_autocast_changes_nothing(impl, device):
    x = torch.randn(5, 24, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        found = liger_softmax(x)
    assert found.dtype == torch.float32 and torch.equal(found, liger_softmax(x))


def test_gradcheck():
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(LigerSoftmaxFunction.apply, x)


def test_compiles_without_a_graph_break():
    module = LigerSoftmax()
    x = torch.randn(3, 16)
    a, b = (x.clone().requires_grad_() for _ in range(2))
    ya, yb = torch.compile(module, fullgraph=True, backend="aot_eager")(a), module(b)
    ya.square().sum().backward()
    yb.square().sum().backward()
    torch.testing.assert_close(ya, yb)
    torch.testing.assert_close(a.grad, b.grad)


def test_module_survives_pickle_and_deepcopy():
    x = torch.randn(2, 8)
    for copied in (pickle.loads(pickle.dumps(LigerSoftmax())), copy.deepcopy(LigerSoftmax())):
        assert torch.equal(copied(x), torch.softmax(x, -1))


def test_integers_and_scalars_are_named():
    with pytest.raises(ValueError, match="softmax: x must be of a floating dtype, got torch.int64"):
        liger_softmax(torch.ones(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="softmax: x has no dimension"):
        liger_softmax(torch.tensor(1.0))
