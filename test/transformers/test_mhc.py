"""What is special about hyper-connections: DeepSeek's values, the manifold, the alphas' gradients, the module."""

import copy
import inspect

import pytest
import torch

from liger_kernel.ops import mhc_coeffs as room
from liger_kernel.transformers import LigerMHC
from liger_kernel.transformers.functional import (
    liger_mhc_apply,
    liger_mhc_coeffs,
    liger_mhc_forward,
    liger_mhc_post_res,
    liger_mhc_pre,
)

from support import dtypes


def parameters(n, width, device, requires_grad=False):
    size = 2 * n + n * n
    phi, b = torch.randn(n * width, size, device=device) / (n * width) ** 0.5, torch.randn(size, device=device)
    alphas = torch.rand(3, device=device).unbind()
    return [t.clone().requires_grad_(requires_grad) for t in (phi, b, *alphas)]


def test_is_deepseeks_hyper_connection(impl, device):
    """Theirs holds h_res transposed: comb[i, o] is of stream i in the sum for o."""
    theirs = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    n, width, eps = 4, 24, 1e-3  # an eps so large that its place shows
    config = theirs.DeepseekV4Config(
        hc_mult=n, hidden_size=width, hc_sinkhorn_iters=5, hc_eps=eps, rms_norm_eps=1e-6, num_hidden_layers=1
    )
    module = theirs.DeepseekV4HyperConnection(config).to(device)
    phi, b, *alphas = parameters(n, width, device)
    across = torch.arange(2 * n + n * n, device=device)
    across[2 * n :] = across[2 * n :].view(n, n).T.flatten()
    with torch.no_grad():
        module.fn.copy_(phi.T[across]), module.base.copy_(b[across]), module.scale.copy_(torch.stack(alphas))
    x = torch.randn(2, 5, n, width, device=device)
    post, comb, collapsed = module(x)
    h_pre, h_post, h_res = liger_mhc_coeffs(
        x, phi, b, *alphas, allow_fp32=True, tmax=5, pre_eps=eps, sinkhorn_eps=eps
    )  # fmt: skip
    torch.testing.assert_close(h_post, post)
    torch.testing.assert_close(h_res, comb.mT)
    torch.testing.assert_close(liger_mhc_pre(x, h_pre), collapsed)
    f_out = torch.randn(2, 5, width, device=device)
    wanted = post[..., None] * f_out[..., None, :] + comb.mT @ x  # as the decoder layer has it
    torch.testing.assert_close(liger_mhc_post_res(x, f_out, h_post, h_res), wanted)


def test_h_res_is_doubly_stochastic(impl, device):
    x = torch.randn(40, 4, 16, device=device)
    *_, h_res = liger_mhc_coeffs(x, *parameters(4, 16, device), allow_fp32=True)
    one = torch.ones(40, 4, device=device)
    # Rows are divided last, by their sum + 1e-6; columns are as far as twenty iterations have come.
    torch.testing.assert_close(h_res.sum(-1), one, rtol=0, atol=5e-6)
    torch.testing.assert_close(h_res.sum(-2), one, rtol=0, atol=1e-3)
    assert (h_res > 0).all()


def test_large_logits_stay_finite(impl, device):
    """exp of a logit of 200 overflows; a permutation is what they mean."""
    n, width = 4, 8
    phi, b, *alphas = parameters(n, width, device)
    b[2 * n :] = 200 * torch.eye(n, device=device)[[2, 0, 3, 1]].flatten()
    x = torch.randn(3, n, width, device=device, requires_grad=True)
    *_, h_res = liger_mhc_coeffs(x, phi, b, *alphas, allow_fp32=True)
    torch.testing.assert_close(h_res, torch.eye(n, device=device)[[2, 0, 3, 1]].expand(3, n, n), rtol=0, atol=1e-4)
    h_res.square().sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("tmax", [1, 2, 20])
