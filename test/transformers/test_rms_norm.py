"""What is special about RMSNorm: transformers' own bits, the flavours, what in_place may do, messages."""

import copy
import inspect
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from liger_kernel.ops import core
from liger_kernel.ops import rms_norm as room
from liger_kernel.ops.rms_norm import LigerRMSNormFunction, rms_norm_backward, rms_norm_forward
from liger_kernel.transformers import rms_norm as modules
from liger_kernel.transformers.functional import liger_rms_norm
from liger_kernel.transformers.rms_norm import LigerRMSNorm, LigerRMSNormForGemma4, LigerRMSNormForMuseGlimmer

from support import dtypes

# Shapes that a tile does not divide; 40000 columns need the column loop.
SHAPES = [(2, 16, 64), (9, 7, 41), (5, 1), (1, 1), (3, 2101), (2, 40000)]


@pytest.mark.parametrize("casting_mode, offset", [("llama", 0.0), ("gemma", 1.0), ("none", 0.0)])
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_correctness(shape, casting_mode, offset, impl, device):
    for dtype in dtypes(impl, device):
        x = torch.randn(shape, dtype=dtype, device=device)
        w = torch.randn(shape[-1], dtype=dtype, device=device)
        ours = liger_rms_norm(x, w, 1e-6, offset, casting_mode)
        theirs = room.reference(x, w, 1e-6, offset, casting_mode)
        # The mean is summed in another order, so it and then rstd may round to a neighbour: two units in the last
        # place, and two more in "none", which rounds both to the input dtype.
        units = 4 if casting_mode == "none" else 2
        torch.testing.assert_close(ours, theirs, rtol=units * torch.finfo(dtype).eps, atol=1e-6)


def theirs(model, name):
    module = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    return getattr(module, name)


