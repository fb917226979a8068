"""Completions of one token, of none, and batches of neither, of every loss and loss type, against its formula."""

import pytest
import torch

from chunked_loss import test_dpo_loss as dpo
from chunked_loss import test_grpo_loss as grpo
from chunked_loss import test_preference_losses as preference
from chunked_loss.test_call_arguments import DISTILLED, KINDS, cases, formula, fused

from support_losses import BUDGETS, assert_same, outcome, token_logps

PER_TOKEN = {"hidden", "ref_hidden", "teacher_hidden", "target", "nll_target", "ids", "mask", "old", "ref", "vllm"}

LOSSES = [("DPO", dict(loss_type=t, label_smoothing=dpo.SMOOTHING.get(t, 0.0))) for t in dpo.LOSSES]
LOSSES += [("DPO", dict(compute_nll_loss=True, average_log_prob=True))]
LOSSES += [("GRPO", dict(loss_type=t, importance_sampling_level=level, max_completion_length=grpo.MAX_LENGTH.get(t)))
           for t, level in grpo.KINDS]  # fmt: skip
LOSSES += [("CPO", dict(average_log_prob=True)), ("KTO", dict(average_log_prob=True))]
LOSSES += [(kind, {}) for kind in KINDS if kind not in ("DPO", "GRPO")]

# fp32 sums of 131072 and 262144 terms in a product: its square root of roundings is 3e-5, and blocks differ in theirs.
LONG_SUM = 1e-4


def cut(given, columns):
    """The same with these tokens of every sequence."""
    return {k: v[:, columns] if k in PER_TOKEN and v is not None else v for k, v in given.items()}


def labels(given):
    """What masks tokens, by its name, and what it masks them with."""
    return ("mask", 0) if "mask" in given else ("target", -100)


def without(given, dead):
    """The same with the tokens masked where dead, a tensor (B, L)."""
    name, nothing = labels(given)
    return given | {name: given[name].masked_fill(dead.to(given[name].device), nothing)}


@pytest.mark.parametrize("budget", ["one group", "nothing fits"])
@pytest.mark.parametrize("kind, options", LOSSES, ids=str)
def test_sequences_of_one_token(kind, options, budget, device, monkeypatch):
    """Tensors of length 1, then one token left between masks, another in each sequence."""
    monkeypatch.setenv("LIGER_KERNEL_WORKSPACE_MB", BUDGETS[budget])
    for case in cases(kind, device):
        name, nothing = labels(case)
        case[name] = case[name].where(case[name] != nothing, 1 if name == "mask" else 9)
        n, length = case[name].shape
        single = cut(case, slice(2, 3))
        padded = without(case, torch.arange(length)[None, :] != (torch.arange(n)[:, None] * 2 + 1) % length)
        for given in (single, padded):
            assert_same(fused(kind, **options), formula(kind, **options), given)


@pytest.mark.parametrize("budget", ["one group", "nothing fits"])
@pytest.mark.parametrize("kind, options", [(k, o) for k, o in LOSSES if k != "ORPO"], ids=str)
def test_a_sequence_of_no_token_among_others(kind, options, budget, device, monkeypatch):
    """A chosen one, then a rejected one; of GRPO its first, then its last. ORPO's odds of it are infinite."""
    monkeypatch.setenv("LIGER_KERNEL_WORKSPACE_MB", BUDGETS[budget])
    for case in cases(kind, device):
        for row in (0, -1):
            dead = torch.zeros(case[labels(case)[0]].shape, dtype=torch.bool)
            dead[row] = True
            given = without(case, dead)
            assert_same(fused(kind, **options), formula(kind, **options), given)


@pytest.mark.parametrize("kind, options", LOSSES, ids=str)
def test_a_batch_of_no_token_has_a_finite_loss_and_no_gradient(kind, options, device):
    for case in cases(kind, device):
        name, nothing = labels(case)
        for given in (without(case, torch.ones(case[name].shape, dtype=torch.bool)), cut(case, slice(0, 0))):
            if given.get("nll_target") is not None:
                given["nll_target"] = given["target"]
            loss, metrics, grads = outcome(fused(kind, **options), given, torch.float32)
            assert all(value.isfinite().all() for value in (loss, *metrics))
            assert not any(grad.any() for grad in grads)
            if kind in ("GRPO", *DISTILLED):
                assert loss == 0


