"""What is special about the per-token outputs of the head; that they equal their reference is in test_contract.py."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction
from liger_kernel.transformers.functional import liger_fused_linear_logprobs


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
