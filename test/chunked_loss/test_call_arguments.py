"""Every argument of every loss's call, by its signature: a change of it changes the loss as it changes the formula.

A new argument of a loss fails here until a case gives it and, where the formula has no name for it, CALLED says which.
"""

import inspect

import pytest
import torch

from chunked_loss import test_distillation_losses as distillation
from chunked_loss import test_dpo_loss as dpo
from chunked_loss import test_every_loss as every
from chunked_loss import test_grpo_loss as grpo
from chunked_loss import test_preference_losses as preference
from liger_kernel import chunked_loss
from liger_kernel.chunked_loss import functional

from support_losses import assert_same, outcome

DISTILLED = {"JSD": "JSD", "CosineSimilarity": "cosine"}
KINDS = ["DPO", "GRPO", *preference.KINDS, *DISTILLED]

# What the formulas call an argument, where it has another name there.
CALLED = {
    "_input": "hidden", "lin_weight": "weight", "student_input": "hidden", "student_weight": "weight",
    "student_bias": "bias", "teacher_input": "teacher_hidden", "true_labels": "target", "ref_input": "ref_hidden",
    "selected_token_ids": "ids", "attention_mask": "mask", "ref_per_token_logps": "ref", "vllm_is_ratio": "vllm",
    "old_per_token_logps": "old", "num_items_in_batch": "items", "preference_labels": "labels",
}  # fmt: skip

# A change that raises: where the formula has no value, and on a CPU labels that contradict each other.
REFUSED = {
    **{(kind, "ref_input", "none"): "ref_input" for kind in ("DPO", "GRPO")},
    **{(kind, "ref_weight", "none"): "ref_weight" for kind in ("DPO", "GRPO", "KTO")},
    ("DPO", "ref_chosen_logps", "none"): "ref_chosen_logps",
    ("DPO", "ref_rejected_logps", "none"): "ref_rejected_logps",
    ("GRPO", "ref_per_token_logps", "none"): "ref_input",
    ("KTO", "preference_labels", "none"): "preference_labels",
    ("ORPO", "nll_target", "another label"): "different labels",
}


def loss_of(kind, **options):
    return getattr(chunked_loss, f"LigerFusedLinear{kind}Loss")(
        **({"return_soft_hard_loss": True} if kind in DISTILLED else {}), **options
    )


def arguments(kind):
    """Those of the call, by name."""
    return {n: p for n, p in inspect.signature(type(loss_of(kind)).forward).parameters.items() if n != "self"}


def fused(kind, **options):
    """The loss as a function of what its formula is a function of, each argument passed by the signature's name."""
    loss = loss_of(kind, **options)

    def run(**given):
        value, *metrics = loss(**{name: given.get(CALLED.get(name, name)) for name in arguments(kind)})
        return value, tuple(metrics) if kind in DISTILLED else metrics[0]

    return run


def formula(kind, **options):
    if kind in DISTILLED:
        return distillation.formula(DISTILLED[kind], **options)
    return {"DPO": dpo.formula, "GRPO": grpo.formula, **preference.KINDS}[kind](**options)


def cases(kind, device):
    """What the loss is given; together they give every argument."""
    if kind in preference.KINDS:
        first = preference.case(kind, device)
        prompts = first["target"].where(first["target"] >= 0, 9)
        prompts[0, 6] = -100
        return [first, first | {"nll_target": prompts}] if kind == "ORPO" else [first]
    if kind in DISTILLED:
        return [distillation.given.__wrapped__(device)]
    first = {"DPO": dpo, "GRPO": grpo}[kind].given.__wrapped__(device)
    if kind == "DPO":
        second = {k: v for k, v in first.items() if not k.startswith("ref_")}
        return [first, second | {f"ref_{k}_logps": torch.randn(3, device=device) - 9 for k in ("chosen", "rejected")}]
    first |= {"vllm": torch.rand(4, 7, device=device) + 0.5, "items": 50}
    made = dict(ref_hidden=(4, 7, 8), ref_weight=(101, 8), ref_bias=(101,))
    return [first, first | {"ref": None} | {n: torch.randn(s, device=device) * 0.5 for n, s in made.items()}]