@pytest.mark.parametrize("kind, options", LOSSES, ids=str)
def test_a_batch_of_no_sequence_has_a_loss_of_zero_and_no_gradient(kind, options, device):
    of_the_heads = {"weight", "bias", "ref_weight", "ref_bias", "teacher_weight", "teacher_bias", "kl", "items"}
    for case in cases(kind, device):
        given = {k: v if k in of_the_heads or v is None else v[:0] for k, v in case.items()}
        loss, metrics, grads = outcome(fused(kind, **options), given, torch.float32)
        assert loss == 0 and all(value.isfinite().all() for value in metrics)
        assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("kind", KINDS)
def test_views_as_trainers_pass_them(kind, device):
    """Hidden states without their last position, labels without their first: contiguous in no dimension."""
    for case in cases(kind, device):
        plain = outcome(fused(kind), case, torch.float32)
        wide = {k: torch.cat((v, v[:, :1]), dim=1) for k, v in case.items() if k in PER_TOKEN and v is not None}
        wide |= {"mask": wide["mask"].bool()} if "mask" in wide else {}
        leaf = wide["hidden"].requires_grad_()
        cut = {k: v[:, :-1] for k, v in wide.items()}
        assert not any(v.is_contiguous() for v in cut.values())
        loss, metrics = fused(kind)(**(case | cut))
        (grad,) = torch.autograd.grad(loss * 1.7, leaf)
        for ours, other in zip((loss.detach(), *metrics), (plain[0], *plain[1]), strict=True):
            torch.testing.assert_close(ours, other)
        torch.testing.assert_close(grad[:, :-1], plain[2][0])
        assert not grad[:, -1].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary_of_262144(kind, device):
    for case in cases(kind, device):
        narrow = cut(case, slice(3, 5))
        for name, value in narrow.items():
            if name.endswith(("weight", "bias")):
                narrow[name] = torch.randn(262144, *value.shape[1:], device=device)
        narrow[("target", "ids")["ids" in narrow]][-1, 0] = 262143
        if "mask" in narrow:  # the policies before are not far from this one
            logps = token_logps(*(narrow[k] for k in ("hidden", "weight", "bias", "ids")), narrow["mask"] != 0)[0]
            narrow["old"] = logps - 0.1
            narrow["ref"] = None if narrow["ref"] is None else logps + 0.1
        assert_same(fused(kind), formula(kind), narrow, rtol=LONG_SUM)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_grpo_over_131072_tokens(level, device, monkeypatch):
    """One completion, in several chunks."""
    monkeypatch.setenv("LIGER_KERNEL_WORKSPACE_MB", "1")
    given = {"hidden": torch.randn(1, 131072, 4), "weight": torch.randn(13, 4), "bias": torch.randn(13)}
    given |= {"ids": torch.randint(0, 13, (1, 131072)), "advantages": torch.tensor([1.3])}
    given["mask"] = torch.ones_like(given["ids"])
    given = {k: v.to(device) for k, v in given.items()}
    given["old"] = token_logps(*(given[k] for k in ("hidden", "weight", "bias", "ids")), given["mask"] != 0)[0]
    given["old"] = given["old"] + 0.1 * torch.randn_like(given["old"])
    options = dict(beta=0.0, importance_sampling_level=level)
    assert_same(fused("GRPO", **options), formula("GRPO", **options), given, rtol=LONG_SUM)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("labels", [[True] * 6, [False] * 6], ids=["all desirable", "none desirable"])
def test_kto_with_sequences_of_one_kind(labels, average, device):
    given = preference.case("KTO", device) | {"labels": torch.tensor(labels, device=device)}
    assert_same(fused("KTO", average_log_prob=average), formula("KTO", average_log_prob=average), given)
