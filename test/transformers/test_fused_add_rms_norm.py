"""What is special about the fused residual add: the unfused bits, mixed dtypes, shared gradients, messages."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

from liger_kernel.ops import fused_add_rms_norm as room
from liger_kernel.ops.fused_add_rms_norm import (
    LigerFusedAddRMSNormFunction,
    fused_add_rms_norm_backward,
    fused_add_rms_norm_forward,
)
from liger_kernel.transformers.functional import liger_fused_add_rms_norm
from liger_kernel.transformers.fused_add_rms_norm import LigerFusedAddRMSNorm

from support import dtypes


def make(*shape, device, dtype=torch.float32):
    x, r = (torch.randn(*shape, device=device, dtype=dtype) for _ in range(2))
    return x, r, torch.randn(shape[-1], device=device, dtype=dtype)


@pytest.mark.parametrize("shape", [(2, 16, 64), (9, 7, 41), (5, 1), (3, 2101), (2, 40000)])
def test_fused_add_rms_norm_correctness(shape, impl, device):
    for dtype in dtypes(impl, device):
        x, r, w = make(*shape, device=device, dtype=dtype)
        y, s = liger_fused_add_rms_norm(x, r, w, 1e-6)
        expected, total = room.reference(x, r, w, 1e-6)
        assert torch.equal(s, total), "the sum is one rounding, so it has one value"
        # two units in the last place: the mean is summed in another order and may round rstd to its neighbour
        torch.testing.assert_close(y, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_cpu_forward_has_the_bits_of_transformers(dtype):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x, r, w = make(4, 5, 48, device="cpu", dtype=dtype)
    norm = llama.LlamaRMSNorm(48).to(dtype)
    norm.weight.data.copy_(w)
    y, s = liger_fused_add_rms_norm(x, r, w, 1e-6)
    assert torch.equal(s, r + x) and torch.equal(y, norm(r + x))


def run(x, r, w, dy, ds, in_place):
    leaves = [t.detach().clone().requires_grad_() for t in (x, r, w)]
    outputs = LigerFusedAddRMSNormFunction.apply(*leaves, 1e-6, 0.0, "llama", in_place)
    torch.autograd.backward(outputs, (dy, ds))
    return [t.grad for t in leaves]


def test_in_place_changes_no_gradient_and_only_when_permitted(impl, device):
    x, r, w = make(6, 33, device=device)
    dy, ds = torch.randn_like(x), torch.randn_like(x)
    kept = dy.clone(), ds.clone()
    expected = run(x, r, w, dy, ds, in_place=False)
    assert torch.equal(dy, kept[0]), "in_place=False wrote into the incoming gradient"
    for found, wanted in zip(run(x, r, w, dy, ds, in_place=True), expected, strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(ds, kept[1]), "the permission is for the gradient of the first result"


def test_one_gradient_that_reaches_both_results(impl, device):
    x, r, w = make(6, 33, device=device)
    shared = torch.randn_like(x)
    expected = run(x, r, w, shared.clone(), shared.clone(), in_place=False)
    for found, wanted in zip(run(x, r, w, shared, shared, in_place=True), expected, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("used", [0, 1])
def test_result_that_nobody_uses(used, impl, device):
    x, r, w = (t.requires_grad_() for t in make(4, 16, device=device))
    liger_fused_add_rms_norm(x, r, w, 1e-6)[used].square().sum().backward()
    a, b, c = (t.detach().clone().requires_grad_() for t in (x, r, w))
    room.reference(a, b, c)[used].square().sum().backward()
    torch.testing.assert_close(x.grad, a.grad)
    torch.testing.assert_close(r.grad, b.grad)
    torch.testing.assert_close(w.grad, torch.zeros_like(w) if c.grad is None else c.grad)


def test_frozen_weight_gets_no_gradient(impl, device):
    x, r, w = make(4, 16, device=device)
    x.requires_grad_()
    sum(t.sum() for t in liger_fused_add_rms_norm(x, r, w, 1e-6)).backward()
    assert w.grad is None and x.grad.isfinite().all()


def test_fp32_residual_stream_with_half_precision_rows(impl, device):
    half = torch.bfloat16 if impl == "torch" else torch.float16
    x, r, w = make(5, 24, device=device)
    x, r = x.to(half).requires_grad_(), r.requires_grad_()
    y, s = liger_fused_add_rms_norm(x, r, w, 1e-6)
    assert y.dtype == s.dtype == torch.float32
    assert torch.equal(s, x + r)
    (y.sum() + s.sum()).backward()
    assert x.grad.dtype == half and r.grad.dtype == torch.float32
    assert torch.equal(x.grad, r.grad.to(half))


def test_autocast_changes_nothing(impl, device):
    x, r, w = make(5, 24, device=device)
    expected = liger_fused_add_rms_norm(x, r, w, 1e-6)
    with torch.autocast(device.type, torch.bfloat16):
        found = liger_fused_add_rms_norm(x, r, w, 1e-6)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_no_rows_give_a_zero_weight_gradient(impl, device):
    x, r, w = (t.requires_grad_() for t in make(0, 8, device=device))
    sum(t.sum() for t in liger_fused_add_rms_norm(x, r, w, 1e-6)).backward()
    assert x.grad.shape == r.grad.shape == (0, 8) and torch.equal(w.grad, torch.zeros_like(w))


def test_gradcheck():
    leaves = [t.requires_grad_() for t in make(3, 5, device="cpu", dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *t: LigerFusedAddRMSNormFunction.apply(*t, 1e-3, 1.0, "gemma"), leaves)


def test_compiles_without_a_graph_break():
    module = LigerFusedAddRMSNorm(16)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, r, _ = make(3, 16, device="cpu")
    found, expected = [], []
    for call, results in ((compiled, found), (module, expected)):
        leaves = [t.clone().requires_grad_() for t in (x, r)]
        y, s = call(*leaves)
        (y.square().sum() + s.sin().sum()).backward()
        results += [y, s, *(t.grad for t in leaves), module.weight.grad]
        module.weight.grad = None
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_module_survives_pickle_and_deepcopy():
    module = LigerFusedAddRMSNorm(8, offset=1.0, casting_mode="gemma")
    nn.init.normal_(module.weight)
    x, r, _ = make(2, 8, device="cpu")
    for copied in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert all(torch.equal(a, b) for a, b in zip(copied(x, r), module(x, r), strict=True))


def test_module_keeps_its_constructor():
    found = {p.name: p.default for p in inspect.signature(LigerFusedAddRMSNorm).parameters.values()}
    defaults = dict(eps=1e-6, offset=0.0, casting_mode="llama", init_fn="ones", in_place=False)
    assert list(found.items()) == [("hidden_size", inspect.Parameter.empty), *defaults.items()]


def test_helpers_have_upstreams_signatures(impl, device):
    x, r, w = make(4, 8, device=device)
    dy, ds = torch.randn_like(x), torch.randn_like(x)
    y, s, rstd, *launch, mode = fused_add_rms_norm_forward(x, r, w, 1e-6, 0.0, "llama")
    assert len(launch) == 3 and mode == 0
    torch.testing.assert_close(y, room.reference(x, r, w)[0])
    dx, dr, dw = fused_add_rms_norm_backward(dy, ds, s, w, rstd, 0.0, mode, *launch, False)
    for found, wanted in zip((dx, dr, dw), run(x, r, w, dy, ds, in_place=False), strict=True):
        assert torch.equal(found, wanted)
    only_y = fused_add_rms_norm_backward(dy, None, s, w, rstd, 0.0, mode, *launch, False, needs_dw=False)
    torch.testing.assert_close(only_y[0], dx - ds)
    assert only_y[2] is None


def test_residual_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"x of shape \(2, 4\) and residual of shape \(1, 4\)"):
        liger_fused_add_rms_norm(torch.randn(2, 4), torch.randn(1, 4), torch.ones(4), 1e-6)


def test_residual_on_another_device_is_named():
    with pytest.raises(ValueError, match="x is on cpu and the residual on meta"):
        liger_fused_add_rms_norm(torch.randn(2, 4), torch.randn(2, 4, device="meta"), torch.ones(4), 1e-6)


def test_weight_of_another_length_is_named():
    with pytest.raises(ValueError, match=r"fused_add_rms_norm: weight of shape \(5,\) does not fit rows of 4"):
        liger_fused_add_rms_norm(torch.randn(2, 4), torch.randn(2, 4), torch.ones(5), 1e-6)


def test_unknown_casting_mode_is_named():
    with pytest.raises(ValueError, match="casting_mode must be one of .*got 'lama'"):
        liger_fused_add_rms_norm(torch.randn(2, 4), torch.randn(2, 4), torch.ones(4), 1e-6, 0.0, "lama")