def test_gradients_of_the_alphas(tmax, impl, device):
    n, width, rows = 4, 32, 50
    x = torch.randn(rows, n, width, device=device)
    given = parameters(n, width, device, requires_grad=True)
    truth = [t.detach().double().requires_grad_() for t in given]
    found = liger_mhc_coeffs(x, *given, allow_fp32=True, tmax=tmax)
    wanted = room.reference(x.double(), *truth, tmax=tmax)
    upstream = [torch.randn_like(h) for h in found]
    torch.autograd.backward(found, upstream)
    torch.autograd.backward(wanted, [g.double() for g in upstream])
    mix = x.flatten(1) * x.flatten(1).pow(2).mean(1, keepdim=True).rsqrt() @ given[0].detach()
    for ours, theirs, part in zip(given[2:], truth[2:], mix.split((n, n, n * n), 1)):
        # A sum of products dz * mix that may cancel, |dz| of order 1. Each is wrong by some eps, for the 2 tmax steps
        # and the product with phi, and by another sign than the next.
        bound = 1.2e-7 * (2 * tmax + 10) * part.norm().item()
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=0, atol=bound)


def test_upstream_gradients_that_are_missing_are_zero(impl, device):
    """A model that ignores one of the three results."""
    x = torch.randn(6, 2, 8, device=device, requires_grad=True)
    given = parameters(2, 8, device, requires_grad=True)
    for alone in range(3):
        liger_mhc_coeffs(x, *given, allow_fp32=True)[alone].square().sum().backward()
        grads = [alpha.grad.item() for alpha in given[2:]]
        assert [g != 0.0 for g in grads] == [i == alone for i in range(3)]
        for alpha in given[2:]:
            alpha.grad = None


@pytest.mark.parametrize("pair", [(torch.float16, torch.float32), (torch.float32, torch.float16)])
def test_phi_of_another_dtype_is_not_rounded(pair, impl, device):
    x_dtype, phi_dtype = pair
    x = torch.randn(5, 4, 16, device=device).to(x_dtype)
    phi, b, *alphas = parameters(4, 16, device)
    phi = phi.to(phi_dtype)
    found = liger_mhc_coeffs(x, phi, b, *alphas, allow_fp32=True)
    for h, t in zip(found, room.reference(x.double(), phi, b, *alphas)):
        assert h.dtype is torch.float32
        torch.testing.assert_close(h.double(), t, rtol=1e-5, atol=1e-5)  # fp32 throughout, 40 steps of division


def test_apply_and_forward_put_the_three_together(impl, device):
    x = torch.randn(2, 3, 4, 16, device=device)
    given, layer = parameters(4, 16, device), torch.nn.Linear(16, 16, device=device)
    h_pre, h_post, h_res = coeffs = liger_mhc_coeffs(x, *given, allow_fp32=True)
    x_in = liger_mhc_pre(x, h_pre)
    torch.testing.assert_close(x_in, torch.einsum("btn, btnc -> btc", h_pre, x))
    f_out = layer(x_in)
    wanted = torch.einsum("btoi, btic -> btoc", h_res, x) + h_post[..., None] * f_out[..., None, :]
    torch.testing.assert_close(liger_mhc_apply(x, f_out, *coeffs), wanted)
    y, again = liger_mhc_apply(x, f_out, *coeffs, return_x_in=True)
    assert torch.equal(y, liger_mhc_apply(x, f_out, *coeffs)) and torch.equal(again, x_in)
    assert torch.equal(liger_mhc_forward(x, layer, *given, allow_fp32=True), y)
    found, kept = liger_mhc_forward(x, layer, *given, allow_fp32=True, return_coeffs=True)
    assert torch.equal(found, y) and all(torch.equal(a, b) for a, b in zip(kept, coeffs, strict=True))