@pytest.mark.parametrize(
    "model, name, options",
    [
        ("llama", "LlamaRMSNorm", {}),
        ("gemma", "GemmaRMSNorm", {"casting_mode": "gemma", "offset": 1.0}),
        ("gemma2", "Gemma2RMSNorm", {"casting_mode": "gemma", "offset": 1.0}),
        ("olmo2", "Olmo2RMSNorm", {"casting_mode": "gemma"}),  # the weight is multiplied before the rounding
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_cpu_forward_has_the_bits_of_transformers(model, name, options, dtype):
    for n in (1, 7, 64, 1000):
        module = theirs(model, name)(n, eps=1e-6).to(dtype)
        nn.init.normal_(module.weight)
        x = 3 * torch.randn(4, 5, n, dtype=dtype)
        ours = LigerRMSNorm(n, 1e-6, **options).to(dtype)
        ours.load_state_dict(module.state_dict())
        assert torch.equal(ours(x), module(x)), n


# The constructors as other projects call them: parameters in order, with their defaults.
CENTRED = dict(eps=1e-6, offset=1.0, casting_mode="gemma", init_fn="zeros", in_place=False, row_mode=None)
PLAIN = dict(eps=1e-6, offset=0.0, casting_mode="llama", init_fn="ones", in_place=False, row_mode=None)
SCALED = dict(eps=1e-6, offset=0.0, casting_mode="gemma", init_fn="ones", in_place=False, with_scale=True)
REQUIRED = inspect.Parameter.empty
SIGNATURES = {
    "LigerRMSNorm": dict(hidden_size=REQUIRED) | PLAIN | dict(in_place=True, elementwise_affine=True),
    "LigerRMSNormForGemma": dict(hidden_size=REQUIRED) | CENTRED | dict(in_place=True),
    "LigerRMSNormForGemma2": dict(hidden_size=REQUIRED) | CENTRED,
    "LigerRMSNormForGemma3": {k: v for k, v in (dict(dim=REQUIRED) | CENTRED).items() if k != "row_mode"},
    "LigerRMSNormForGemma4": dict(dim=REQUIRED) | SCALED,
    "LigerRMSNormForOlmo2": dict(hidden_size=REQUIRED) | PLAIN,
    "LigerRMSNormForGlm4": dict(hidden_size=REQUIRED) | PLAIN,
    "LigerRMSNormForQwen3Next": dict(hidden_size=REQUIRED) | CENTRED,
    "LigerRMSNormForMuseGlimmer": dict(dim=None) | SCALED,
    "LigerRMSNormForMuseGlimmerTextCentered": dict(hidden_size=REQUIRED) | CENTRED,
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_flavour_keeps_its_constructor_and_defaults(name):
    cls = getattr(modules, name)
    found = {p.name: p.default for p in inspect.signature(cls).parameters.values()}
    assert list(found.items()) == list(SIGNATURES[name].items())
    module = cls(8)
    for attribute in ("offset", "casting_mode", "in_place", "row_mode"):
        assert getattr(module, attribute) == SIGNATURES[name].get(attribute)
    assert module.variance_epsilon == 1e-6
    assert module.weight.unique().item() == (1.0 if SIGNATURES[name]["init_fn"] == "ones" else 0.0)
    assert module.weight.shape == (8,)


@pytest.mark.parametrize("cls", [LigerRMSNormForGemma4, LigerRMSNormForMuseGlimmer])
def test_without_scale_no_weight_is_allocated(cls, device):
    module = cls(None, 1e-5, with_scale=False)
    assert not list(module.parameters()) and not module.state_dict()
    x = torch.randn(3, 8, device=device)
    torch.testing.assert_close(module(x), x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt())


def test_subclass_with_its_own_new_is_constructed():
    class Scaled(LigerRMSNormForGemma4):
        def __new__(cls, dim, eps, with_scale):
            return super().__new__(cls)

        def __init__(self, dim, eps, with_scale):
            super().__init__(dim, eps, with_scale=with_scale)

    assert Scaled(None, 1e-6, False).weight is None
    assert Scaled(4, 1e-6, True).weight.shape == (4,)


@pytest.mark.parametrize("name", SIGNATURES)
def test_module_survives_pickle_and_deepcopy(name):
    module = getattr(modules, name)(8)
    nn.init.normal_(module.weight)
    x = torch.randn(2, 8)
    for copied in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert type(copied) is type(module)
        assert torch.equal(copied(x), module(x))
        assert repr(copied) == repr(module)


def gradients(x, w, upstream, **options):
    x, w = (t.detach().clone().requires_grad_() for t in (x, w))
    LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", *options.values()).backward(upstream)
    return x.grad, w.grad


def test_in_place_changes_no_gradient_and_only_when_permitted(impl, device):
    x, w, upstream = torch.randn(6, 33), torch.randn(33), torch.randn(6, 33)
    x, w, upstream = (t.to(device) for t in (x, w, upstream))
    kept = upstream.clone()
    expected = gradients(x, w, upstream, in_place=False)
    assert torch.equal(upstream, kept), "in_place=False wrote into the incoming gradient"
    for found, wanted in zip(gradients(x, w, upstream, in_place=True), expected):
        assert torch.equal(found, wanted)


def test_in_place_writes_into_no_tensor_but_the_incoming_gradient(impl, device):
    x, w = torch.randn(6, 33, device=device), torch.randn(33, device=device)
    before = x.clone(), w.clone()
    wide = torch.randn(6, 66, device=device)
    kept = wide.clone()
    gradients(x, w, wide[:, ::2], in_place=True)  # not contiguous: its copy may be overwritten, it may not
    assert torch.equal(x, before[0]) and torch.equal(w, before[1]) and torch.equal(wide, kept)


def test_frozen_weight_gets_no_gradient_and_no_work(impl, device, monkeypatch):
    x = torch.randn(4, 16, device=device, requires_grad=True)
    w = torch.randn(16, device=device)
    pair, asked = room.kernels("rms_norm", x), []

    def backward(*args):
        asked.append(args[-1])
        return pair.backward(*args)

    monkeypatch.setattr(room, "kernels", lambda op, x: room.Kernels(pair.forward, backward))
    liger_rms_norm(x, w, 1e-6).sum().backward()
    assert asked == [False] and w.grad is None
    frozen = x.grad.clone()
    x.grad = None
    liger_rms_norm(x, w.requires_grad_(), 1e-6).sum().backward()
    assert asked == [False, True] and w.grad is not None
    assert torch.equal(frozen, x.grad)


@pytest.mark.parametrize("casting_mode", ["llama", "gemma"])
def test_fp32_weight_with_half_precision_rows(casting_mode, impl, device):
    dtype = torch.bfloat16 if impl == "torch" else torch.float16
    x = torch.randn(5, 24, dtype=dtype, device=device, requires_grad=True)
    w = torch.randn(24, device=device, requires_grad=True)
    y = liger_rms_norm(x, w, 1e-6, 0.0, casting_mode)
    assert y.dtype == dtype
    torch.testing.assert_close(y, room.reference(x, w, 1e-6, 0.0, casting_mode))
    y.sum().backward()
    assert x.grad.dtype == dtype and w.grad.dtype == torch.float32


def test_autocast_changes_nothing(impl, device):
    x, w = torch.randn(5, 24, device=device), torch.randn(24, device=device)
    expected = liger_rms_norm(x, w, 1e-6)
    with torch.autocast(device.type, torch.bfloat16):
        found = liger_rms_norm(x, w, 1e-6)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_no_rows_give_a_zero_weight_gradient(impl, device):
    x = torch.empty(0, 8, device=device, requires_grad=True)
    w = torch.ones(8, device=device, requires_grad=True)
    liger_rms_norm(x, w, 1e-6).sum().backward()
    assert x.grad.shape == (0, 8) and torch.equal(w.grad, torch.zeros_like(w))


@pytest.mark.parametrize("casting_mode, offset", [("llama", 0.0), ("gemma", 1.0), ("none", 0.5)])
def test_gradcheck(casting_mode, offset):
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, w: LigerRMSNormFunction.apply(x, w, 1e-3, offset, casting_mode, False), (x, w)
    )


def test_compiles_without_a_graph_break():
    module = LigerRMSNorm(16)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 16)
    a, b = (x.clone().requires_grad_() for _ in range(2))
    ya = compiled(a)
    yb = module(b)
    ya.square().sum().backward()
    from_compiled, module.weight.grad = module.weight.grad, None
    yb.square().sum().backward()
    torch.testing.assert_close(ya, yb)
    torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(from_compiled, module.weight.grad)


@pytest.mark.parametrize(
    "columns, compiling, asked, merged",
    [(4096, True, None, True), (4097, True, None, False), (4096, False, None, False), (4096, True, "triton", False)],
)
def test_torch_compile_merges_narrow_norms_with_their_neighbours(columns, compiling, asked, merged, monkeypatch):
    """A compiled LLaMA-1B step took as long with our norms as without, for the additions that they kept apart."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    monkeypatch.setattr(room, "_MERGES", True)
    monkeypatch.setattr(core, "_forced", asked)
    monkeypatch.setattr(room, "kernels", lambda op, x: "a kernel")
    x = SimpleNamespace(is_cuda=True, shape=(2, columns), device=torch.device("cpu"))
    assert room._pair(x) == (room.TORCH if merged else "a kernel")
    monkeypatch.setattr(room, "device_of", lambda device: SimpleNamespace(overrides={"rms_norm": "a plug-in's"}))
    assert room._pair(x) == "a kernel"


@pytest.mark.parametrize("casting_mode", ["llama", "gemma", "none"])
def test_a_single_row_without_a_batch(casting_mode, impl, device):
    """The torch pair's backward, which torch.compile gets, flattened dimensions that one row does not have."""
    x, w, dy = (torch.randn(8, device=device) for _ in range(3))
    found = [t.clone().requires_grad_() for t in (x, w)]
    wanted = [t.clone().requires_grad_() for t in (x, w)]
    LigerRMSNormFunction.apply(*found, 1e-6, 0.0, casting_mode, False).backward(dy)
    room.reference(*wanted, 1e-6, 0.0, casting_mode).backward(dy)
    for ours, theirs in zip(found, wanted):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_helpers_have_upstreams_signatures(impl, device):
    x, w, dy = torch.randn(4, 8, device=device), torch.randn(8, device=device), torch.randn(4, 8, device=device)
    y, saved, rstd, block, warps, mode = rms_norm_forward(x, w, 1e-6, 0.0, "gemma", None)
    assert mode == 1 and torch.equal(saved, x)
    torch.testing.assert_close(y, room.reference(x, w, 1e-6, 0.0, "gemma"))
    dx, dw = rms_norm_backward(dy, saved, w, rstd, 0.0, mode, block, warps, False, None)
    a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
    room.reference(a, b, 1e-6, 0.0, "gemma").backward(dy)
    torch.testing.assert_close(dx, a.grad)
    torch.testing.assert_close(dw, b.grad)
    assert rms_norm_backward(dy, saved, w, rstd, 0.0, mode, block, warps, False, None, needs_dw=False)[1] is None


def test_unknown_casting_mode_is_named():
    x, w = torch.randn(2, 4), torch.ones(4)
    for bad in ("lama", 7):
        with pytest.raises(ValueError, match=f"casting_mode must be one of .*'llama'.*got {bad!r}"):
            liger_rms_norm(x, w, 1e-6, 0.0, bad)
    with pytest.raises(ValueError, match="casting_mode must be one of"):
        LigerRMSNorm(4, casting_mode="lama")


def test_unknown_init_fn_is_named():
    with pytest.raises(ValueError, match="init_fn must be one of .*got 'randn'"):
        LigerRMSNorm(4, init_fn="randn")


def test_weight_of_another_length_is_named():
    with pytest.raises(ValueError, match=r"rms_norm: weight of shape \(5,\) does not fit rows of 4"):
        liger_rms_norm(torch.randn(2, 4), torch.ones(5), 1e-6)


def test_weight_on_another_device_is_named():
    with pytest.raises(ValueError, match="rms_norm: x is on cpu and the weight on meta"):
        liger_rms_norm(torch.randn(2, 4), torch.ones(4, device="meta"), 1e-6)


def test_integer_rows_are_named():
    with pytest.raises(ValueError, match="rms_norm: x must be of a floating dtype, got torch.int64"):
        liger_rms_norm(torch.ones(2, 4, dtype=torch.int64), None, 1e-6)
