"""The policy-gradient losses against their formulas on whole logits, in fp64."""

import math

import pytest
import torch

from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase
from liger_kernel.chunked_loss.grpo_loss import CLIPPED, LOSS_TYPES

from support_losses import BUDGETS, assert_as_good_as_torch, assert_same, outcome, token_logps

MAX_LENGTH = {"dr_grpo": 9}
KINDS = [(kind, "token") for kind in LOSS_TYPES] + [(kind, "sequence") for kind in CLIPPED]


def formula(beta=0.04, epsilon_low=0.2, epsilon_high=0.2, loss_type="dapo", max_completion_length=None,
            importance_sampling_level="token", sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, temperature=1.0,
            delta=None, use_bias_correction_kl=False, vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0,
            vespo_lambda_neg=2.0, softcap=None, logit_scale=1.0, use_ref_model=True):  # fmt: skip
    """A loop over completions, token by token where that is how it is defined."""

    def run(hidden, weight, bias, ids, mask, advantages, old=None, ref=None, ref_hidden=None, ref_weight=None,
            ref_bias=None, vllm=None, items=None):  # fmt: skip
        processing = dict(softcap=softcap, logit_scale=logit_scale, temperature=temperature)
        logps, _ = token_logps(hidden, weight, bias, ids, mask != 0, **processing)
        if ref is None and beta:
            ref, _ = token_logps(ref_hidden, ref_weight, ref_bias, ids, mask != 0, **processing)
        total, kl_sum, clipped, sequences = 0.0, 0.0, [], len(ids)
        n_tokens = int((mask != 0).sum())
        for i in range(sequences):
            live = mask[i] != 0
            logp, length = logps[i][live], int(live.sum())
            if not length:
                clipped += [logp.new_zeros(1)] if importance_sampling_level == "sequence" else []
                continue
            before = logp.detach() if old is None else old[i][live]
            a = advantages[i] if advantages.dim() == 1 else advantages[i][live]
            ratio = torch.exp(logp - before)
            if importance_sampling_level == "sequence":
                ratio = torch.exp((logp - before).mean()).expand(length)
            correction = 1.0 if vllm is None else vllm[i][live] if vllm.shape[1] > 1 else vllm[i]
            if loss_type in CLIPPED:
                capped = ratio if delta is None else torch.clamp(ratio, max=delta)
                each = -torch.minimum(capped * a, torch.clamp(ratio, 1 - epsilon_low, 1 + epsilon_high) * a)
            elif loss_type == "cispo":
                each = -torch.clamp(ratio, max=epsilon_high).detach() * a * logp
            elif loss_type == "sapo":
                t = torch.where(torch.as_tensor(a) > 0, sapo_temperature_pos, sapo_temperature_neg)
                each = -(4 / t) / (1 + torch.exp(-t * (ratio - 1))) * a
            else:
                log_w = (logp - before).clamp(-20, 20).sum()
                if vllm is not None:
                    log_w = log_w + vllm[i][live if vllm.shape[1] > 1 else slice(None)].log().sum()
                w = log_w.clamp(math.log(1e-8), 20).exp().detach()
                k, rate = (vespo_k_pos, vespo_lambda_pos) if a >= 0 else (vespo_k_neg, vespo_lambda_neg)
                each = -(w**k * torch.exp(rate * (1 - w))) * a * logp
                correction = 1.0
            each = each * correction
            high = ratio > (epsilon_high if loss_type == "cispo" else 1 + epsilon_high)
            low = ratio < 1 - epsilon_low if loss_type in CLIPPED else torch.zeros_like(high)
            outside = ((high & (torch.as_tensor(a) > 0)) | (low & (torch.as_tensor(a) < 0))).to(logp.dtype)
            clipped.append(outside[:1] if importance_sampling_level == "sequence" else outside)
            if beta:
                q = ref[i][live] - logp
                kl = torch.exp(q) - q - 1
                kl = kl * ratio if use_bias_correction_kl else kl
                kl_sum, each = kl_sum + kl.sum(), each + beta * kl
            if loss_type in ("grpo", "sapo"):
                total = total + each.mean() / sequences
            elif loss_type == "luspo":
                total = total + each.sum() / sequences
            elif loss_type == "dr_grpo":
                total = total + each.sum() / (sequences * max_completion_length)
            elif loss_type == "bnpo" or items is None:
                total = total + each.sum() / n_tokens
            else:
                total = total + each.sum() / items
        share = torch.cat(clipped).mean() if loss_type not in ("sapo", "vespo") else logps.new_zeros(())
        return total, (*((kl_sum / n_tokens,) if beta else ()), share)

    return run


def fused(**options):
    loss = LigerFusedLinearGRPOLoss(**options)

    def run(hidden, weight, bias, ids, mask, advantages, old=None, ref=None, ref_hidden=None, ref_weight=None,
            ref_bias=None, vllm=None, items=None):  # fmt: skip
        return loss(
            hidden, weight, ids, mask, advantages, bias, ref, old, ref_hidden, ref_weight, ref_bias, vllm, items
        )

    return run


