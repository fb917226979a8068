"""Policy-gradient losses of whole logits: equal to those over a head, whose formulas test/chunked_loss has."""

import pytest
import torch

from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
from liger_kernel.chunked_loss.grpo_loss import CLIPPED, LOSS_TYPES
from liger_kernel.ops.grpo_loss import fused_selective_log_softmax
from liger_kernel.transformers.grpo_loss import triton_grpo_loss


@pytest.fixture
def given(device):
    logits = torch.randn(3, 6, 31, device=device)
    ids, mask = torch.randint(0, 31, (3, 5), device=device), torch.ones(3, 5, dtype=torch.int64, device=device)
    mask[1, 3:] = 0
    return logits, ids, mask


def test_selective_log_softmax(given, impl):
    logits, ids, mask = given
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    found = fused_selective_log_softmax(ours, ids, 0.7, mask)
    truth = (theirs[:, :-1] / 0.7).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1) * mask
    upstream = torch.randn_like(found)
    found.backward(upstream)
    truth.backward(upstream.double())
    torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=1e-6)  # roundings of fp32
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-6)
    assert found.dtype is torch.float32
    assert fused_selective_log_softmax(logits, ids).equal(fused_selective_log_softmax(logits, ids, 0.9))


@pytest.mark.parametrize("kind, level", [(k, "token") for k in LOSS_TYPES] + [(k, "sequence") for k in CLIPPED])
def test_is_the_loss_of_a_head(kind, level, given):
    """A head whose weight is the unit matrix and whose hidden states are the logits."""
    logits, ids, mask = given
    old = (logits[:, :-1] / 0.9).log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1) + 0.2 * torch.randn_like(
        mask * 1.0
    )
    more = dict(ref_logp=old + 0.1 * torch.randn_like(old), advantages=torch.randn(3, device=logits.device))
    options = dict(loss_type=kind, importance_sampling_level=level, max_completion_length=8)
    ours = logits.clone().requires_grad_()
    loss, (kl, share) = triton_grpo_loss(
        ours, old, more["ref_logp"], ids, more["advantages"], mask, inplace=False, reduce=True, eps_high=0.3, **options
    )
    head = LigerFusedLinearGRPOLoss(temperature=0.9, epsilon_high=0.3, **options)
    hidden = logits[:, :-1].clone().requires_grad_()
    eye = torch.eye(31, device=logits.device)
    wanted, metrics = head(hidden, eye, ids, mask, more["advantages"], None, more["ref_logp"], old)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(torch.stack((kl, share)), torch.stack(metrics))
    torch.testing.assert_close(torch.autograd.grad(loss, ours)[0][:, :-1], torch.autograd.grad(wanted, hidden)[0])


def test_unreduced_and_in_place(given):
    logits, ids, mask = given
    advantages = torch.tensor([1.0, -1.0, 0.5], device=logits.device)
    leaf = logits.clone().requires_grad_()
    work = leaf * 1.0
    losses, kl, clipped = triton_grpo_loss(work, None, None, ids, advantages, mask, beta=0.0)
    assert losses.shape == clipped.shape == ids.shape and kl is None
    torch.testing.assert_close(losses, -advantages[:, None] * mask)
    losses.sum().backward()
    other = logits.clone().requires_grad_()
    triton_grpo_loss(other, None, None, ids, advantages, mask, beta=0.0, inplace=False)[0].sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad)
    with pytest.raises(ValueError, match="ref_logp"):
        triton_grpo_loss(logits, None, None, ids, advantages, mask)
    with pytest.raises(ValueError, match="tokens"):
        fused_selective_log_softmax(logits, ids[:, 1:])
