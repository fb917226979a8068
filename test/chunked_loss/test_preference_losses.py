"""ORPO, CPO, SimPO and KTO against their formulas on whole logits, in fp64; what all preference losses share."""

import pytest
import torch

from liger_kernel import chunked_loss
from liger_kernel.chunked_loss.fused_linear_preference import LigerFusedLinearPreferenceBase
from liger_kernel.chunked_loss.fused_linear_unpaired_preference import LigerFusedLinearUnpairedPreferenceBase

from support_losses import BUDGETS, assert_as_good_as_torch, assert_same, outcome, token_logps


def log_sigmoid(x):
    return -torch.log1p(torch.exp(-x))


def paired(loss, kind, average):
    """The formula of a loss of pairs from that of its sequences' log-probabilities."""

    def make(ignore_index=-100, beta=0.1, alpha=1.0, label_smoothing=0.0, compute_nll_loss=True, gamma=0.5,
             average_log_prob=average, softcap=None, logit_scale=1.0, compiled=True, chunk_size=1):  # fmt: skip
        def run(hidden, weight, bias, target, nll_target=None):
            live, processing = target != ignore_index, dict(softcap=softcap, logit_scale=logit_scale)
            tokens, z = token_logps(hidden, weight, bias, target, live, **processing)
            chosen, rejected = (tokens.sum(-1) / (live.sum(-1).clamp(min=1) if average_log_prob else 1)).chunk(2)
            value, *aux = loss(chosen, rejected, beta, gamma, label_smoothing)
            labels = target if nll_target is None else nll_target
            labels = labels[: len(chosen)]
            counted = labels != ignore_index
            half = hidden[: len(chosen)]
            nll = -token_logps(half, weight, bias, labels, counted, **processing)[0].sum() / counted.sum()
            nll = nll if compute_nll_loss else torch.zeros_like(nll)
            means = [h.mean(-1)[m].mean() for h, m in zip(z.chunk(2), live.chunk(2), strict=True)]
            return value + alpha * nll, (chosen, rejected, *means, nll, beta * chosen, beta * rejected, *aux)

        return run

    return kind, make


def orpo(chosen, rejected, beta, gamma, e):
    odds = (chosen - rejected) - (torch.log(1 - chosen.exp()) - torch.log(1 - rejected.exp()))
    return -beta * log_sigmoid(odds).mean(), log_sigmoid(odds).mean(), odds.mean()


def cpo(chosen, rejected, beta, gamma, e):
    d = beta * (chosen - rejected)
    return ((1 - e) * -log_sigmoid(d) - e * log_sigmoid(-d)).mean(), *()


def simpo(chosen, rejected, beta, gamma, e):
    d = beta * (chosen - rejected - gamma / beta)
    return ((1 - e) * -log_sigmoid(d) - e * log_sigmoid(-d)).mean(), *()


def kto(ignore_index=-100, beta=0.1, use_ref_model=False, average_log_prob=False, desirable_weight=1.0,
        undesirable_weight=1.0, softcap=None, logit_scale=1.0, compiled=True, chunk_size=1):  # fmt: skip
    def run(hidden, weight, bias, target, labels, ref_hidden=None, ref_weight=None, ref_bias=None, kl=None):
        live, processing = target != ignore_index, dict(softcap=softcap, logit_scale=logit_scale)

        def logps(*head):
            tokens, z = token_logps(*head, target, live, **processing)
            return tokens.sum(-1) / (live.sum(-1).clamp(min=1) if average_log_prob else 1), z

        logps_now, z = logps(hidden, weight, bias)
        gap = logps_now - (0 if ref_hidden is None else logps(ref_hidden, ref_weight, ref_bias)[0])
        centred = beta * (gap - (0 if kl is None else kl))
        good = desirable_weight * (1 - torch.sigmoid(centred[labels]))
        bad = undesirable_weight * (1 - torch.sigmoid(-centred[~labels]))
        logits = (z.sum(-1) * live).sum(-1)
        values = (logps_now, logits, beta * gap)
        return torch.cat((good, bad)).mean(), tuple(v[m].sum() for v in values for m in (labels, ~labels))

    return run


KINDS = dict([
    paired(orpo, "ORPO", True), paired(cpo, "CPO", False), paired(simpo, "SimPO", True), ("KTO", kto),
])  # fmt: skip


def fused(kind, **options):
    loss = getattr(chunked_loss, f"LigerFusedLinear{kind}Loss")(**options)
    if kind == "KTO":
        return lambda hidden, weight, bias, target, labels, ref_hidden=None, ref_weight=None, ref_bias=None, kl=None: (
            loss(hidden, weight, target, bias, labels, ref_hidden, ref_weight, ref_bias, kl)
        )
    return lambda hidden, weight, bias, target, **more: loss(weight, hidden, target, bias, **more)


