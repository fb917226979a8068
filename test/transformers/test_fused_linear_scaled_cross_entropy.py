"""What is special about the per-token outputs of the head; that they equal their reference is in test_contract.py."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction
from liger_kernel.transformers.functional import liger_fused_linear_logprobs

from support_head import pairwise

VALUES = dict(
    bias=(False, True), temperature=(1.0, 0.6, "tensor"), logit_scale=(1.0, 0.3, "tensor"), softcap=(None, 4.0),
    ignore_index=(-100, 2), return_entropy=(False, True), return_predicted=(False, True),
    workspace_bytes=(1, 600, 1300, None),
)  # fmt: skip
# of a difference between sums of 21 classes: (outputs, gradients)
SLACK = {torch.float32: (2e-5, 1e-4), torch.float64: (1e-13, 1e-12)}


def problem():
    hidden, weight = torch.randn(2, 4, 8, requires_grad=True), torch.randn(21, 8, requires_grad=True)
    target = torch.randint(0, 21, (2, 4))
    target[1, 2] = -100
    return hidden, weight, target


def test_called_by_position_as_verl_does():
    hidden, weight, target = problem()
    flat = hidden.reshape(-1, 8)
    nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(
        flat, weight, target.reshape(-1), 0.7, -100, 1, True
    )
    log_p = (flat @ weight.t() / 0.7).log_softmax(-1)
    live = target.reshape(-1) != -100
    picked = log_p.gather(1, target.reshape(-1, 1).clamp(min=0)).squeeze(1)
    torch.testing.assert_close(nll, -picked * live)
    torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(-1) * live)
    (nll.sum() + entropy.square().sum()).backward()
    assert hidden.grad.any() and weight.grad.any() and not hidden.grad[1, 2].any()


@pytest.mark.parametrize("row", pairwise(VALUES), ids=lambda row: "-".join(str(v) for v in row.values()))
@pytest.mark.parametrize("dtype", SLACK)
def test_options_go_together(row, dtype, impl, device):
    row = dict(row)
    target = torch.randint(0, 21, (9,), device=device)
    target[4] = row["ignore_index"]
    sizes = [(9, 8), (21, 8)] + [(21,)] * row.pop("bias")
    leaves = [torch.randn(s, dtype=dtype, device=device, requires_grad=True) for s in sizes]
    for name, value in (("temperature", 0.6), ("logit_scale", 0.3)):
        if row[name] == "tensor":
            row[name] = torch.tensor(value, dtype=dtype, device=device)
    ours = liger_fused_linear_logprobs(*leaves[:2], target, *leaves[2:], **row)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    z = torch.nn.functional.linear(*wide) * row["logit_scale"]
    z = (z if row["softcap"] is None else 4.0 * torch.tanh(z / 4.0)) / row["temperature"]
    live, log_p = target != row["ignore_index"], z.log_softmax(-1)
    truths = dict(
        log_prob=log_p.gather(1, target.where(live, 0)[:, None]).squeeze(1) * live, lse=z.logsumexp(-1) * live
    )
    if row["return_entropy"]:
        truths["entropy"] = -(log_p.exp() * log_p).sum(-1) * live
    predicted = z.argmax(-1)
    if row["return_predicted"]:
        assert torch.equal(ours.predicted, predicted.where(live, -1))
        assert torch.equal(ours.hit, (predicted == target) & live)
    assert (ours.entropy is None, ours.predicted is None) == (not row["return_entropy"], not row["return_predicted"])
    slack, slack_of_gradients = SLACK[dtype]
    total = expected = 0.0
    for name, truth in truths.items():
        torch.testing.assert_close(getattr(ours, name).double(), truth, rtol=slack, atol=slack)
        upstream = torch.randn_like(truth)
        total, expected = total + (getattr(ours, name) * upstream.to(dtype)).sum(), expected + (truth * upstream).sum()
    for a, b in zip(torch.autograd.grad(total, leaves), torch.autograd.grad(expected, wide), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=slack_of_gradients, atol=slack_of_gradients / 5)


@pytest.mark.parametrize("output", ["log_prob", "lse", "entropy"])
def test_each_output_is_differentiable_alone(output):
    hidden, weight, target = problem()
    outputs = liger_fused_linear_logprobs(hidden, weight, target, return_entropy=True, return_predicted=True)
    got = torch.autograd.grad(getattr(outputs, output).sum(), (hidden, weight), retain_graph=True)
    z = hidden.double() @ weight.double().t()
    log_p = z.log_softmax(-1)
    truths = dict(
        log_prob=log_p.gather(-1, target.clamp(min=0)[..., None]).squeeze(-1),
        lse=z.logsumexp(-1),
        entropy=-(log_p.exp() * log_p).sum(-1),
    )
    truth = torch.autograd.grad((truths[output] * (target != -100)).sum(), (hidden, weight))
    for g, t in zip(got, truth):
        torch.testing.assert_close(g, t)
    again = torch.autograd.grad(getattr(outputs, output).sum(), (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(again, got))


def test_predicted_and_hit():
    hidden, weight, target = problem()
    truth = (hidden @ weight.t()).argmax(-1)
    target[0, 1] = truth[0, 1]
    outputs = liger_fused_linear_logprobs(hidden, weight, target, return_predicted=True)
    assert outputs.entropy is None and outputs.predicted.shape == target.shape
    assert torch.equal(outputs.predicted, truth.where(target != -100, -1))
    assert torch.equal(outputs.hit, (truth == target) & (target != -100)) and outputs.hit[0, 1]


def test_what_is_not_offered_is_named():
    hidden, weight, target = problem()
    with pytest.raises(ValueError, match="selected_token_ids is not offered"):
        LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, target, selected_token_ids=target)
    with pytest.raises(ValueError, match=r"target\[3\] is 21"):
        liger_fused_linear_logprobs(hidden, weight, target.index_fill(1, torch.tensor([3]), 21))
    with pytest.raises(ValueError, match="hidden has H = 8"):
        liger_fused_linear_logprobs(hidden, weight[:, :3], target)


@pytest.mark.parametrize("asked", [(False, False, False), (True, True, True)])
def test_custom_op_passes_opcheck(asked):
    from liger_kernel.ops.head_compile import logprobs_op

    hidden, weight, target = problem()
    needs = [True, True, True]
    arguments = (hidden.reshape(-1, 8).detach().requires_grad_(), weight, target.reshape(-1),
                 torch.randn(21, requires_grad=True), torch.tensor(0.5), None, -100, 4.0, list(asked),
                 needs, torch.float32, 600)  # fmt: skip
    torch.library.opcheck(logprobs_op, arguments)


def test_a_schedule_of_temperatures_compiles_once_more_at_most():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def call(hidden, weight, target, temperature):
        outputs = liger_fused_linear_logprobs(hidden, weight, target, return_entropy=True, temperature=temperature)
        return outputs.log_prob + outputs.entropy

    step, counts = torch.compile(call, backend=counter, fullgraph=True), []
    for i in range(5):
        hidden, weight, target = problem()
        ours, truth = (f(hidden, weight, target, 0.5 + 0.1 * i) for f in (step, call))
        torch.testing.assert_close(ours, truth)
        for a, b in zip(*(torch.autograd.grad(v.sum(), (hidden, weight)) for v in (ours, truth))):
            torch.testing.assert_close(a, b)
        counts.append(counter.frame_count)
    assert counts[1] == counts[-1], counts