@pytest.fixture
def given(device):
    """Four completions of at most 7 tokens, two of them shorter, old and reference policies not far away."""
    made = dict(hidden=(4, 7, 16), weight=(101, 16), bias=(101,), old=(4, 7), ref=(4, 7))
    given = {name: torch.randn(shape).to(device) * 0.5 for name, shape in made.items()}
    ids = torch.randint(0, 101, (4, 7)).to(device)
    mask = torch.ones_like(ids)
    mask[1, 4:], mask[2, 1:] = 0, 0
    logps, _ = token_logps(given["hidden"], given["weight"], given["bias"], ids, mask != 0)
    for name in ("old", "ref"):
        given[name] = logps - 0.4 * given[name]
    advantages = torch.tensor([1.3, -0.7, 0.4, -1.1], device=device)
    return given | {"ids": ids, "mask": mask, "advantages": advantages}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("kind, level", KINDS)
def test_every_loss_type(kind, level, budget, given, monkeypatch):
    monkeypatch.setenv("LIGER_KERNEL_WORKSPACE_MB", BUDGETS[budget])
    options = dict(loss_type=kind, importance_sampling_level=level, max_completion_length=MAX_LENGTH.get(kind))
    assert_same(fused(**options), formula(**options), given)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_each_way_through_the_engine_on_each_implementation(budget, level, given, impl, monkeypatch):
    monkeypatch.setenv("LIGER_KERNEL_WORKSPACE_MB", BUDGETS[budget])
    options = dict(loss_type="grpo", importance_sampling_level=level)
    assert_same(fused(**options), formula(**options), given)


@pytest.mark.parametrize("budget", BUDGETS)
def test_gradients_left_to_the_backward_as_on_a_gpu(budget, given, impl, monkeypatch):
    from liger_kernel.ops import head_groups

    monkeypatch.setenv("LIGER_KERNEL_WORKSPACE_MB", BUDGETS[budget])
    run = head_groups.run
    monkeypatch.setattr(head_groups, "run", lambda *a, **k: run(*a[:4], True, *a[5:], **k))
    assert_same(fused(), formula(), given)


OPTIONS = [
    dict(beta=0.0), dict(beta=0.5), dict(epsilon_low=0.05), dict(epsilon_high=0.05), dict(temperature=0.7),
    dict(delta=1.1), dict(use_bias_correction_kl=True, beta=2.0), dict(softcap=2.0), dict(logit_scale=0.3),
    dict(loss_type="sapo", sapo_temperature_pos=2.0), dict(loss_type="sapo", sapo_temperature_neg=2.0),
    dict(loss_type="vespo", vespo_k_pos=1.0), dict(loss_type="vespo", vespo_lambda_pos=1.0),
    dict(loss_type="vespo", vespo_k_neg=1.0), dict(loss_type="vespo", vespo_lambda_neg=1.0),
    dict(loss_type="cispo", epsilon_high=1.2), dict(loss_type="dr_grpo", max_completion_length=20),
]  # fmt: skip


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_every_option_changes_the_loss_as_it_changes_the_formula(option, given):
    assert_same(fused(**option), formula(**option), given)
    plain = {k: v for k, v in option.items() if k == "loss_type"}
    plain |= {"max_completion_length": 9} if "dr_grpo" in option.values() else {}
    plain |= {"beta": 2.0} if "use_bias_correction_kl" in option else {}
    before, after = formula(**plain)(**given)[0], formula(**option)(**given)[0]
    assert (before - after).abs() > 1e-4, "this case does not show the option"


@pytest.mark.parametrize(
    "kind, level", [("dapo", "token"), ("vespo", "token"), ("grpo", "sequence"), ("cispo", "token")]
)
@pytest.mark.parametrize(
    "change", ["old", "vllm tokens", "vllm sequences", "items", "items on the device", "advantages"]
)
def test_every_input_changes_the_loss_as_it_changes_the_formula(change, kind, level, given):
    if change == "old":
        given["old"] = None
    elif change == "vllm tokens":
        given["vllm"] = torch.rand(4, 7, device=given["ids"].device) + 0.5
    elif change == "vllm sequences":
        given["vllm"] = torch.rand(4, 1, device=given["ids"].device) + 0.5
    elif change == "items":
        given["items"] = 50
    elif change == "items on the device":
        given["items"] = torch.tensor(50, device=given["ids"].device)
    elif kind != "vespo":  # its weight is that of a sequence's one advantage
        given["advantages"] = torch.randn(4, 7, device=given["ids"].device)
    options = dict(loss_type=kind, importance_sampling_level=level)
    assert_same(fused(**options), formula(**options), given)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_reference_model_in_place_of_its_log_probabilities(level, given):
    device = given["ids"].device
    made = dict(ref_hidden=(4, 7, 8), ref_weight=(101, 8), ref_bias=(101,))
    given |= {"ref": None} | {name: torch.randn(shape).to(device) * 0.5 for name, shape in made.items()}
    options = dict(importance_sampling_level=level, temperature=0.7)
    assert_same(fused(**options), formula(**options), given)
    for change in (dict(use_ref_model=False), {}):
        with pytest.raises(ValueError, match="ref_input"):
            fused(**options, **change)(**(given | {"ref_hidden": None}))


