"""What is special about LayerNorm: torch's own bits, standing in for nn.LayerNorm, one module's own impl, messages."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from liger_kernel.ops import layer_norm as room
from liger_kernel.ops.layer_norm import LigerLayerNormFunction, layer_norm_backward, layer_norm_forward
from liger_kernel.transformers.functional import liger_layer_norm
from liger_kernel.transformers.layer_norm import LigerLayerNorm

from support import dtypes


def make(*shape, device, dtype=torch.float32):
    x = torch.randn(*shape, device=device, dtype=dtype) + 2
    return x, *(torch.randn(shape[-1], device=device, dtype=dtype) for _ in range(2))


@pytest.mark.parametrize("shape", [(2, 16, 64), (9, 7, 41), (5, 1), (3, 2101), (2, 40000)])
def test_layer_norm_correctness(shape, impl, device):
    for dtype in dtypes(impl, device):
        x, w, b = make(*shape, device=device, dtype=dtype)
        ours, theirs = liger_layer_norm(x, w, b, 1e-5), F.layer_norm(x, shape[-1:], w, b, 1e-5)
        # two units in the last place of values up to 8: sums are taken in another order
        torch.testing.assert_close(ours, theirs, rtol=0, atol=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("affine", [(True, True), (True, False), (False, False)])
def test_on_a_cpu_forward_has_the_bits_of_torch(affine, dtype):
    for n in (1, 7, 64, 1000):
        x, w, b = make(4, 5, n, device="cpu", dtype=dtype)
        w, b = (p if wanted else None for p, wanted in zip((w, b), affine, strict=True))
        assert torch.equal(liger_layer_norm(x, w, b, 1e-5), F.layer_norm(x, (n,), w, b, 1e-5))


def test_mean_far_from_zero_does_not_cancel(impl, device):
    x = 1000 + torch.randn(4, 40000, device=device, dtype=torch.float64)
    y = liger_layer_norm(x.float(), None, None, 1e-6)
    # fp32 holds x itself to 6e-5 (half a unit at 1000); rows of sums of squares would be off by 0.1
    assert (y - room.reference(x)).abs().max() < 2e-4


def test_weight_gradient_of_many_bf16_rows_is_summed_in_fp32(device):
    x, w, b = make(4096, 16, device=device, dtype=torch.bfloat16)
    upstream = torch.randn_like(x)
    found, truth = [], []
    for results, dtype in ((found, torch.bfloat16), (truth, torch.float64)):
        leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in (x, w, b)]
        call = liger_layer_norm if dtype is torch.bfloat16 else room.reference
        call(*leaves, 1e-6).backward(upstream.to(dtype))
        results += [t.grad.double() for t in leaves[1:]]
    for ours, true in zip(found, truth, strict=True):
        # one rounding to bf16 (2^-9 relative) of an fp32 sum; torch's own bf16 sums are off by some percent
        assert (ours - true).abs().max() <= 2**-8 * true.abs().max()


def test_stands_where_nn_layer_norm_is_constructed(impl, device):
    theirs = nn.LayerNorm(32, eps=1e-5).to(device)
    nn.init.normal_(theirs.weight)
    nn.init.normal_(theirs.bias)
    ours = LigerLayerNorm(32, eps=1e-5).to(device)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 4, 32, device=device)
    a, b = (x.clone().requires_grad_() for _ in range(2))
    ours(a).square().sum().backward()
    theirs(b).square().sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)
    assert not list(LigerLayerNorm((32,), elementwise_affine=False).parameters())
    assert LigerLayerNorm(32, dtype=torch.float64, device="meta").weight.dtype == torch.float64


def test_forward_can_be_bound_to_an_nn_layer_norm(device):
    module = nn.LayerNorm(16).to(device)
    module.variance_epsilon, module.hidden_size = module.eps, 16
    x = torch.randn(3, 16, device=device)
    expected = module(x)
    module.forward = LigerLayerNorm.forward.__get__(module)
    torch.testing.assert_close(module(x), expected)


def test_module_keeps_its_constructor():
    found = [(p.name, p.default) for p in inspect.signature(LigerLayerNorm).parameters.values()]
    defaults = dict(eps=1e-6, bias=False, init_fn="ones", impl=None, mode=None, backend=None)
    assert found[:7] == [("hidden_size", inspect.Parameter.empty), *defaults.items()]
    module = LigerLayerNorm(8, bias=True)
    assert torch.equal(module.weight, torch.ones(8)) and torch.equal(module.bias, torch.zeros(8))
    assert module.variance_epsilon == 1e-6 and module.hidden_size == 8


def used_by(module, x, monkeypatch):
    """Names of the pairs that a forward and a backward of `module` took."""
    seen, kernels = [], room.kernels

    def spy(op, x, impl=None):
        seen.append(kernels(op, x, impl))
        return seen[-1]

    monkeypatch.setattr(room, "kernels", spy)
    module(x.requires_grad_()).sum().backward()
    monkeypatch.setattr(room, "kernels", kernels)
    return {pair.forward.__module__ for pair in seen}


def test_impl_of_one_module_is_obeyed(device, monkeypatch):
    pytest.importorskip("triton")
    for name, module in (("torch", "liger_kernel.ops.layer_norm"), ("triton", "liger_kernel.ops.kernels.layer_norm")):
        for given in (dict(impl=name), dict(backend=name), dict(impl=name, backend=name)):
            norm = LigerLayerNorm(8, **given).to(device)
            assert norm.impl == norm.backend == name
            assert used_by(norm, torch.randn(2, 8, device=device), monkeypatch) == {module}


def test_unknown_impl_is_named():
    for given in (dict(impl="tritn"), dict(backend="tritn")):
        with pytest.raises(ValueError, match="impl='tritn' is not one of .*'torch', 'triton'"):
            LigerLayerNorm(8, **given)
    module = LigerLayerNorm(8)
    with pytest.raises(ValueError, match="impl='tritn' is not one of"):
        module.backend = "tritn"
    with pytest.raises(ValueError, match="impl='torch' and backend='triton' name two"):
        LigerLayerNorm(8, impl="torch", backend="triton")


def test_unknown_mode_is_named():
    with pytest.raises(ValueError, match="mode must be None or 'auto', got 'fast'"):
        LigerLayerNorm(8, mode="fast")


def test_several_normalised_dimensions_are_named():
    with pytest.raises(ValueError, match=r"only the last dimension can be normalised, got hidden_size=\(4, 8\)"):
        LigerLayerNorm((4, 8))


def test_module_survives_pickle_and_deepcopy():
    module = LigerLayerNorm(8, impl="torch")
    nn.init.normal_(module.weight)
    x = torch.randn(2, 8)
    for copied in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert copied.impl == "torch" and torch.equal(copied(x), module(x))


@pytest.mark.parametrize("frozen", [(True, False), (False, True), (True, True)])
def test_frozen_parameters_get_no_gradient(frozen, impl, device):
    x, *parameters = make(4, 16, device=device)
    x.requires_grad_()
    for p, cold in zip(parameters, frozen, strict=True):
        p.requires_grad_(not cold)
    liger_layer_norm(x, *parameters, 1e-6).square().sum().backward()
    a, *reference = (t.detach().clone().requires_grad_() for t in (x, *parameters))
    room.reference(a, *reference).square().sum().backward()
    torch.testing.assert_close(x.grad, a.grad)
    for p, r, cold in zip(parameters, reference, frozen, strict=True):
        assert p.grad is None if cold else torch.allclose(p.grad, r.grad, atol=1e-4)


def test_fp32_parameters_with_half_precision_rows(impl, device):
    dtype = torch.bfloat16 if impl == "torch" else torch.float16
    x, w, b = make(5, 24, device=device)
    x, w, b = x.to(dtype).requires_grad_(), w.requires_grad_(), b.requires_grad_()
    y = liger_layer_norm(x, w, b, 1e-6)
    assert y.dtype == dtype
    torch.testing.assert_close(y, room.reference(x, w, b))
    y.sum().backward()
    assert x.grad.dtype == dtype and w.grad.dtype == b.grad.dtype == torch.float32


def test_autocast_changes_nothing(impl, device):
    x, w, b = make(5, 24, device=device)
    expected = liger_layer_norm(x, w, b, 1e-6)
    with torch.autocast(device.type, torch.bfloat16):
        found = liger_layer_norm(x, w, b, 1e-6)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_no_rows_give_zero_parameter_gradients(impl, device):
    x, w, b = (t.requires_grad_() for t in make(0, 8, device=device))
    liger_layer_norm(x, w, b, 1e-6).sum().backward()
    assert x.grad.shape == (0, 8)
    assert torch.equal(w.grad, torch.zeros_like(w)) and torch.equal(b.grad, torch.zeros_like(b))


def test_gradcheck():
    leaves = [t.requires_grad_() for t in make(3, 2, 5, device="cpu", dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: LigerLayerNormFunction.apply(*t, 1e-3), leaves)


@pytest.mark.parametrize("named", [None, "torch"])
def test_compiles_without_a_graph_break(named):
    module = LigerLayerNorm(16, impl=named)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 16)
    found, expected = [], []
    for call, results in ((compiled, found), (module, expected)):
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        y.square().sum().backward()
        results += [y, leaf.grad, module.weight.grad, module.bias.grad]
        module.zero_grad()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_helpers_have_upstreams_signatures(impl, device):
    x, w, b = make(4, 8, device=device)
    dy = torch.randn_like(x)
    y, saved, mean, rstd, _, _ = layer_norm_forward(x, w, b, 1e-6)
    torch.testing.assert_close(y, room.reference(x, w, b))
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    room.reference(*leaves).backward(dy)
    for found, leaf in zip(layer_norm_backward(dy, saved, w, b, mean, rstd), leaves, strict=True):
        torch.testing.assert_close(found, leaf.grad)
    assert layer_norm_backward(dy, saved, w, b, mean, rstd, needs_dw=False, needs_db=False)[1:] == (None, None)


@pytest.mark.parametrize("name, place", [("weight", 1), ("bias", 2)])
def test_parameter_of_another_length_or_device_is_named(name, place):
    given = [torch.randn(2, 4), torch.ones(4), torch.ones(4)]
    given[place] = torch.ones(5)
    with pytest.raises(ValueError, match=rf"layer_norm: {name} of shape \(5,\) does not fit rows of 4"):
        liger_layer_norm(*given, 1e-6)
    given[place] = torch.ones(4, device="meta")
    with pytest.raises(ValueError, match=f"layer_norm: x is on cpu and the {name} on meta"):
        liger_layer_norm(*given, 1e-6)


def test_integer_rows_are_named():
    with pytest.raises(ValueError, match="layer_norm: x must be of a floating dtype, got torch.int64"):
        liger_layer_norm(torch.ones(2, 4, dtype=torch.int64), None, None, 1e-6)
