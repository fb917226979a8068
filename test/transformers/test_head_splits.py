"""However the same tokens are split, over batches, padding, packing or the sequence, their gradient is the same."""

import copy

import pytest
import torch

from support import tiny_model

pytest.importorskip("transformers")

PAD = 0


def rows(lengths):
    generator = torch.Generator().manual_seed(4)
    made = []
    for length in lengths:
        ids = torch.randint(3, 250, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // 3] = -100
        made.append((ids, labels))
    return made


def padded(some, side):
    width = max(len(ids) for ids, _ in some) + 1
    ids = torch.full((len(some), width), PAD)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, (i, y) in enumerate(some):
        at = slice(width - len(i), width) if side == "left" else slice(0, len(i))
        ids[row, at], labels[row, at], mask[row, at] = i, y, 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return dict(input_ids=ids, labels=labels, attention_mask=mask, position_ids=positions)


def packed(some):
    """One row, whose sequences' positions start anew: transformers keeps their attention apart."""
    labels = [torch.cat((torch.tensor([-100]), y[1:])) for _, y in some]  # no token is predicted across a border
    positions = torch.cat([torch.arange(len(i)) for i, _ in some])
    return dict(
        input_ids=torch.cat([i for i, _ in some])[None], labels=torch.cat(labels)[None], position_ids=positions[None]
    )


SEQUENCES = rows((9, 14, 5, 11))
SPLITS = {
    "one batch": [padded(SEQUENCES, "right")],
    "padded left": [padded(SEQUENCES, "left")],
    "a batch each": [padded([one], "right") for one in SEQUENCES],
    "one and three": [padded(SEQUENCES[:1], "right"), padded(SEQUENCES[1:], "left")],
    "packed": [packed(SEQUENCES)],
    "packed in two": [packed(SEQUENCES[:3]), packed(SEQUENCES[3:])],
}


def gradients(model, batches, count) -> torch.Tensor:
    for batch in batches:
        model(**batch, use_cache=False, num_items_in_batch=count).loss.backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return found


@pytest.mark.parametrize("as_tensor", [False, True])
def test_any_split_of_the_tokens_gives_one_gradient(as_tensor):
    from liger_kernel.transformers.head import fuse_head

    model = tiny_model("llama", attn_implementation="sdpa")
    count = int(sum((y[1:] != -100).sum() for _, y in SEQUENCES))
    truth = gradients(copy.deepcopy(model).double(), SPLITS["a batch each"], count)
    fuse_head(model)
    count = torch.tensor(count) if as_tensor else count
    for name, batches in SPLITS.items():
        wrong = (gradients(model, batches, count).double() - truth).norm() / truth.norm()
        assert wrong < 1e-6, name  # norm-wise, some 16 roundings of fp32


@pytest.mark.parametrize("parts", [2, 3])
def test_a_split_sequence_takes_its_labels_from_the_next_part(parts):
    """Context parallelism: each rank has a part of the hidden states and shift_labels, its last label is another's."""
    from liger_kernel.transformers.model.loss_utils import LigerForCausalLMLoss

    torch.manual_seed(2)
    hidden, weight = torch.randn(2, 13, 16), torch.randn(41, 16)
    labels = torch.randint(0, 41, (2, 13))
    labels[0, :4] = -100
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    count = (shifted != -100).sum()

    def run(pieces):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        total = sum(
            LigerForCausalLMLoss(h[:, a:b], w, None, 16, num_items_in_batch=count, shift_labels=shifted[:, a:b])
            for a, b in pieces
        )
        total.backward()
        return total.detach(), h.grad, w.grad

    cuts = [round(13 * i / parts) for i in range(parts + 1)]
    for part, whole in zip(run(list(zip(cuts, cuts[1:]))), run([(0, 13)])):
        torch.testing.assert_close(part, whole)