def changes(name, value, may_be_none):
    """(what is done to it, the argument after that)."""
    if may_be_none:
        yield "none", None
    if not isinstance(value, torch.Tensor):
        yield "another number", value + 12
    elif value.is_floating_point():
        yield "other values", value * 1.25 + 0.1
    elif value.dtype is torch.bool:
        yield "the opposite", ~value
    elif name == "attention_mask":
        yield "a token less", value.index_fill(1, torch.tensor([3], device=value.device), 0)
    else:
        labels = value.clone()
        labels[0, 3] = (labels[0, 3] + 1) % 101
        yield "another label", labels
        if (value == -100).any():
            yield "a token less", value.index_fill(1, torch.tensor([3], device=value.device), -100)


def rows():
    """(loss, case, argument, change) for every argument, in the first case that gives it."""
    for kind in KINDS:
        seen = set()
        for i, case in enumerate(cases(kind, torch.device("cpu"))):
            for name, parameter in arguments(kind).items():
                value = case.get(CALLED.get(name, name))
                if value is not None and name not in seen:
                    seen.add(name)
                    yield from ((kind, i, name, what) for what, _ in changes(name, value, parameter.default is None))


@pytest.mark.parametrize("kind", KINDS)
def test_every_argument_of_the_call_is_given_by_a_case_and_changed(kind):
    changed = {name for of, _, name, _ in rows() if of == kind}
    assert arguments(kind).keys() - changed == set(), "give it in cases()"


def test_every_loss_is_here():
    assert {f"LigerFusedLinear{kind}Loss" for kind in KINDS} == {n for n in chunked_loss.__all__ if n.endswith("Loss")}
    assert set(REFUSED) <= {(kind, name, what) for kind, _, name, what in rows()}


def moved(before, after):
    """The largest change of the loss, a metric or a gradient."""
    pairs = zip((before[0], *before[1], *before[2]), (after[0], *after[1], *after[2]))  # a gradient less without a bias
    return max((a - b).abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("kind, i, name, what", list(rows()))
def test_a_changed_argument_changes_the_loss_as_it_changes_the_formula(kind, i, name, what, device):
    given = cases(kind, device)[i]
    called = CALLED.get(name, name)
    changed = given | {called: dict(changes(name, given[called], True))[what]}
    if (kind, name, what) in REFUSED:
        if what != "none" and device.type != "cpu":
            pytest.skip("a GPU is not waited for: the loss is NaN")
        with pytest.raises(ValueError, match=REFUSED[kind, name, what]):
            fused(kind)(**changed)
        return
    assert_same(fused(kind), formula(kind), changed)
    before, after = (outcome(formula(kind), g, torch.float64) for g in (given, changed))
    assert moved(before, after) > 1e-4, "this case does not show the argument"


@pytest.mark.parametrize("kind", KINDS)
def test_the_functional_takes_every_argument_of_the_call_and_of_the_constructor(kind, device):
    """In the order of its signature, and gives the class's bits: for each option and each case."""
    function = getattr(functional, "liger_fused_linear_" + {"CosineSimilarity": "cosine"}.get(kind, kind.lower()))
    taken = [n for n in inspect.signature(function.__self__.forward).parameters if n != "ctx"]
    own = {"weight": "lin_weight"} if "lin_weight" in arguments(kind) else {}
    constructor = {n: p.default for n, p in inspect.signature(type(loss_of(kind)).__init__).parameters.items()}
    options = [{}, *every.EXERCISED[kind]]
    for case in cases(kind, device):
        for option in options:
            if "use_ref_model" in option and "ref_chosen_logps" in case:
                continue  # refused, which a test of its own asks
            if kind == "KTO":
                option = option | {"use_ref_model": True}  # the class looks at what it is given
            called = {name: case.get(CALLED.get(name, name)) for name in arguments(kind)}
            for name in {"target", "nll_target", "true_labels"} & {n for n in called if called[n] is not None}:
                called[name] = called[name].where(called[name] >= 0, option.get("ignore_index", -100))
            values = constructor | {"return_soft_hard_loss": True} | option | called
            found = function(*(values[own.get(name, name)] for name in taken))
            expected = loss_of(kind, **option)(**called)
            for a, b in zip(flat(found), flat(expected), strict=True):
                assert torch.equal(a, b) or (a.isnan() & b.isnan()).all(), option


def flat(value):
    return [value] if isinstance(value, torch.Tensor) else [leaf for part in value for leaf in flat(part)]
