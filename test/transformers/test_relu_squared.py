"""What is special about ReLU squared: transformers' own bits, NaN, helpers, messages."""

import pytest
import torch

from liger_kernel.ops.relu_squared import LigerReLUSquaredFunction, relu_squared_backward, relu_squared_forward
from liger_kernel.transformers.functional import liger_relu_squared
from liger_kernel.transformers.relu_squared import LigerReLUSquared

from support import dtypes


@pytest.mark.parametrize("shape", [(2, 16, 64), (9, 7, 41), (1, 1), (3, 2101), ()])
def test_relu_squared_correctness(shape, impl, device):
    from transformers.activations import ACT2FN

    for dtype in dtypes(impl, device):
        x = torch.randn(shape, dtype=dtype, device=device)
        assert torch.equal(LigerReLUSquared()(x), ACT2FN["relu2"](x))


def test_nan_stays_nan(impl, device):
    assert liger_relu_squared(torch.tensor([float("nan"), -1.0, 2.0], device=device)).isnan().tolist() == [True, 0, 0]


def test_gradcheck_in_fp64():
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(LigerReLUSquaredFunction.apply, (x,))


def test_helpers_have_upstreams_results(impl, device):
    x, dy = torch.randn(4, 6, device=device), torch.randn(4, 6, device=device)
    assert torch.equal(relu_squared_forward(x), liger_relu_squared(x))
    torch.testing.assert_close(relu_squared_backward(x, dy), 2 * x.relu() * dy)


def test_compiles_without_a_graph_break(device):
    x = torch.randn(4, 8, device=device, requires_grad=True)
    y = torch.compile(liger_relu_squared, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(y, liger_relu_squared(x))
    y.sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach().relu())


def test_integers_are_refused_by_name():
    with pytest.raises(ValueError, match="torch.int64"):
        liger_relu_squared(torch.arange(3))
