"""What is special about SwiGLU: transformers' own bits, its MLP classes, the packed form, messages."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from liger_kernel.ops.swiglu import (
    LigerFusedGateUpSiLUMulFunction,
    LigerSiLUMulFunction,
    swiglu_backward,
    swiglu_forward,
    swiglu_fused_gate_up_backward,
    swiglu_fused_gate_up_forward,
)
from liger_kernel.transformers.functional import liger_swiglu
from liger_kernel.transformers.swiglu import (
    LigerBlockSparseTop2MLP,
    LigerFalconH1SwiGLUMLP,
    LigerHunyuanV1SwiGLUMLP,
    LigerPhi3SwiGLUMLP,
    LigerQwen3MoeSwiGLUMLP,
    LigerSwiGLUMLP,
)

from support import assert_same_module, dtypes

CONFIG = dict(hidden_size=24, intermediate_size=40, hidden_act="silu", mlp_bias=False)


def config(**changes):
    return SimpleNamespace(**{**CONFIG, **changes})


def assert_same(ours, theirs, dtype, device):
    x = torch.randn(2, 5, CONFIG["hidden_size"], dtype=dtype, device=device)
    assert_same_module(ours.to(device, dtype), theirs.to(device, dtype), x)


@pytest.mark.parametrize("shape", [(2, 16, 64), (9, 7, 41), (1, 1), (3, 2101)])
def test_swiglu_correctness(shape, impl, device):
    for dtype in dtypes(impl, device):
        a, b = (torch.randn(shape, dtype=dtype, device=device) for _ in range(2))
        ours, theirs = liger_swiglu(a, b), F.silu(a) * b
        if impl == "torch":
            assert torch.equal(ours, theirs)
        else:  # one unit in the last place: exp differs between Triton and torch
            torch.testing.assert_close(ours, theirs, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_multipliers_are_falcon_h1s(dtype):
    a, b = (torch.randn(7, 33, dtype=dtype) for _ in range(2))
    theirs = (b * F.silu(a * 0.37)) * 1.7
    assert torch.equal(LigerSiLUMulFunction.apply(a, b, 0.37, 1.7), theirs)


def test_gradcheck_in_fp64():
    a, b = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: LigerSiLUMulFunction.apply(a, b, 0.4, 1.5), (a, b))
    y = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(LigerFusedGateUpSiLUMulFunction.apply, (y,))


def test_packed_is_the_gate_first(impl, device):
    y = torch.randn(4, 3, 2 * 37, device=device, requires_grad=True)
    gate, up = (t.detach().requires_grad_() for t in y.chunk(2, -1))
    ours, theirs = LigerFusedGateUpSiLUMulFunction.apply(y), liger_swiglu(gate, up)
    torch.testing.assert_close(ours, theirs)  # not bit for bit: torch's exp differs by a bit on strided memory
    dc = torch.randn_like(ours)
    ours.backward(dc)
    theirs.backward(dc)
    torch.testing.assert_close(y.grad, torch.cat((gate.grad, up.grad), -1))


def test_packed_backward_writes_over_y_only_when_permitted(impl, device):
    y, dc = torch.randn(4, 10, device=device), torch.randn(4, 5, device=device)
    before = y.clone()
    expected = swiglu_fused_gate_up_backward(y, dc)
    assert torch.equal(y, before)
    assert torch.equal(swiglu_fused_gate_up_backward(y, dc, in_place=True), expected)


def test_helpers_have_upstreams_results(impl, device):
    a, b, dc = (torch.randn(4, 6, device=device) for _ in range(3))
    saved_a, saved_b, c = swiglu_forward(a, b)
    assert torch.equal(saved_a, a) and torch.equal(saved_b, b) and torch.equal(c, liger_swiglu(a, b))
    x, y = a.clone().requires_grad_(), b.clone().requires_grad_()
    liger_swiglu(x, y).backward(dc)
    da, db = swiglu_backward(a, b, dc)
    assert torch.equal(da, x.grad) and torch.equal(db, y.grad)
    packed, c_packed = swiglu_fused_gate_up_forward(torch.cat((a, b), -1))
    assert torch.equal(packed, torch.cat((a, b), -1))
    torch.testing.assert_close(c_packed, c)


def test_a_frozen_branch_gets_no_gradient(impl, device):
    a = torch.randn(3, 4, device=device, requires_grad=True)
    b = torch.randn(3, 4, device=device)
    liger_swiglu(a, b).sum().backward()
    assert a.grad is not None and b.grad is None


def test_compiles_without_a_graph_break(device):
    a, b = (torch.randn(4, 8, device=device, requires_grad=True) for _ in range(2))
    y = torch.compile(LigerSiLUMulFunction.apply, fullgraph=True, backend="aot_eager")(a, b, 0.5, 2.0)
    assert torch.equal(y, LigerSiLUMulFunction.apply(a, b, 0.5, 2.0))
    y.sum().backward()
    assert a.grad is not None


@pytest.mark.parametrize(
    "a, b, message",
    [
        (torch.randn(2, 3), torch.randn(2, 4), r"a of shape \(2, 3\) and b of shape \(2, 4\)"),
        (torch.randn(2, 3), torch.randn(2, 3).half(), "one float dtype, got torch.float32 and torch.float16"),
        (torch.ones(2, 3).long(), torch.ones(2, 3).long(), "one float dtype, got torch.int64"),
        (torch.randn(2, 3), torch.randn(2, 3, device="meta"), "a is on cpu and b on meta"),
    ],
)
def test_bad_input_is_named(a, b, message):
    with pytest.raises(ValueError, match=message):
        liger_swiglu(a, b)


def test_packed_needs_an_even_width():
    with pytest.raises(ValueError, match=r"even last dim, got shape \(2, 5\)"):
        LigerFusedGateUpSiLUMulFunction.apply(torch.randn(2, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_mlp_is_llamas(dtype, bias, device):
    from transformers.models.llama.modeling_llama import LlamaMLP

    assert_same(LigerSwiGLUMLP(config(mlp_bias=bias)), LlamaMLP(config(mlp_bias=bias)), dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mlp_is_phi3s(dtype, device):
    from transformers.models.phi3.modeling_phi3 import Phi3MLP

    assert_same(LigerPhi3SwiGLUMLP(config()), Phi3MLP(config()), dtype, device)


def test_mlp_is_falcon_h1s(device):
    from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1MLP

    c = config(mlp_multipliers=[0.3, 1.9], mlp_bias=True)
    assert_same(LigerFalconH1SwiGLUMLP(c), FalconH1MLP(c), torch.float32, device)


def test_mlp_is_qwen3_moes(device):
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeMLP

    assert_same(LigerQwen3MoeSwiGLUMLP(config(), 16), Qwen3MoeMLP(config(), 16), torch.float32, device)


def test_mlp_is_hunyuans(device):
    from transformers.models.hunyuan_v1_dense.modeling_hunyuan_v1_dense import HunYuanDenseV1MLP

    ours, theirs = LigerHunyuanV1SwiGLUMLP(config(), 3, True), HunYuanDenseV1MLP(config(), 3, True)
    assert ours.layer_idx == 3
    assert_same(ours, theirs, torch.float32, device)


def test_block_sparse_mlp_is_w2_of_silu_w1_times_w3(device):
    mlp = LigerBlockSparseTop2MLP(config()).to(device)
    x = torch.randn(3, 24, device=device)
    torch.testing.assert_close(mlp(x), mlp.w2(F.silu(mlp.w1(x)) * mlp.w3(x)))


def test_mlp_needs_three_config_fields_only():
    mlp = LigerSwiGLUMLP(SimpleNamespace(hidden_size=8, intermediate_size=12, hidden_act="swish"))
    assert [n for n, _ in mlp.named_parameters()] == ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]


def test_forward_can_be_grafted_onto_another_class(device):
    class Other(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj = torch.nn.Linear(4, 6), torch.nn.Linear(4, 6)
            self.down_proj = torch.nn.Linear(6, 4)

    other = Other().to(device)
    x = torch.randn(2, 4, device=device)
    expected = other.down_proj(F.silu(other.gate_proj(x)) * other.up_proj(x))
    torch.testing.assert_close(LigerSwiGLUMLP.forward(other, x), expected)


@pytest.mark.parametrize("mlp", [LigerSwiGLUMLP, LigerPhi3SwiGLUMLP, LigerBlockSparseTop2MLP])
def test_another_activation_is_refused_by_name(mlp):
    with pytest.raises(ValueError, match="got 'gelu'"):
        mlp(config(hidden_act="gelu"))