@pytest.mark.parametrize("kind, level", KINDS)
def test_masked_tokens_and_batches(kind, level, given):
    """A completion with no token, garbage under the mask, and a batch of nothing but masks: finite."""
    given["mask"][3] = 0
    for name in ("old", "ref"):
        given[name] = given[name].masked_fill(given["mask"] == 0, 1e9)
    options = dict(loss_type=kind, importance_sampling_level=level, max_completion_length=MAX_LENGTH.get(kind))
    assert_same(fused(**options), formula(**options), given)
    given["mask"][:] = 0
    loss, _, grads = outcome(fused(**options), given, torch.float32)
    assert loss == 0 and not any(g.any() for g in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_sixteen_bits_as_good_as_torch(level, dtype, given):
    """Ratios near 1, where a rounding moves no token across a clip."""
    given["old"] = None
    given = {k: v.to(dtype) if k in ("hidden", "weight", "bias") else v for k, v in given.items()}
    options = dict(importance_sampling_level=level)
    assert_as_good_as_torch(fused(**options), formula(**options), given, dtype, floor=1e-2)


@pytest.mark.parametrize("kind", ["dapo", "cispo"])
def test_any_split_of_the_batch_gives_the_same_gradients(kind, given):
    """Gradient accumulation: with num_items_in_batch the parts add up to the whole."""
    run, tokens = fused(loss_type=kind), int(given["mask"].sum())
    whole = outcome(run, given | {"items": tokens}, torch.float32)
    parts = []
    for rows in (slice(0, 1), slice(1, 4)):
        part = {k: v[rows] if v is not None and k not in ("weight", "bias") else v for k, v in given.items()}
        parts.append(outcome(run, part | {"items": tokens}, torch.float32))
    torch.testing.assert_close(sum(p[0] for p in parts), whole[0])
    torch.testing.assert_close(sum(p[2][1] for p in parts), whole[2][1])


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_subclass_with_a_loss_of_its_own(budget, given, monkeypatch):
    """As upstream's class is subclassed: the hook on completions, forward over the base's, a static backward."""
    monkeypatch.setenv("LIGER_KERNEL_WORKSPACE_MB", BUDGETS[budget])

    class Reinforce(LigerFusedLinearPPOBase):
        @staticmethod
        def ppo_loss_fn(per_token_logps, attention_mask, advantages, full_attention_mask, **options):
            sums = (per_token_logps * attention_mask).sum(-1)
            return -(sums * advantages).sum() / full_attention_mask.shape[0], [sums.detach().sum()]

        @classmethod
        def forward(cls, ctx, _input, weight, selected_token_ids, attention_mask, advantages, bias=None):
            return super().forward(
                cls=cls, ctx=ctx, _input=_input, weight=weight, selected_token_ids=selected_token_ids,
                attention_mask=attention_mask, advantages=advantages, bias=bias, beta=0.0,
            )  # fmt: skip

        @staticmethod
        def backward(ctx, *grad_output):
            return LigerFusedLinearPPOBase.backward(ctx, grad_output)[:6]

    def plain(hidden, weight, bias, ids, mask, advantages):
        sums = token_logps(hidden, weight, bias, ids, mask != 0)[0].sum(-1)
        return -(sums * advantages).mean(), (sums.sum(),)

    def run(hidden, weight, bias, ids, mask, advantages):
        return Reinforce.apply(hidden, weight, ids, mask, advantages, bias)

    assert_same(run, plain, {k: v for k, v in given.items() if k not in ("old", "ref")})


def test_options_that_cannot_be_honoured_raise():
    for options, word in [
        (dict(loss_type="ppo"), "loss_type"), (dict(importance_sampling_level="word"), "importance_sampling_level"),
        (dict(loss_type="cispo", importance_sampling_level="sequence"), "sequence"),
        (dict(loss_type="dr_grpo"), "max_completion_length"), (dict(loss_type="sapo", delta=2.0), "delta"),
        (dict(epsilon_low=-0.1), "epsilon_low"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=word):
            LigerFusedLinearGRPOLoss(**options)
    with pytest.raises(ValueError, match="temperature"):
        LigerFusedLinearGRPOLoss(temperature=0.0)(
            torch.ones(1, 1, 2), torch.ones(3, 2), torch.zeros(1, 1).long(), torch.ones(1, 1), torch.ones(1)
        )
