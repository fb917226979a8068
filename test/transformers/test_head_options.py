"""The options of the fused head together, two and more at a time, against torch's own functions in fp64."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from liger_kernel.ops import fused_linear_cross_entropy as room
from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as fused
from liger_kernel.transformers.functional import liger_fused_linear_logprobs as logprobs

from support_head import low_rank_term, pairwise, problem

VALUES = dict(
    bias=(False, True), ce_weight=(False, True), lse_square_scale=(0.0, 1e-2), label_smoothing=(0.0, 0.1),
    reduction=("mean", "sum", "none"), softcap=(None, 4.0), use_token_scaling=(False, True),
    logit_scale=(1.0, 0.3, "tensor"), temperature=(1.0, 0.6, "tensor"), token_weight=(False, True),
    normalizer=(None, 7, "tensor"), ignore_index=(-100, 2), asked=(False, True), workspace_bytes=(1, 600, None),
    accum_dtype=(None, torch.float32), vocab_slice=(None, (0, 20), (3, 19)), low_rank=(False, True),
)  # fmt: skip
# of a difference between sums of nine rows and 21 classes: (loss, gradients)
SLACK = {torch.float32: (2e-5, 1e-4), torch.float64: (1e-13, 1e-12)}


def allowed(row):
    return not (row["reduction"] == "none" and row["normalizer"] is not None)


def torch_loss(x, weight, target, bias, low_rank, row):
    """The loss in nothing but torch's own functions, and the logits after scale, cap and temperature."""
    part = slice(*row["vocab_slice"]) if row["vocab_slice"] else slice(None)
    z = F.linear(x, weight[part], None if bias is None else bias[part])
    if low_rank is not None:
        z = z + F.linear(low_rank[0], low_rank[1][part])
    z = z * row["logit_scale"]
    if row["softcap"] is not None:
        z = row["softcap"] * torch.tanh(z / row["softcap"])
    z = z / row["temperature"]
    live = target != row["ignore_index"]
    y, class_weight = target.where(live, 0), row["ce_weight"]
    ce = F.cross_entropy(z, y, class_weight, reduction="none", label_smoothing=row["label_smoothing"])
    z_loss = row["lse_square_scale"] * z.logsumexp(-1).square()
    factor = live.double()
    if row["use_token_scaling"]:
        factor = factor * z.softmax(-1).gather(1, y[:, None]).squeeze(1).detach()
    if row["token_weight"] is not None:
        factor = factor * row["token_weight"]
    if row["reduction"] == "none":
        return factor * (ce + z_loss), z
    if row["normalizer"] is not None:
        return (factor * (ce + z_loss)).sum() / 7, z
    if row["reduction"] == "sum":
        return (factor * (ce + z_loss)).sum(), z
    count = live.sum()
    weights = count if class_weight is None else (class_weight[y] * live).sum()
    return (factor * ce).sum() / weights + (factor * z_loss).sum() / count, z


def check_row(row, dtype, device):
    x, weight, target, b = problem(dtype=dtype, device=device, bias=row["bias"])
    low_rank = low_rank_term(dtype=dtype, device=device) if row["low_rank"] else None
    low, high = row["vocab_slice"] or (0, 21)
    target = target.where(target == -100, target % (high - low)).where(target != -100, row["ignore_index"])
    given = {k: v for k, v in row.items() if k not in ("bias", "low_rank", "asked")}
    given["ce_weight"] = torch.rand(high - low, device=device).to(dtype) + 0.1 if row["ce_weight"] else None
    given["token_weight"] = torch.rand(9, device=device).to(dtype) if row["token_weight"] else None
    on_device = dict(logit_scale=torch.tensor(0.3, dtype=dtype), temperature=torch.tensor(0.6, dtype=dtype),
                     normalizer=torch.tensor(7))  # fmt: skip
    given |= {k: v.to(device) for k, v in on_device.items() if row[k] == "tensor"}
    if row["accum_dtype"] is not None:
        given["accum_dtype"] = dtype
    asked = dict.fromkeys(("return_z_loss", "return_token_accuracy", "return_predicted_tokens", "return_entropy"), True)
    ours = fused(x, weight, target, b, low_rank=low_rank, **given, **(asked if row["asked"] else {}))

    leaves = [t for t in (x, weight, b, *(low_rank or ())) if t is not None]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    given |= {k: v.double() for k, v in given.items() if isinstance(v, torch.Tensor)}
    wide_b = wide[2] if row["bias"] else None
    truth, z = torch_loss(wide[0], wide[1], target, wide_b, wide[-2:] if low_rank else None, given)
    slack, slack_of_gradients = SLACK[dtype]
    if row["asked"]:
        live, log_p = target != row["ignore_index"], z.log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1) * live
        torch.testing.assert_close(ours.entropy.double(), entropy, rtol=slack, atol=slack)
        assert torch.equal(ours.predicted_tokens, z.argmax(-1).where(live, -1))
        torch.testing.assert_close(
            ours.token_accuracy.double(), (z.argmax(-1) == target)[live].double().mean(), rtol=1e-6, atol=0
        )  # a quotient in fp32
        without = {**given, "lse_square_scale": 0.0}
        z_loss = truth - torch_loss(wide[0], wide[1], target, wide_b, wide[-2:] if low_rank else None, without)[0]
        torch.testing.assert_close(ours.z_loss.double(), z_loss.detach(), rtol=slack, atol=slack)
        ours = ours.loss
    torch.testing.assert_close(ours.double(), truth, rtol=slack, atol=slack)
    upstream = torch.randn_like(truth)
    for got, expected in zip(
        torch.autograd.grad(ours, leaves, upstream.to(ours)), torch.autograd.grad(truth, wide, upstream), strict=True
    ):
        torch.testing.assert_close(got.double(), expected, rtol=slack_of_gradients, atol=slack_of_gradients / 5)