def case(kind, device, rows=6):
    target = torch.randint(4, 101, (rows, 7)).to(device)
    target[:, :2], target[1, 5:] = -100, -100
    made = dict(hidden=(rows, 7, 16), weight=(101, 16), bias=(101,))
    if kind == "KTO":
        made |= dict(ref_hidden=(rows, 7, 8), ref_weight=(101, 8), ref_bias=(101,))
    given = {name: torch.randn(shape).to(device) for name, shape in made.items()} | {"target": target}
    if kind == "KTO":
        given |= {"labels": torch.arange(rows, device=device) % 3 == 0, "kl": torch.tensor(0.3, device=device)}
    return given


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_loss(kind, budget, device, monkeypatch):
    monkeypatch.setenv("LIGER_KERNEL_WORKSPACE_MB", BUDGETS[budget])
    assert_same(fused(kind), KINDS[kind](), case(kind, device))


OPTIONS = {
    "ORPO": [dict(compute_nll_loss=False)],
    "CPO": [dict(compute_nll_loss=False), dict(alpha=0.3), dict(label_smoothing=0.2), dict(average_log_prob=True)],
    "SimPO": [dict(compute_nll_loss=False), dict(alpha=0.3), dict(label_smoothing=0.2), dict(gamma=1.5)],
    "KTO": [dict(average_log_prob=True), dict(desirable_weight=0.3), dict(undesirable_weight=1.6)],
}
SHARED = [dict(ignore_index=3), dict(beta=0.7), dict(softcap=2.0), dict(logit_scale=0.3)]


@pytest.mark.parametrize("kind, option", [(k, o) for k, own in OPTIONS.items() for o in own + SHARED], ids=str)
def test_every_option_changes_the_loss_as_it_changes_the_formula(kind, option, device):
    given = case(kind, device)
    if "ignore_index" in option:
        given["target"] = given["target"].where(given["target"] >= 0, 3)
    assert_same(fused(kind, **option), KINDS[kind](**option), given)
    if "ignore_index" not in option:
        before, after = KINDS[kind]()(**given)[0], KINDS[kind](**option)(**given)[0]
        assert (before - after).abs() > 1e-4, "this case does not show the option"


@pytest.mark.parametrize("budget", BUDGETS)
def test_orpo_takes_the_nll_over_labels_of_its_own(budget, device, monkeypatch):
    monkeypatch.setenv("LIGER_KERNEL_WORKSPACE_MB", BUDGETS[budget])
    given = case("ORPO", device)
    labels = given["target"].where(given["target"] >= 0, 9)  # the prompt counts
    labels[0, 6] = -100  # and a token of the completion does not
    for nll_target in (labels, labels[:3]):
        assert_same(fused("ORPO"), KINDS["ORPO"](), given | {"nll_target": nll_target})
    if device.type == "cpu":
        labels[0, 5] = (given["target"][0, 5] + 1) % 101
        with pytest.raises(ValueError, match="different labels"):
            fused("ORPO")(**given, nll_target=labels)


@pytest.mark.parametrize("absent", ["ref_hidden", "kl"])
def test_kto_without_a_reference_or_a_kl(absent, device):
    given = case("KTO", device)
    for name in [n for n in given if n.startswith(absent[:3]) and n != "labels"] if absent != "kl" else ["kl"]:
        del given[name]
    assert_same(fused("KTO"), kto(), given)


def test_kto_uses_the_reference_it_is_given_though_use_ref_model_is_false(device):
    """A trainer with an adapter has no reference model, and passes the states without the adapter."""
    given = case("KTO", device)
    without = {k: v for k, v in given.items() if not k.startswith("ref_")}
    assert fused("KTO", use_ref_model=False)(**given)[0] != fused("KTO", use_ref_model=False)(**without)[0]
    with pytest.raises(ValueError, match="ref_input"):
        fused("KTO", use_ref_model=True)(**without)


