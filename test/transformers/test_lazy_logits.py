"""LazyLogits behaves as the tensor it stands for, and costs nothing until it is used as one."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F

from liger_kernel.transformers import lazy_logits
from liger_kernel.transformers.head_loss import Gate, Window
from liger_kernel.transformers.lazy_logits import LazyLogits

B, S, H, V = 2, 7, 16, 41
pytestmark = [
    pytest.mark.usefixtures("on_device"),
    pytest.mark.filterwarnings("ignore:the logits of a fused LM head were used"),
]


class Head(torch.nn.Linear):
    """A linear with the protocol of a fused head; counts the logits it has to compute."""

    computed = 0

    def forward(self, hidden, reduce=None):
        if reduce is lazy_logits._linear:
            self.computed += 1
        return reduce(hidden, self.weight, self.bias)


def pair(bias=True):
    """Lazy logits and the true ones, each of parameters of its own."""
    torch.manual_seed(3)
    head = Head(H, V, bias=bias)
    hidden = torch.randn(B, S, H, requires_grad=True)
    other_head, other_hidden = copy.deepcopy(head), hidden.detach().clone().requires_grad_()
    lazy = LazyLogits(hidden, head, V, Window(Gate(), True))
    return lazy, F.linear(other_hidden, other_head.weight, other_head.bias), (head, hidden), (other_head, other_hidden)


FUSED = {
    "float": lambda x: x.float(),
    "to the dtype of another": lambda x: x.double().type_as(x.new_zeros(1, dtype=torch.float32)),
    "to dtype": lambda x: x.to(torch.float32).contiguous(),
    "scale": lambda x: x * 0.5,
    "reflected scale": lambda x: 2 * x,
    "divided": lambda x: x / 3.0,
    "soft cap": lambda x: torch.tanh(x / 5.0) * 5.0,
    "scale and soft cap": lambda x: 5.0 * (x * 0.25 / 5.0).tanh(),
    "cap of another height": lambda x: torch.tanh(x / 2.0) * 3.0,
    "shifted": lambda x: x[..., :-1, :].contiguous(),
    "shifted in the second dim": lambda x: x[:, 1:],
    "one row": lambda x: x[0],
    "vocab slice": lambda x: x[:, :, 3:33],
    "two vocab slices": lambda x: x[..., 3:33][..., 2:30],
    "sliced after a scale": lambda x: (x * 0.5)[..., :20],
    "reshaped": lambda x: x.reshape(-1, V),
    "flattened": lambda x: x.flatten(0, 1),
    "torch.reshape": lambda x: torch.reshape(x, (B * S, -1)),
    "masked rows": lambda x: x[torch.tensor([[True, False] * 3 + [True], [True] * 7])],
}


@pytest.mark.parametrize("steps", FUSED.values(), ids=FUSED)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_cross_entropy_is_fused_and_equals_the_unfused(steps, bias, fused_calls):
    lazy, true, (head, hidden), (other_head, other_hidden) = pair(bias)
    lazy, true = steps(lazy), steps(true)
    assert lazy.shape == true.shape and lazy.dtype == true.dtype
    lazy, true = lazy.view(-1, lazy.size(-1)), true.reshape(-1, true.size(-1))
    target = torch.randint(0, true.size(-1), (len(true),))
    target[0] = -100
    loss, wanted = F.cross_entropy(lazy, target), F.cross_entropy(true, target)
    assert len(fused_calls) == 1 and not head.computed
    loss.backward()
    wanted.backward()
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(hidden.grad, other_hidden.grad)
    torch.testing.assert_close(head.weight.grad, other_head.weight.grad)
    if bias:
        torch.testing.assert_close(head.bias.grad, other_head.bias.grad)


@pytest.mark.parametrize("steps", FUSED.values(), ids=FUSED)
def test_materialized_values_are_those_of_the_tensor(steps):
    lazy, true, *_ = pair()
    # a slice is taken before the product instead of after: a differently shaped product, rounded differently
    torch.testing.assert_close(steps(lazy).materialize(), steps(true), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "sum"},
        {"reduction": "none"},
        {"label_smoothing": 0.1},
        {"weight": torch.linspace(0.5, 1.5, V)},
        {"ignore_index": 5},
    ],
    ids=str,
)
def test_options_of_cross_entropy_are_honoured(options, fused_calls, device):
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    lazy, true, *_ = pair()
    target = torch.randint(0, V, (B * S,))
    target[3] = options.get("ignore_index", -100)
    loss = F.cross_entropy(lazy.view(-1, V), target, **options)
    torch.testing.assert_close(loss, F.cross_entropy(true.view(-1, V), target, **options))
    module = torch.nn.CrossEntropyLoss(**options)
    torch.testing.assert_close(module(lazy.view(-1, V), target), module(true.view(-1, V), target))
    assert len(fused_calls) == 2


UNFUSED = {
    "two caps": (lambda x: x.tanh().tanh(), None),
    "negative cap": (lambda x: x.tanh() * -2.0, None),
    "bias added": (lambda x: x + 1.0, None),
    "values changed": (lambda x: x.masked_fill(x > 0, -1.0), None),
    "class dim second": (lambda x: x.view(B, S, V).permute(0, 2, 1), (B, S)),
    "soft targets": (lambda x: x.view(-1, V), "soft"),
}


@pytest.mark.parametrize(("steps", "target_shape"), UNFUSED.values(), ids=UNFUSED)
def test_what_cannot_be_fused_is_computed_from_the_true_logits(steps, target_shape, fused_calls):
    lazy, true, *_ = pair()
    lazy, true = steps(lazy.view(-1, V)), steps(true.view(-1, V))
    if target_shape == "soft":
        target = torch.rand(B * S, V).softmax(-1)
    else:
        target = torch.randint(0, V, target_shape or (B * S,))
    torch.testing.assert_close(F.cross_entropy(lazy, target), F.cross_entropy(true, target))
    assert not fused_calls


@pytest.mark.parametrize("change", ["mul_", "setitem", "torch.relu_", "view"])
def test_a_change_in_place_is_seen_by_the_loss(change, fused_calls):
    lazy, true, *_ = pair()
    lazy, true = lazy.detach().view(-1, V), true.detach().clone().view(-1, V)
    for x in (lazy, true):
        if change == "mul_":
            x.mul_(3.0)
        elif change == "setitem":
            x[:, 2] = -50.0
        elif change == "torch.relu_":
            torch.relu_(x)
        else:
            x[..., 1:].mul_(1.0)
            x[0, 0] = 9.0
    target = torch.randint(0, V, (B * S,))
    torch.testing.assert_close(F.cross_entropy(lazy, target), F.cross_entropy(true, target))
    torch.testing.assert_close(lazy * 2, true * 2)
    assert not fused_calls


def test_metadata_costs_nothing():
    lazy, true, (head, _), _ = pair()
    for name in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "layout"):
        assert getattr(lazy, name) == getattr(true, name), name
    for name in ("size", "dim", "numel", "is_floating_point", "is_contiguous", "stride", "element_size", "get_device"):
        assert getattr(lazy, name)() == getattr(true, name)(), name
    assert lazy.bfloat16().nbytes == true.bfloat16().nbytes and lazy.data.dtype == true.data.dtype
    assert torch.equal(lazy.half().new_zeros(2, 3), true.half().new_zeros(2, 3))
    assert lazy.size(-1) == V and len(lazy) == B and lazy.to(true.device) is lazy
    assert not hasattr(lazy, "no_such_thing") and "LazyLogits" in repr(lazy)
    assert not head.computed


USES = {
    "argmax": lambda x: x.argmax(-1),
    "log_softmax": lambda x: F.log_softmax(x, dim=-1),
    "gather": lambda x: torch.gather(x, 2, torch.zeros(B, S, 1, dtype=torch.long)),
    "arithmetic": lambda x: -((x - 1) ** 2) + 1 / (x * x + 1),
    "comparison": lambda x: (x > 0) & (x == x),
    "tensor first": lambda x: torch.ones(V) * x,
    "stacked": lambda x: torch.cat([x, x]),
    "indexed": lambda x: x[:, torch.tensor([0, 2]), None, ::2],
    "iterated": lambda x: torch.stack(list(x)),
    "numpy": lambda x: torch.from_numpy(x.detach().cpu().numpy()),
    "float of one": lambda x: torch.tensor(float(x.detach()[0, 0, 0])),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_any_other_use_sees_the_true_logits(use):
    lazy, true, *_ = pair()
    assert torch.equal(use(lazy), use(true))


def test_use_warns_once_with_its_cost():
    lazy, *_ = pair()
    with pytest.warns(UserWarning, match=r"\(2, 7, 41\).*MiB"):
        lazy.argmax(-1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lazy.view(-1, V).sum()


def test_gradients_flow_through_materialized_logits():
    lazy, true, (head, hidden), (other_head, other_hidden) = pair()
    lazy.logsumexp(-1).sum().backward()
    true.logsumexp(-1).sum().backward()
    torch.testing.assert_close(hidden.grad, other_hidden.grad)
    torch.testing.assert_close(head.weight.grad, other_head.weight.grad)


def test_detach_lets_no_gradient_through(fused_calls):
    lazy, true, *_ = pair()
    detached = lazy.detach()
    loss = F.cross_entropy(detached.view(-1, V), torch.zeros(B * S, dtype=torch.long))
    assert len(fused_calls) == 1
    assert not loss.requires_grad and not detached.requires_grad and not (detached * 2).materialize().requires_grad
    torch.testing.assert_close(detached.materialize(), true.detach())


def test_made_without_gradients_it_stays_without():
    head, hidden = Head(H, V), torch.randn(3, H)
    with torch.no_grad():
        lazy = LazyLogits(hidden, head, V)
    assert not lazy.requires_grad and not lazy.materialize().requires_grad


def test_copy_and_pickle_carry_the_values():
    lazy, true, *_ = pair()
    for copied in (pickle.loads(pickle.dumps(lazy)), copy.deepcopy(lazy), lazy.cpu().clone()):
        assert isinstance(copied, torch.Tensor)
        torch.testing.assert_close(copied.to(true.device), true.detach() if not copied.requires_grad else true)
    file = io.BytesIO()
    torch.save({"logits": lazy}, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True)["logits"], true)


def test_logits_of_changed_weights_are_refused():
    lazy, _, (head, _), _ = pair()
    with torch.no_grad():
        head.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="before the optimizer step"):
        lazy.argmax(-1)


def test_logits_used_before_the_step_stay_usable():
    lazy, true, (head, _), _ = pair()
    lazy.sum()
    with torch.no_grad():
        head.weight.add_(1.0)
    torch.testing.assert_close(lazy.materialize(), true)
    assert head.computed == 1


@pytest.mark.parametrize("now", [True, False], ids=["used inside", "used outside"])
def test_autocast_of_the_head_decides_the_dtype(now, fused_calls, device):
    head, hidden = Head(H, V), torch.randn(B * S, H)
    target = torch.randint(0, V, (B * S,))
    with torch.autocast(device.type, torch.bfloat16):
        lazy, true = LazyLogits(hidden, head, V), F.linear(hidden, head.weight, head.bias)
    assert lazy.dtype == true.dtype == torch.bfloat16
    with torch.autocast(device.type, torch.bfloat16, enabled=now):
        loss, wanted = F.cross_entropy(lazy, target), F.cross_entropy(true, target)
    assert loss.dtype == wanted.dtype and len(fused_calls) == 1
    # outside autocast torch rounds its loss to bf16, and so must we; inside, a GPU may round a logit the other way
    inside = 1e-4 if device.type == "cpu" else 2**-9
    torch.testing.assert_close(loss, wanted, rtol=inside if now else 2**-7, atol=0)
    assert torch.equal(lazy.materialize(), true)