@pytest.mark.parametrize("row", pairwise(VALUES, allowed), ids=lambda row: "-".join(str(v) for v in row.values()))
@pytest.mark.parametrize("dtype", SLACK)
def test_options_go_together(row, dtype, impl, device):
    check_row(row, dtype, device)


def test_everything_that_weighs_the_tokens_goes_together(device):
    """z-loss and cross entropy have divisors of their own, which only three options together tell apart."""
    weighing = ("ce_weight", "lse_square_scale", "label_smoothing", "reduction", "use_token_scaling", "token_weight",
                "normalizer")  # fmt: skip
    for chosen in itertools.product(*(VALUES[name] for name in weighing)):
        row = {name: values[0] for name, values in VALUES.items()} | dict(zip(weighing, chosen))
        if allowed(row):
            check_row(row, torch.float64, device)


# Options that leave the choice of plain torch, see SMALL.
BESIDE_PLAIN = ("lse_square_scale", "use_token_scaling", "token_weight", "asked", "low_rank", "workspace_bytes")
PLAIN = {k: (VALUES[k][-1] if k == "workspace_bytes" else VALUES[k][0],) if k in BESIDE_PLAIN else v
         for k, v in VALUES.items()}  # fmt: skip


@pytest.mark.parametrize("row", pairwise(PLAIN, allowed), ids=lambda row: "-".join(str(v) for v in row.values()))
@pytest.mark.parametrize("dtype", SLACK)
def test_options_go_together_in_plain_torch(row, dtype, monkeypatch):
    monkeypatch.setattr(room, "SMALL", 9 * 21)
    monkeypatch.setattr(room.LigerFusedLinearCrossEntropyFunction, "apply", lambda *args: pytest.fail("the engine ran"))
    check_row(row, dtype, torch.device("cpu"))


OF_LOGPROBS = dict(
    bias=(False, True), temperature=(1.0, 0.6, "tensor"), logit_scale=(1.0, 0.3, "tensor"), softcap=(None, 4.0),
    ignore_index=(-100, 2), return_entropy=(False, True), return_predicted=(False, True),
    workspace_bytes=(1, 600, 1300, None),
)  # fmt: skip


@pytest.mark.parametrize("row", pairwise(OF_LOGPROBS), ids=lambda row: "-".join(str(v) for v in row.values()))
@pytest.mark.parametrize("dtype", SLACK)
def test_options_of_log_probabilities_go_together(row, dtype, impl, device):
    row = dict(row)
    target = torch.randint(0, 21, (9,), device=device)
    target[4] = row["ignore_index"]
    sizes = [(9, 8), (21, 8)] + [(21,)] * row.pop("bias")
    leaves = [torch.randn(s, dtype=dtype, device=device, requires_grad=True) for s in sizes]
    for name, value in (("temperature", 0.6), ("logit_scale", 0.3)):
        if row[name] == "tensor":
            row[name] = torch.tensor(value, dtype=dtype, device=device)
    ours = logprobs(*leaves[:2], target, *leaves[2:], **row)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    z = F.linear(*wide) * row["logit_scale"]
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