@pytest.mark.parametrize("labels", [[True] * 6, [False] * 6])
def test_kto_with_one_kind_of_sequences(labels, device):
    given = case("KTO", device)
    listed = {**given, "labels": labels}  # a list, as a trainer's batch may have it
    given["labels"] = torch.tensor(labels, device=device)
    ours, truth = fused("KTO")(**listed), kto()(**given)
    torch.testing.assert_close(ours[0], truth[0])
    for a, b in zip(ours[1], truth[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_tokens_sequences_and_batches(kind, device):
    """A sequence of one token, one of none, and a batch of nothing but masks: finite, and as the formula."""
    given = case(kind, device)
    given["target"][0, :6] = -100
    assert_same(fused(kind), KINDS[kind](), given)
    given["target"][4] = -100
    if kind != "ORPO":  # the odds of an empty sequence, whose probability is 1, are infinite
        assert_same(fused(kind), KINDS[kind](), given)
    loss, _, grads = outcome(fused(kind), given, torch.float32)
    assert loss.isfinite() and all(g.isfinite().all() for g in grads)
    given["target"][:] = -100
    loss, _, grads = outcome(fused(kind), given, torch.float32)
    assert loss.isfinite() and not any(g.any() for g in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_sixteen_bits_as_good_as_torch(kind, dtype, device):
    given = case(kind, device)
    given = {k: v.to(dtype) if v.is_floating_point() and k != "kl" else v for k, v in given.items()}
    assert_as_good_as_torch(fused(kind), KINDS[kind](), given, dtype)


def test_gradients_of_what_needs_none_are_not_made(device):
    given = case("CPO", device)
    for frozen in ("hidden", "weight", "bias"):
        leaves = {k: v.clone().requires_grad_(v.is_floating_point() and k != frozen) for k, v in given.items()}
        loss, _ = fused("CPO")(**leaves)
        loss.backward()
        assert leaves[frozen].grad is None
        assert all(leaves[k].grad is not None for k in ("hidden", "weight", "bias") if k != frozen)
    with torch.no_grad():
        assert not fused("CPO")(**given)[0].requires_grad


def test_a_second_backward_says_why_it_cannot(device):
    given = {k: v.requires_grad_(v.is_floating_point()) for k, v in case("CPO", device).items()}
    loss, _ = fused("CPO")(**given)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_a_subclass_with_a_loss_of_its_own(device):
    """As upstream's classes are subclassed: the hook, and forward as a classmethod over the base's."""

    class Hinge(LigerFusedLinearPreferenceBase):
        @staticmethod
        def preference_loss_fn(chosen_logps, rejected_logps, full_target, beta=0.1, margin=1.0):
            return torch.relu(margin - beta * (chosen_logps - rejected_logps)).sum() / (full_target.shape[0] // 2)

        @classmethod
        def forward(cls, ctx, _input, weight, target, bias=None, margin=1.0):
            return super().forward(
                cls=cls, ctx=ctx, _input=_input, weight=weight, target=target, bias=bias, compute_nll_loss=False,
                average_log_prob=False, margin=margin,
            )  # fmt: skip

        @staticmethod
        def backward(ctx, *grad_output):
            return *LigerFusedLinearPreferenceBase.backward(ctx, grad_output)[:4], None

    def formula(hidden, weight, bias, target):
        tokens, z = token_logps(hidden, weight, bias, target, target != -100)
        chosen, rejected = tokens.sum(-1).chunk(2)
        means = [h.mean(-1)[m].mean() for h, m in zip(z.chunk(2), (target != -100).chunk(2), strict=True)]
        loss = torch.relu(2.0 - 0.1 * (chosen - rejected)).mean()
        return loss, (chosen, rejected, *means, torch.zeros_like(loss))

    def run(hidden, weight, bias, target):
        return Hinge.apply(hidden, weight, target, bias, 2.0)

    assert_same(run, formula, case("CPO", device))


def test_a_subclass_of_unpaired_sequences(device):
    class Logistic(LigerFusedLinearUnpairedPreferenceBase):
        @staticmethod
        def preference_loss_fn(log_prob_chunk, preference_labels_chunk, full_target, ref_log_prob_chunk=None, beta=0.1):
            sign = torch.where(preference_labels_chunk, 1.0, -1.0)
            gap = log_prob_chunk - ref_log_prob_chunk
            return -torch.nn.functional.logsigmoid(beta * sign * gap).sum() / full_target.shape[0], gap.detach().sum()

        @classmethod
        def forward(cls, ctx, _input, weight, target, preference_labels, bias, ref_input, ref_weight, ref_bias, beta):
            return super().forward(
                cls=cls, ctx=ctx, _input=_input, weight=weight, target=target, preference_labels=preference_labels,
                bias=bias, use_ref_model=True, ref_input=ref_input, ref_weight=ref_weight, ref_bias=ref_bias, beta=beta,
            )  # fmt: skip

        @staticmethod
        def backward(ctx, *grad_output):
            return *LigerFusedLinearUnpairedPreferenceBase.backward(ctx, grad_output)[:5], *[None] * 4

    def formula(hidden, weight, bias, target, labels, ref_hidden, ref_weight, ref_bias):
        live = target != -100
        tokens, z = token_logps(hidden, weight, bias, target, live)
        logps, ref = tokens.sum(-1), token_logps(ref_hidden, ref_weight, ref_bias, target, live)[0].sum(-1)
        sign, logits = torch.where(labels, 1.0, -1.0), (z.sum(-1) * live).sum(-1)
        loss = -log_sigmoid(0.3 * sign * (logps - ref)).mean()
        return loss, (*(v[m].sum() for v in (logps, logits) for m in (labels, ~labels)), (logps - ref).sum())

    def run(hidden, weight, bias, target, labels, ref_hidden, ref_weight, ref_bias):
        return Logistic.apply(hidden, weight, target, labels, bias, ref_hidden, ref_weight, ref_bias, 0.3)

    given = case("KTO", device)
    del given["kl"]
    assert_same(run, formula, given)
