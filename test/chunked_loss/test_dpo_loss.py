"""Direct preference optimisation against its formulas on whole logits, in fp64."""

import math

import pytest
import torch

from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
from liger_kernel.chunked_loss.dpo_loss import LOSSES

from support_losses import BUDGETS, assert_as_good_as_torch, assert_same, token_logps

SMOOTHING = {"exo_pair": 0.1, "robust": 0.1}


def log_sigmoid(x):
    return -torch.log1p(torch.exp(-x))


def each_loss(kind, a, b, beta, e, tau):
    """By the log-ratios a and b of the chosen and the rejected, straight from the papers."""
    d = a - b
    s = torch.sigmoid
    if kind == "sigmoid":
        return -(1 - e) * log_sigmoid(beta * d) - e * log_sigmoid(-beta * d)
    if kind == "hinge":
        return (1 - beta * d).clamp(min=0)
    if kind == "ipo":
        return (d - 1 / (2 * beta)) ** 2
    if kind == "exo_pair":
        p = s(beta * d)
        return p * (p.log() - math.log(1 - e)) + (1 - p) * ((1 - p).log() - math.log(e))
    if kind == "nca_pair":
        return -log_sigmoid(beta * a) - 0.5 * log_sigmoid(-beta * a) - 0.5 * log_sigmoid(-beta * b)
    if kind == "robust":
        return (-(1 - e) * log_sigmoid(beta * d) + e * log_sigmoid(-beta * d)) / (1 - 2 * e)
    if kind == "bco_pair":
        shift = (beta * (a.sum() + b.sum()) / (2 * len(a))).detach()
        return -log_sigmoid(beta * a - shift) - log_sigmoid(-(beta * b - shift))
    if kind == "sppo_hard":
        return (a - 0.5 / beta) ** 2 + (b + 0.5 / beta) ** 2
    if kind == "apo_zero":
        return 1 - s(beta * a) + s(beta * b)
    if kind == "apo_down":
        return s(beta * a) + 1 - s(beta * d)
    assert kind == "discopop"
    gate = s(beta * d / tau)
    return -log_sigmoid(beta * d) * (1 - gate) + torch.exp(-beta * d) * gate


def formula(loss_type="sigmoid", beta=0.1, label_smoothing=0.0, discopop_tau=0.05, average_log_prob=False,
            use_ref_model=True, compute_nll_loss=False, alpha=1.0, ignore_index=-100, softcap=None, logit_scale=1.0,
            compiled=True, chunk_size=1):  # fmt: skip
    def run(hidden, weight, bias, target, ref_hidden=None, ref_weight=None, ref_bias=None, ref_chosen_logps=None,
            ref_rejected_logps=None):  # fmt: skip
        live, processing = target != ignore_index, dict(softcap=softcap, logit_scale=logit_scale)
        average = average_log_prob or loss_type == "ipo"

        def of_sequences(tokens):
            return tokens.sum(-1) / (live.sum(-1).clamp(min=1) if average else 1)

        tokens, z = token_logps(hidden, weight, bias, target, live, **processing)
        chosen, rejected = of_sequences(tokens).chunk(2)
        ref = torch.zeros_like(chosen), torch.zeros_like(rejected)
        if ref_chosen_logps is not None:
            ref = ref_chosen_logps, ref_rejected_logps
        elif use_ref_model:
            ref = of_sequences(token_logps(ref_hidden, ref_weight, ref_bias, target, live, **processing)[0]).chunk(2)
        a, b = chosen - ref[0], rejected - ref[1]
        loss = each_loss(loss_type, a, b, beta, label_smoothing, discopop_tau).mean()
        nll = torch.zeros_like(loss)
        if compute_nll_loss:
            nll = -tokens.chunk(2)[0].sum() / live.chunk(2)[0].sum()
        means = [half.mean(-1)[mask].mean() for half, mask in zip(z.chunk(2), live.chunk(2), strict=True)]
        return loss + alpha * nll, (chosen, rejected, *means, nll, beta * a, beta * b)

    return run


def fused(**options):
    loss = LigerFusedLinearDPOLoss(**options)

    def run(hidden, weight, bias, target, ref_hidden=None, ref_weight=None, ref_bias=None, **more):
        return loss(weight, hidden, target, bias, ref_hidden, ref_weight, ref_bias, **more)

    return run


