"""What is special about the gated RMSNorm: transformers' own bits, groups, mixed dtypes, messages."""

import inspect

import pytest
import torch
from torch import nn

from liger_kernel.ops import gated_rms_norm as room
from liger_kernel.ops.gated_rms_norm import GatedRMSNormFunction
from liger_kernel.transformers.functional import liger_gated_rms_norm

from support import dtypes

WIDTH = 48
NORM_FIRST, GATE_FIRST = dict(gate_first=False), dict(gate_first=True)
IN_FP32 = dict(casting_mode="gemma")
THEIRS = {
    "mamba2": ("mamba2.MambaRMSNormGated", dict(group_size=16), GATE_FIRST | dict(group_size=16)),
    "bamba": ("bamba.BambaRMSNormGated", dict(group_size=WIDTH), GATE_FIRST),
    "qwen3_next": ("qwen3_next.Qwen3NextRMSNormGated", {}, NORM_FIRST),
    "olmo_hybrid": ("olmo_hybrid.OlmoHybridRMSNormGated", {}, NORM_FIRST),
    "kimi_linear": ("kimi_linear.KimiLinearRMSNormGated", {}, NORM_FIRST | IN_FP32 | dict(activation="sigmoid")),
    "falcon_h1": ("falcon_h1.FalconH1RMSNormGated", dict(n_groups=3), NORM_FIRST | IN_FP32 | dict(group_size=16)),
    "falcon_h1 gate first": (
        "falcon_h1.FalconH1RMSNormGated",
        dict(n_groups=3, norm_before_gate=False),
        GATE_FIRST | IN_FP32 | dict(group_size=16),
    ),
}  # fmt: skip
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize("dtypes_", [(FP32,) * 3, (BF16,) * 3, (FP16,) * 3, (BF16, BF16, FP32), (FP32, BF16, BF16)])
@pytest.mark.parametrize("name", THEIRS)
def test_on_a_cpu_forward_has_the_bits_of_transformers(name, dtypes_):
    where, arguments, options = THEIRS[name]
    model, cls = where.split(".")
    modeling = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    cls = getattr(modeling, cls)
    if "group_size" in arguments and "group_size" not in inspect.signature(cls).parameters:  # before transformers 5
        arguments, options = {}, GATE_FIRST
    x_dtype, gate_dtype, w_dtype = dtypes_
    module = cls(WIDTH, eps=1e-6, **arguments).to(w_dtype)
    nn.init.normal_(module.weight)
    x, gate = 3 * torch.randn(4, 50, WIDTH, dtype=x_dtype), 3 * torch.randn(4, 50, WIDTH, dtype=gate_dtype)
    wanted = module(x, gate)
    found = liger_gated_rms_norm(x, gate, module.weight, 1e-6, **options, out_dtype=wanted.dtype)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("options", [GATE_FIRST, NORM_FIRST, NORM_FIRST | IN_FP32], ids=str)
def test_a_group_is_a_row_of_its_own(options, impl, device):
    x, gate, dy = (torch.randn(5, 3 * 41, device=device) for _ in range(3))
    w = torch.randn(3 * 41, device=device)
    whole = [t.clone().requires_grad_() for t in (x, gate, w)]
    y = liger_gated_rms_norm(*whole, 1e-6, group_size=41, **options)
    y.backward(dy)
    for i in range(3):
        cut = slice(41 * i, 41 * (i + 1))
        part = [t[..., cut].clone().requires_grad_() for t in (x, gate, w)]
        z = liger_gated_rms_norm(*part, 1e-6, **options)
        z.backward(dy[:, cut])
        torch.testing.assert_close(y[:, cut], z)
        for a, b in zip(whole, part, strict=True):
            torch.testing.assert_close(a.grad[..., cut], b.grad)


@pytest.mark.parametrize("options", [GATE_FIRST, NORM_FIRST, NORM_FIRST | IN_FP32], ids=str)
def test_every_tensor_keeps_its_own_dtype(options, impl, device):
    low = dtypes(impl, device)[-1]
    x = torch.randn(6, 24, dtype=low, device=device, requires_grad=True)
    gate, w = (torch.randn(*shape, device=device, requires_grad=True) for shape in ((6, 24), (24,)))
    y = liger_gated_rms_norm(x, gate, w, 1e-6, **options)
    wanted = room.reference(x, gate, w, 1e-6, **options)
    assert y.dtype is low
    torch.testing.assert_close(y, wanted)
    y.sum().backward()
    grads = [t.grad for t in (x, gate, w)]
    assert [g.dtype for g in grads] == [low, torch.float32, torch.float32]
    x.grad = gate.grad = w.grad = None
    wanted.sum().backward()
    # autograd rounds the gradient to x's dtype between the steps, which its own unit in the last place allows for
    for found, other in zip(grads, (x.grad, gate.grad, w.grad), strict=True):
        torch.testing.assert_close(found, other, rtol=8 * torch.finfo(low).eps, atol=8 * torch.finfo(low).eps)