def test_module_trains_and_starts_with_like_streams(impl, device):
    layer = torch.nn.Linear(16, 16, bias=False)
    module = LigerMHC(layer, hc=4, c=16, phi_dtype=torch.float32, allow_fp32=True).to(device)
    x = torch.randn(2, 3, 16, device=device)
    streams = x[..., None, :].expand(-1, -1, 4, -1)
    y = module(streams)
    # Half of each of the four like streams is read, once is written; alpha = 0.01 moves that by less than a tenth.
    torch.testing.assert_close(y, (x + layer(2 * x))[..., None, :].expand_as(y), rtol=0.1, atol=0.1)
    y.square().sum().backward()
    assert {n: tuple(p.shape) for n, p in module.named_parameters()} == dict(
        phi=(64, 24), b=(24,), alpha_pre=(), alpha_post=(), alpha_res=(), **{"layer.weight": (16, 16)}
    )
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_the_defaults_take_16_bit_streams_and_no_others(impl, device):
    for dtype in dtypes(impl, device)[1:]:
        module = LigerMHC(torch.nn.Linear(8, 8, dtype=dtype), hc=2, c=8).to(device)
        x = torch.randn(5, 2, 8, dtype=dtype, device=device)
        truth = copy.deepcopy(module).double()
        truth.options["allow_fp32"] = True
        y, wanted = module(x), truth(x.double())
        # x_in, the layer's output and y are rounded to 16 bits, each of a size of 1 to 4.
        torch.testing.assert_close(y.double(), wanted, rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
        y.sum().backward()
        assert {p.grad.dtype for p in (module.phi, module.b)} == {torch.float16, torch.float32}
        with pytest.raises(ValueError, match="needs allow_fp32=True"):
            module(x.float())


def test_constructor_is_upstreams():
    taken = {k: p.default for k, p in inspect.signature(LigerMHC).parameters.items()}
    required = inspect.Parameter.empty
    assert taken == dict(
        layer=required, hc=required, c=required, tmax=20, rms_eps=1e-6, pre_eps=0.0, sinkhorn_eps=1e-6, post_mult=2.0,
        phi_dtype=torch.float16, allow_fp32=False,
    )  # fmt: skip
    assert LigerMHC(torch.nn.Identity(), hc=2, c=4).phi.dtype is torch.float16


@pytest.mark.parametrize(
    "call, message",
    [
        (dict(allow_fp32=False), "needs allow_fp32=True"),
        (dict(phi=torch.ones(8, 9)), r"phi of shape \(8, 9\)"),
        (dict(b=torch.ones(9)), r"b of shape \(9,\)"),
        (dict(alpha_post=torch.ones(2)), "alpha_post must have one element"),
        (dict(alpha_res=torch.ones(1, device="meta")), "alpha_res on meta"),
        (dict(tmax=0), "tmax must be at least 1"),
        (dict(x=torch.ones(4)), r"x must be \(..., n, C\)"),
        (dict(x=torch.ones(3, 2, 4, dtype=torch.int32)), "floating dtype"),
    ],
)
def test_bad_coefficients_are_named(call, message):
    one = torch.ones(())
    known = dict(x=torch.randn(3, 2, 4), phi=torch.ones(8, 8), b=torch.ones(8), alpha_pre=one, alpha_post=one)
    with pytest.raises(ValueError, match=message):
        liger_mhc_coeffs(**known | dict(alpha_res=one, allow_fp32=True) | call)


def test_bad_streams_are_named():
    x, h = torch.randn(3, 2, 4), torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"mhc_pre: h_pre of shape \(3, 4\)"):
        liger_mhc_pre(x, torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"mhc_post_res: f_out of shape \(3, 5\)"):
        liger_mhc_post_res(x, torch.ones(3, 5), h, torch.ones(3, 2, 2))
    with pytest.raises(ValueError, match="h_res on meta"):
        liger_mhc_post_res(x, torch.ones(3, 4), h, torch.ones(3, 2, 2, device="meta"))
    with pytest.raises(ValueError, match="hc must be at least 1"):
        LigerMHC(torch.nn.Identity(), hc=0, c=4)
