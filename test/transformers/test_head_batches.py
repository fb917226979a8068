"""The fused head of a live model on batches of every kind, split in every way, and what it never computes."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from support_head import agree, both, tokens

pytest.importorskip("transformers")

from liger_kernel.transformers.lazy_logits import LazyLogits  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:the logits of a fused LM head were used"),
    pytest.mark.usefixtures("on_device"),
]
V = 256


def gradients(model):
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("items", [None, 0, torch.tensor(0)], ids=str)
@pytest.mark.parametrize("shape", [(2, 6), (1, 1), (3, 1)], ids=str)
def test_nothing_to_learn_gives_loss_zero_and_zero_gradients(shape, items):
    _, fused, _ = both()
    ids = torch.randint(3, 250, shape)
    loss = fused(input_ids=ids, labels=torch.full_like(ids, -100), use_cache=False, num_items_in_batch=items).loss
    loss.backward()
    assert loss == 0 and loss.dtype is torch.float32
    assert all(p.grad is not None and not p.grad.any() for p in fused.parameters())


def test_one_token_to_learn():
    model, fused, _ = both()
    ids = torch.randint(3, 250, (1, 2))
    agree(model, fused, dict(input_ids=ids, labels=ids, use_cache=False))


def test_an_empty_batch():
    head = torch.nn.Linear(16, V)
    head.forward = lambda hidden, reduce: reduce(hidden, head.weight, head.bias)
    logits = LazyLogits(torch.zeros(0, 5, 16, requires_grad=True), head, V)
    loss = F.cross_entropy(logits.float().view(-1, V), torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss == 0 and not head.weight.grad.any() and logits.materialize().shape == (0, 5, V)


@pytest.mark.parametrize("sizes", [(4,), (2, 2), (1, 3), (1, 1, 1, 1)], ids=str)
def test_accumulated_gradients_do_not_depend_on_the_split(sizes):
    model, fused, _ = both()
    given = tokens(rows=4)
    given["labels"][1, :7] = -100  # rows differ in their tokens
    count = (given["labels"][:, 1:] != -100).sum()
    model(**given).loss.backward()
    start, total = 0, 0.0
    for size in sizes:
        part = {k: v[start : start + size] if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        loss = fused(**part, num_items_in_batch=count).loss
        loss.backward()
        total, start = total + loss.detach(), start + size
    torch.testing.assert_close(total, model(**given).loss.detach(), rtol=1e-6, atol=0)
    for ours, wanted in zip(gradients(fused), gradients(model), strict=True):
        # sums of the same 30 tokens' gradients in another order
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-6 * max(1.0, wanted.abs().max().item()))


@pytest.mark.parametrize("keep", [5, torch.tensor([0, 3, 4, 9])], ids=["last", "chosen"])
def test_logits_to_keep(keep, fused_calls):
    model, fused, _ = both()
    given = tokens()
    kept = slice(-keep, None) if isinstance(keep, int) else keep
    given["labels"] = given["labels"][:, kept]
    output, other = agree(model, fused, given, logits_to_keep=keep)
    assert len(fused_calls) == 1 and isinstance(output.logits, LazyLogits)
    torch.testing.assert_close(output.logits.materialize(), other.logits)


@pytest.mark.parametrize("named", ["labels", "shift_labels"])
def test_evaluation_gives_a_loss_for_either_kind_of_labels(named):
    model, fused, _ = both()
    model.eval(), fused.eval()
    given = tokens()
    with torch.no_grad():
        wanted = model(**given).loss
        if named == "shift_labels":
            given[named] = F.pad(given.pop("labels"), (0, 1), value=-100)[:, 1:].contiguous()
        torch.testing.assert_close(fused(**given).loss, wanted)
        torch.testing.assert_close(fused(**given, skip_logits=True).loss, wanted)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.numel = max(self.numel, *sizes, 0)
        return result


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_untouched_logits_are_never_computed_whole(training, monkeypatch):
    monkeypatch.setenv("LIGER_KERNEL_WORKSPACE_MB", str(4 * V * 4 / 2**20))  # four rows of logits
    model, fused, _ = both()
    largest_weight = max(p.numel() for p in model.parameters())
    given = tokens(rows=8, length=2 * largest_weight // (8 * V))
    found = []
    for m in (model, fused):
        m.train(training)
        options = {} if m is model else dict(skip_logits=True, return_entropy=True, return_token_accuracy=True)
        with Largest() as largest, torch.set_grad_enabled(training):
            loss = m(**given, **options).loss
            if training:
                loss.backward()
        found.append(largest.numel)
    whole = given["input_ids"].numel() * V
    assert found[0] >= whole > found[1]


def test_generation_between_training_steps():
    """As GRPO trains: sample in training mode, score without gradients, take a step."""
    model, fused, _ = both()
    ids = torch.randint(3, 250, (2, 5))
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    for _ in range(2):
        sampled = [m.generate(ids, **options) for m in (model, fused)]
        assert torch.equal(*sampled)
        with torch.no_grad():
            assert torch.equal(*(m(input_ids=sampled[0]).logits for m in (model, fused)))
        scored = [m(input_ids=sampled[0]).logits.log_softmax(-1).mean() for m in (model, fused)]
        torch.testing.assert_close(*scored)
        agree(model, fused, dict(input_ids=sampled[0], labels=sampled[0], use_cache=False))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_of_either_kind(reentrant):
    model, fused, _ = both()
    for m in (model, fused):
        m.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        m.enable_input_require_grads()
    output, _ = agree(model, fused, tokens())
    assert isinstance(output.logits, LazyLogits)