@pytest.fixture
def given(device):
    """Three pairs of 7 tokens, each half of a batch with a masked prompt and masked ends."""
    target = torch.randint(0, 101, (6, 7)).to(device)
    target[:, :2], target[1, 5:] = -100, -100
    made = dict(hidden=(6, 7, 16), weight=(101, 16), bias=(101,), ref_hidden=(6, 7, 8), ref_weight=(101, 8),
                ref_bias=(101,))  # fmt: skip
    return {name: torch.randn(shape).to(device) for name, shape in made.items()} | {"target": target}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_type(loss_type, budget, given, monkeypatch):
    monkeypatch.setenv("LIGER_KERNEL_WORKSPACE_MB", BUDGETS[budget])
    options = dict(loss_type=loss_type, label_smoothing=SMOOTHING.get(loss_type, 0.0))
    assert_same(fused(**options), formula(**options), given)


@pytest.mark.parametrize("budget", BUDGETS)
def test_each_way_through_the_engine_on_each_implementation(budget, given, impl, monkeypatch):
    monkeypatch.setenv("LIGER_KERNEL_WORKSPACE_MB", BUDGETS[budget])
    assert_same(
        fused(), formula(), {k: v[:, -3:] if k in ("hidden", "ref_hidden", "target") else v for k, v in given.items()}
    )


OPTIONS = [
    dict(ignore_index=3), dict(beta=0.7), dict(compute_nll_loss=True), dict(compute_nll_loss=True, alpha=0.3),
    dict(average_log_prob=True), dict(label_smoothing=0.2), dict(use_ref_model=False), dict(softcap=2.0),
    dict(logit_scale=0.3), dict(loss_type="discopop", discopop_tau=0.5), dict(loss_type="robust", label_smoothing=0.3),
]  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_every_option_changes_the_loss_as_it_changes_the_formula(option, given):
    if "ignore_index" in option:
        given["target"] = given["target"].where(given["target"] >= 0, 3)
    assert_same(fused(**option), formula(**option), given)
    plain = {k: v for k, v in option.items() if k == "loss_type"}
    plain |= {"label_smoothing": 0.0} if "robust" in option.values() else {}
    before, after = formula(**plain)(**given)[0], formula(**option)(**given)[0]
    assert (before - after).abs() > 1e-4, "this case does not show the option"


def test_log_probabilities_of_the_reference_in_its_place(given):
    del given["ref_hidden"], given["ref_weight"], given["ref_bias"]
    given |= dict(ref_chosen_logps=torch.randn(3) - 9, ref_rejected_logps=torch.randn(3) - 9)
    given = {k: v.to(given["hidden"].device) for k, v in given.items()}
    assert_same(fused(), formula(), given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_sixteen_bits_as_good_as_torch(loss_type, dtype, given):
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}
    options = dict(loss_type=loss_type, label_smoothing=SMOOTHING.get(loss_type, 0.0), compute_nll_loss=True)
    assert_as_good_as_torch(fused(**options), formula(**options), given, dtype)


def test_options_that_cannot_be_honoured_raise():
    for options, word in [
        (dict(loss_type="kto"), "loss_type"), (dict(loss_type="hinge", label_smoothing=0.1), "label_smoothing"),
        (dict(loss_type="exo_pair"), "label_smoothing"), (dict(loss_type="robust", label_smoothing=0.5), "robust"),
        (dict(label_smoothing=1.5), "label_smoothing"), (dict(discopop_tau=0.0), "discopop_tau"),
        (dict(loss_type="ipo", beta=0.0), "beta"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=word):
            LigerFusedLinearDPOLoss(**options)


def test_inputs_that_do_not_fit_raise(given):
    run = fused()
    for change, word in [
        (dict(hidden=given["hidden"][:5], target=given["target"][:5]), "even"), (dict(ref_hidden=None), "ref_input"),
        (dict(target=given["target"][:, :3]), "target"), (dict(ref_weight=given["weight"]), "reference"),
        (dict(ref_chosen_logps=torch.zeros(3)), "ref_rejected_logps"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=word):
            run(**(given | change))
