"""A backward writes over what it saved where nobody else can see it, and nowhere else."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from liger_kernel.ops import LigerFusedGateUpSiLUMulFunction
from liger_kernel.ops.spare import _COUNTS, _alone, hooked, spare
from liger_kernel.transformers.functional import liger_geglu, liger_swiglu

needs_counts = pytest.mark.skipif(not _COUNTS, reason="this torch does not count a tensor's holders")
OPS = {
    "swiglu": liger_swiglu,
    "geglu": liger_geglu,
    "packed": lambda a, b: LigerFusedGateUpSiLUMulFunction.apply(torch.cat((a, b), -1)),
}
WAYS = {
    "plain": lambda f, x: f(x),
    "checkpoint": lambda f, x: checkpoint(f, x, use_reentrant=False),
    "reentrant": lambda f, x: checkpoint(f, x, use_reentrant=True),
}


class Block(torch.nn.Module):
    """A gated MLP that notes where its gate lies and where the gate's gradient arrives; keep(gate) is held."""

    def __init__(self, device, keep=None):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up, self.down = (torch.nn.Linear(8, 8, bias=False, device=device) for _ in range(3))
        self.x = torch.randn(2, 3, 8, device=device, requires_grad=True)
        self.keep, self.kept, self.places, self.grads = keep, [], [], []

    def forward(self, x, op):
        a, b = self.gate(x), self.up(x)
        self.places.append(a.data_ptr())
        if a.requires_grad:
            a.register_hook(lambda g: self.grads.append(g.data_ptr()))
        if self.keep is not None:
            self.kept.append((self.keep(a), a.detach().clone()))
        return self.down(op(a, b))

    def step(self, way, op, **options):
        WAYS[way](lambda x: self(x, op), self.x).square().sum().backward(**options)
        return [p.grad.clone() for p in (self.x, *self.parameters())]


def plain(a, b):
    return torch.nn.functional.silu(a) * b


@needs_counts
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("op", ["swiglu", "geglu"])
def test_a_gradient_takes_the_place_of_what_only_its_backward_holds(way, op, device, impl):
    block = Block(device)
    block.step(way, OPS[op])
    assert block.grads == block.places[-1:]


@needs_counts
def test_a_packed_gradient_takes_the_place_too(device, impl):
    places, grads = [], []
    linear = torch.nn.Linear(8, 16, bias=False, device=device)
    y = linear(torch.randn(3, 8, device=device))
    places.append(y.data_ptr())
    y.register_hook(lambda g: grads.append(g.data_ptr()))
    c = LigerFusedGateUpSiLUMulFunction.apply(y)
    del y
    c.sum().backward()
    # torch's pair makes dy of its halves
    assert (grads == places) == (impl == "triton")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("keep", ["itself", "detached", "a view", "a row", "NumPy", "DLPack"])
def test_what_somebody_holds_is_left_alone(keep, op, way, device, impl):
    hold = {
        "itself": lambda a: a, "detached": lambda a: a.detach(), "a view": lambda a: a.view(2, 24),
        "a row": lambda a: a[0], "NumPy": lambda a: a.detach().cpu().numpy(),
        "DLPack": lambda a: torch.utils.dlpack.to_dlpack(a.detach()),
    }[keep]  # fmt: skip
    block = Block(device, hold)
    found = block.step(way, OPS[op])
    for held, before in block.kept:
        now = torch.from_dlpack(held) if keep == "DLPack" else torch.as_tensor(held)
        assert torch.equal(now.flatten().to(device), before.flatten()[: now.numel()])
    for a, b in zip(found, Block(device).step("plain", OPS[op]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("op", OPS)
def test_what_another_node_saved_is_left_alone(op, way, first, device, impl):
    """The cosine of a and the sine of b are read after, or before, the gated product's backward."""

    def beside(op):
        def both(a, b):
            if first:
                return a.sin() * b.cos() + op(a, b)
            c = op(a, b)
            return c + a.sin() * b.cos()

        return both

    wanted = Block(device).step("plain", beside(plain if op != "geglu" else _gelu))
    for a, b in zip(Block(device).step(way, beside(OPS[op])), wanted, strict=True):
        torch.testing.assert_close(a, b)


def _gelu(a, b):
    return torch.nn.functional.gelu(a, approximate="tanh") * b


@pytest.mark.parametrize("way", ["plain", "checkpoint"])
@pytest.mark.parametrize("op", OPS)
def test_a_graph_that_is_kept_can_be_run_again(op, way, device, impl):
    block = Block(device)
    loss = WAYS[way](lambda x: block(x, OPS[op]), block.x).square().sum()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in block.parameters()]
    loss.backward(retain_graph=True)
    loss.backward()
    for p, grad in zip(block.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 3 * grad)


def test_one_tensor_as_gate_and_up(device, impl):
    linear = torch.nn.Linear(8, 8, device=device)
    x = torch.randn(3, 8, device=device, requires_grad=True)

    def gradient(op):
        return torch.autograd.grad((lambda a: op(a, a))(linear(x)).sum(), x)[0]

    torch.testing.assert_close(gradient(liger_swiglu), gradient(plain))


def test_hooks_on_saved_tensors_are_somebody(device, impl):
    kept = []
    block = Block(device)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((t, t.clone())) or t, lambda t: t):
        found = block.step("plain", liger_swiglu)
    assert kept and all(torch.equal(a, b) for a, b in kept)
    for a, b in zip(found, Block(device).step("plain", plain), strict=True):
        torch.testing.assert_close(a, b)


def test_nothing_is_spare_outside_of_a_backward():
    x = torch.ones(3)
    assert not spare((x,))


def test_a_torch_that_cannot_be_asked_about_hooks_trains_all_the_same(monkeypatch, device):
    """torch 2.6: every patched MLP raised AttributeError."""
    from liger_kernel.transformers import apply_liger_kernel

    from support import tiny_model
    from support_head import tokens

    monkeypatch.delattr(torch._C._autograd, "_top_saved_tensors_default_hooks", raising=False)
    monkeypatch.setattr("liger_kernel.ops.spare._alone", _alone.__wrapped__)  # what another torch said is kept
    assert hooked()
    given = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in tokens().items()}
    losses = []
    for patched in (False, True):
        torch.manual_seed(0)
        model = tiny_model("llama").to(device)
        if patched:
            apply_liger_kernel(model)
        loss = model(**given).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
