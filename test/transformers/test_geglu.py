"""What is special about GEGLU: both GELUs, transformers' own bits, its MLP classes, messages."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from liger_kernel.ops.geglu import LigerGELUMulFunction, geglu_backward, geglu_forward
from liger_kernel.transformers.functional import liger_geglu
from liger_kernel.transformers.geglu import LigerGEGLUMLP, LigerGEGLUMLPForGemma4

from support import assert_same_module, dtypes


def config(**changes):
    return SimpleNamespace(**{**dict(hidden_size=24, intermediate_size=40, hidden_act="gelu_pytorch_tanh"), **changes})


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("shape", [(2, 16, 64), (9, 7, 41), (1, 1), (3, 2101)])
def test_geglu_correctness(shape, approximate, impl, device):
    for dtype in dtypes(impl, device):
        a, b = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
        ours, theirs = LigerGELUMulFunction.apply(a, b, approximate), F.gelu(a, approximate=approximate) * b
        if impl == "torch":
            assert torch.equal(ours, theirs)
        else:  # 1 + erf and 1 + tanh cancel where the gate is nearly shut: either side is off by a unit of 1, times a b
            unit = torch.finfo(torch.float32).eps * (a * b).abs().max().item()
            torch.testing.assert_close(ours, theirs, rtol=2 * torch.finfo(dtype).eps, atol=2 * unit + 1e-7)


def test_large_gates_neither_overflow_nor_vanish(impl, device):
    a = torch.tensor([-3e4, -50.0, -9.0, 0.0, 9.0, 50.0, 3e4], device=device, requires_grad=True)
    for approximate in ("tanh", "none"):
        (da,) = torch.autograd.grad(LigerGELUMulFunction.apply(a, torch.ones_like(a), approximate).sum(), a)
        torch.testing.assert_close(da, torch.tensor([0.0, 0, 0, 0.5, 1, 1, 1], device=device), atol=1e-6, rtol=0)


def test_gradcheck_in_fp64():
    a, b = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for approximate in ("tanh", "none"):
        assert torch.autograd.gradcheck(lambda a, b: LigerGELUMulFunction.apply(a, b, approximate), (a, b))  # noqa: B023


def test_the_functional_is_the_tanh_form(impl, device):
    a, b = (torch.randn(50, device=device) for _ in range(2))
    assert torch.equal(liger_geglu(a, b), LigerGELUMulFunction.apply(a, b))
    assert not torch.equal(liger_geglu(a, b), LigerGELUMulFunction.apply(a, b, "none"))


def test_helpers_have_upstreams_results(impl, device):
    a, b, dc = (torch.randn(4, 6, device=device) for _ in range(3))
    saved_a, saved_b, c = geglu_forward(a, b)
    assert torch.equal(saved_a, a) and torch.equal(saved_b, b) and torch.equal(c, liger_geglu(a, b))
    x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
    liger_geglu(x, y).backward(dc)
    da, db = geglu_backward(a, b, dc)
    assert torch.equal(da, x.grad) and torch.equal(db, y.grad)


def test_compiles_without_a_graph_break(device):
    a, b = (torch.randn(4, 8, device=device, requires_grad=True) for _ in range(2))
    y = torch.compile(LigerGELUMulFunction.apply, fullgraph=True, backend="aot_eager")(a, b)
    assert torch.equal(y, liger_geglu(a, b))
    y.sum().backward()
    assert a.grad is not None


@pytest.mark.parametrize(
    "a, b, message",
    [
        (torch.randn(2, 3), torch.randn(2, 4), r"geglu: a of shape \(2, 3\) and b of shape \(2, 4\)"),
        (torch.randn(2, 3), torch.randn(2, 3).half(), "geglu: a and b must have one float dtype"),
        (torch.randn(2, 3), torch.randn(2, 3, device="meta"), "geglu: a is on cpu and b on meta"),
    ],
)
def test_bad_input_is_named(a, b, message):
    with pytest.raises(ValueError, match=message):
        liger_geglu(a, b)


def test_an_unknown_approximation_is_refused_by_name():
    with pytest.raises(ValueError, match="'sigmoid'"):
        LigerGELUMulFunction.apply(torch.randn(2), torch.randn(2), "sigmoid")


@pytest.mark.parametrize("act", ["gelu_pytorch_tanh", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mlp_is_gemmas(dtype, act, device):
    from transformers.models.gemma.modeling_gemma import GemmaMLP

    ours, theirs = (cls(config(hidden_act=act)).to(device, dtype) for cls in (LigerGEGLUMLP, GemmaMLP))
    assert_same_module(ours, theirs, torch.randn(2, 5, 24, dtype=dtype, device=device))


def test_hidden_activation_goes_before_hidden_act():
    assert LigerGEGLUMLP(config(hidden_activation="gelu")).approximate == "none"
    assert LigerGEGLUMLP(config(hidden_activation=None)).approximate == "tanh"


def test_gemma4_doubles_layers_that_reuse_keys_and_values():
    c = config(use_double_wide_mlp=True, kv_sharing_modes=["own", "reuse"])
    widths = [LigerGEGLUMLPForGemma4(c, i).up_proj.out_features for i in (None, 0, 1)]
    assert widths == [40, 40, 80]
    older = config(use_double_wide_mlp=True, num_hidden_layers=3, num_kv_shared_layers=1)
    assert [LigerGEGLUMLPForGemma4(older, i).up_proj.out_features for i in range(3)] == [40, 40, 80]


def test_another_activation_is_refused_by_name():
    with pytest.raises(ValueError, match="got 'silu'"):
        LigerGEGLUMLP(config(hidden_act="silu"))