@pytest.mark.parametrize("activation", room.ACTIVATIONS)
def test_a_gate_far_from_zero_gives_no_nan(activation, impl, device):
    x, w = torch.randn(4, 8, device=device), torch.ones(8, device=device)
    gate = torch.tensor([-200.0, -90.0, 90.0, 200.0], device=device)[:, None].expand(4, 8)
    for gate_first in (True, False):
        a, g = x.clone().requires_grad_(), gate.clone().requires_grad_()
        y = liger_gated_rms_norm(a, g, w, 1e-6, gate_first=gate_first, activation=activation)
        y.sum().backward()
        assert all(t.isfinite().all() for t in (y, a.grad, g.grad))


def test_frozen_weight_gets_no_gradient_and_no_work(impl, device, monkeypatch):
    x, gate = (torch.randn(4, 16, device=device, requires_grad=True) for _ in range(2))
    w = torch.randn(16, device=device)
    pair, asked = room.kernels("gated_rms_norm", x), []

    def backward(*args):
        asked.append(args[-1])
        return pair.backward(*args)

    monkeypatch.setattr(room, "kernels", lambda op, x: room.Kernels(pair.forward, backward))
    liger_gated_rms_norm(x, gate, w, 1e-6, gate_first=True).sum().backward()
    assert asked == [False] and w.grad is None
    frozen = x.grad.clone()
    x.grad = None
    liger_gated_rms_norm(x, gate, w.requires_grad_(), 1e-6, gate_first=True).sum().backward()
    assert asked == [False, True] and w.grad is not None
    assert torch.equal(frozen, x.grad)


def test_a_single_row_without_a_batch(impl, device):
    """The torch pair's backward flattened dimensions that one row does not have."""
    tensors, dy = torch.randn(3, 8, device=device), torch.randn(8, device=device)
    found, wanted = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
    liger_gated_rms_norm(*found, 1e-6, gate_first=False).backward(dy)
    room.reference(*wanted).backward(dy)
    for ours, theirs in zip(found, wanted):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_no_rows_give_a_zero_weight_gradient(impl, device):
    x, gate = (torch.empty(0, 8, device=device, requires_grad=True) for _ in range(2))
    w = torch.ones(8, device=device, requires_grad=True)
    liger_gated_rms_norm(x, gate, w, 1e-6, gate_first=False, group_size=4).sum().backward()
    assert x.grad.shape == gate.grad.shape == (0, 8) and torch.equal(w.grad, torch.zeros_like(w))


@pytest.mark.parametrize("activation", room.ACTIVATIONS)
@pytest.mark.parametrize("gate_first", [True, False])
def test_gradcheck(gate_first, activation):
    x, gate = (torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    w = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *t: GatedRMSNormFunction.apply(*t, 1e-3, gate_first, activation, "llama", 3), (x, gate, w)
    )


X, W = torch.ones(2, 6), torch.ones(6)


@pytest.mark.parametrize(
    "tensors, options, message",
    [
        ((X, X, W), dict(activation="relu"), r"activation must be one of \['sigmoid', 'silu'\], got 'relu'"),
        ((X, X, W), dict(casting_mode="none"), r"casting_mode must be one of \['gemma', 'llama'\], got 'none'"),
        ((X.long(), X, W), {}, "x and gate must be of floating dtypes, got torch.int64 and torch.float32"),
        ((X, X[:1], W), {}, r"x of shape \(2, 6\) and a gate of shape \(1, 6\)"),
        ((X, X, W[:5]), {}, r"weight of shape \(5,\) does not fit rows of 6"),
        ((X, X, W), dict(group_size=4), "group_size=4 does not divide rows of 6"),
        ((X, X, W), dict(group_size=0), "group_size=0 does not divide rows of 6"),
        ((X, X.to("meta"), W), {}, "x is on cpu and the gate on meta"),
        ((X, X, W.to("meta")), {}, "x is on cpu and the weight on meta"),
    ],
)
def test_what_cannot_be_honoured_is_named(tensors, options, message):
    with pytest.raises(ValueError, match=message):
        liger_gated_rms_norm(*tensors, 1e-6, gate_first=True, **options)


def test_result_does_not_depend_on_the_tiling(device, poisoned_memory):
    pytest.importorskip("triton")
    from liger_kernel.ops.kernels import gated_rms_norm as kernels
    from liger_kernel.ops.kernels.blocks import RowTiles

    x, gate, dy = (torch.randn(13, 4 * 35, device=device) for _ in range(3))
    w = torch.randn(4 * 35, device=device)
    options = True, "silu", "llama", 4
    wanted = y, rstd = kernels.gated_rms_norm_forward(x, gate, w, 1e-6, *options, x.dtype)
    grads = kernels.gated_rms_norm_backward(dy, x, gate, w, rstd, *options, True)
    for tiles in (
        RowTiles(1, 64, False, 1, 1),
        RowTiles(2, 64, False, 1, 3, prefetch=True),  # fewer programs than groups
        RowTiles(2, 64, False, 1, 11, prefetch=True),  # not a multiple of the groups
        RowTiles(32, 64, False, 1, 4),
        RowTiles(4, 16, True, 1, 9),
    ):
        found = kernels.gated_rms_norm_forward(x, gate, w, 1e-6, *options, x.dtype, tiles=tiles)
        found += kernels.gated_rms_norm_backward(dy, x, gate, w, rstd, *options, True, tiles=tiles)
        for a, b in zip(found, wanted + grads, strict=True):
            torch.testing.assert_close(a, b)
