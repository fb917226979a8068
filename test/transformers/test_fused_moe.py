"""Experts and tiled MLPs: the mathematics of transformers, and what is special about them."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from liger_kernel.ops.fused_moe import LigerFusedMoEFunction, _ToExperts
from liger_kernel.ops.mlp import LigerMLPFunction
from liger_kernel.ops.tiled_mlp import LigerTiledMLPFunction, apply_tiled_mlp
from liger_kernel.transformers import (
    LigerExperts,
    LigerFalconH1MLP,
    LigerGEGLUMLP,
    LigerMLP,
    LigerSwiGLUMLP,
    LigerSwiGLUMLPForMuseGlimmer,
    LigerTiledGEGLUMLP,
    LigerTiledSwiGLUMLP,
)

from support import assert_as_good_as_torch, assert_same_module

SIZES = dict(hidden_size=16, intermediate_size=24, hidden_act="silu")
CONFIG = SimpleNamespace(num_local_experts=5, **SIZES)


def inputs(device, tokens=23, experts=5, top_k=2, dtype=torch.float32):
    x = torch.randn(tokens, 16, device=device, dtype=dtype)
    index = torch.rand(tokens, experts, device=device).topk(top_k).indices
    return x, index, torch.rand(tokens, top_k, device=device)


def loop(x, gate_up, down, index, weights):
    """Every token times every expert, the wanted ones picked."""
    gate, up = torch.einsum("th,eih->tei", x, gate_up).chunk(2, -1)
    every = torch.einsum("tei,ehi->teh", nn.functional.silu(gate) * up, down)
    chosen = nn.functional.one_hot(index, gate_up.shape[0] + 1)[..., :-1].to(x) * weights.to(x).unsqueeze(-1)
    return torch.einsum("tke,teh->th", chosen, every)


def results(function, dtype, x, gate_up, down, index, weights):
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, gate_up, down)]
    weights = weights.detach().to(torch.float64 if dtype is torch.float64 else weights.dtype).requires_grad_()
    y = function(*leaves, index, weights)
    y.backward(torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y).to(y))
    return [y.detach(), *(leaf.grad for leaf in leaves), weights.grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["usual", "one expert gets all", "elsewhere", "no token"])
def test_experts_are_as_exact_as_torch(case, dtype, device):
    x, index, weights = inputs(device, 0 if case == "no token" else 23)
    if case == "one expert gets all":
        index = torch.full_like(index[:, :1], 3)
        weights = weights[:, :1]
    if case == "elsewhere":
        index[::3, 1] = 5  # a slot of another rank
    experts = LigerExperts(CONFIG).to(device)
    given = x, experts.gate_up_proj * 20, experts.down_proj * 20, index, weights
    ours = results(LigerFusedMoEFunction.apply, dtype, *given)
    theirs = results(loop, dtype, *given)
    truth = results(loop, torch.float64, *(t.to(dtype) if t.is_floating_point() else t for t in given[:3]), *given[3:])
    assert ours[0].dtype is dtype
    # the weights of the experts multiply fp32 here, dtype there: their gradient is compared in fp32
    assert_as_good_as_torch(ours, theirs, truth, dtype, case)


def test_gradients_that_a_grouped_product_left_unwritten_reach_no_token(device):
    x = torch.randn(2, 4, device=device, requires_grad=True)
    order = torch.tensor([0, 2, 1, 3], device=device)  # slots 1 and 3 are elsewhere, so theirs are the last rows
    elsewhere = torch.tensor([False, True, False, True], device=device)
    gradient = torch.ones(4, 4, device=device)
    gradient[2:] = float("nan")
    _ToExperts.apply(x, order, order.argsort(), elsewhere, 2).backward(gradient)
    assert torch.equal(x.grad, torch.ones_like(x))


def test_experts_are_transformers_5s(device):
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    if not hasattr(modeling, "MixtralExperts"):
        pytest.skip("transformers 4 keeps each expert in a module of its own")
    from transformers import MixtralConfig

    config = MixtralConfig(**SIZES, num_local_experts=5)
    config._experts_implementation = "eager"
    theirs = modeling.MixtralExperts(config).to(device)
    ours = LigerExperts(config).to(device)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_()
    ours.load_state_dict(theirs.state_dict())
    x, index, weights = inputs(device)
    torch.testing.assert_close(ours(x, index, weights), theirs(x, index, weights))
    grafted = copy.deepcopy(theirs)
    type(grafted).forward, before = LigerExperts.forward, type(grafted).forward
    try:
        torch.testing.assert_close(grafted(x, index, weights), ours(x, index, weights))
    finally:
        type(grafted).forward = before


def test_experts_give_the_same_bits_twice(device):
    experts = LigerExperts(CONFIG).to(device)
    given = (*inputs(device),)
    runs = [results(LigerFusedMoEFunction.apply, torch.float32, given[0], *experts.parameters(), *given[1:])
            for _ in range(2)]  # fmt: skip
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_experts_in_bf16_do_not_wait_for_the_device(device):
    experts = LigerExperts(CONFIG).to(device, torch.bfloat16)
    x, index, weights = inputs(device, dtype=torch.bfloat16)
    x.requires_grad_()
    experts(x, index, weights).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        experts(x, index, weights).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_experts_of_other_sizes_are_named():
    experts = LigerExperts(CONFIG)
    x, index, weights = inputs("cpu")
    with pytest.raises(ValueError, match=r"\(23, 8\).* do not fit"):
        experts(x[:, :8], index, weights)
    with pytest.raises(ValueError, match="do not fit 23 tokens"):
        experts(x, index[:3], weights[:3])
    with pytest.raises(ValueError, match="hidden_act must be one of"):
        LigerExperts(SimpleNamespace(num_experts=2, **SIZES | dict(hidden_act="gelu")))


@pytest.mark.parametrize(
    "names, inner", [(dict(num_experts=3, moe_intermediate_size=8), 8), (dict(n_routed_experts=3), 24)]
)
def test_experts_read_each_familys_configuration(names, inner):
    experts = LigerExperts(SimpleNamespace(**SIZES, **names))
    assert experts.gate_up_proj.shape == (3, 2 * inner, 16) and experts.down_proj.shape == (3, 16, inner)


# Tiled MLPs


@pytest.mark.parametrize("tiled, plain", [(LigerTiledSwiGLUMLP, LigerSwiGLUMLP), (LigerTiledGEGLUMLP, LigerGEGLUMLP)])
@pytest.mark.parametrize("shards", [None, 1, 3, 50])
@pytest.mark.parametrize("shape", [(2, 37, 16), (7, 16)])
def test_a_tiled_mlp_is_the_whole_one(tiled, plain, shards, shape, device):
    config = SimpleNamespace(**SIZES, hidden_activation="gelu_pytorch_tanh")
    theirs, ours = plain(config).to(device), tiled(config, num_shards=shards).to(device)
    ours.load_state_dict(theirs.state_dict())
    found = []
    for module in (ours, theirs):
        torch.manual_seed(1)
        x = torch.randn(shape, device=device, requires_grad=True)
        y = module(x)
        y.backward(torch.randn_like(y))
        found.append([y, x.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)  # a weight's gradient is summed piece by piece


def kept_bytes(module, x):
    sizes = {}

    def pack(t):
        if not isinstance(t, nn.Parameter):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = module(x)
    return y, sum(sizes.values())


def test_a_tiled_mlp_keeps_its_input_alone():
    config = SimpleNamespace(**SIZES)
    x = torch.randn(1, 64, 16, requires_grad=True)
    weights = 3 * 16 * 24 * 4
    y, kept = kept_bytes(LigerTiledSwiGLUMLP(config, num_shards=4), x)
    assert kept <= x.nbytes + weights
    y_whole, whole = kept_bytes(LigerSwiGLUMLP(config), x)
    assert whole >= x.nbytes + 2 * 64 * 24 * 4


def test_pieces_run_one_after_another():
    seen = []

    def fn(module, piece):
        seen.append(piece.shape)
        return module(piece)

    x = torch.randn(2, 10, 4)
    linear = nn.Linear(4, 4)
    torch.testing.assert_close(apply_tiled_mlp(fn, linear, x, 3), linear(x))
    torch.testing.assert_close(LigerTiledMLPFunction.apply(fn, linear, x, 3, list(linear.parameters())), linear(x))
    assert seen == [(2, 4, 4), (2, 3, 4), (2, 3, 4)] * 2
    with pytest.raises(ValueError, match="at least 1, got 0"):
        apply_tiled_mlp(fn, linear, x, 0)


# The other names of a gated MLP


def test_the_function_of_an_mlp_is_its_module(device):
    mlp = LigerMLP(SimpleNamespace(**SIZES)).to(device)
    x = torch.randn(2, 5, 16, device=device)
    weights = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    torch.testing.assert_close(LigerMLPFunction.apply(x, *weights), mlp(x))
    falcon = LigerFalconH1MLP(SimpleNamespace(**SIZES, mlp_multipliers=(0.7, 1.3))).to(device)
    weights = falcon.gate_proj.weight, falcon.up_proj.weight, falcon.down_proj.weight
    torch.testing.assert_close(LigerMLPFunction.apply(x, *weights, 0.7, 1.3), falcon(x))


def test_muse_glimmers_mlp_is_transformers(device):
    modeling = pytest.importorskip("transformers.models.muse_glimmer.modeling_muse_glimmer")
    config = SimpleNamespace(hidden_size=16, intermediate_size=24, hidden_activation="silu")
    theirs = modeling.MuseGlimmerTextMLP(config).to(device)
    assert_same_module(LigerSwiGLUMLPForMuseGlimmer(config).to(device), theirs, torch.randn(3, 16, device=device))
    with pytest.raises(ValueError, match="hidden_activation must be one of"):
        LigerSwiGLUMLPForMuseGlimmer(SimpleNamespace(hidden_size=4, intermediate_size=4, hidden_activation="gelu"))
