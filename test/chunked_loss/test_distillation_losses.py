"""The distillation losses against their formulas on whole logits, in fp64."""

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from liger_kernel import chunked_loss
from liger_kernel.chunked_loss.fused_linear_distillation import LigerFusedLinearDistillationBase

from support_losses import BUDGETS, assert_as_good_as_torch, assert_close, assert_same, outcome

CLASSES = {"JSD": "LigerFusedLinearJSDLoss", "cosine": "LigerFusedLinearCosineSimilarityLoss"}


def divergence(kind, z, z_p, beta):
    """Of each row of logits."""
    if kind == "cosine":
        return beta * (1 - (z * z_p).sum(-1) / (z.norm(dim=-1) * z_p.norm(dim=-1)))
    q, p = z.softmax(-1), z_p.softmax(-1)
    if beta == 0:
        return (p * (p / q).log()).sum(-1)
    if beta == 1:
        return (q * (q / p).log()).sum(-1)
    m = beta * p + (1 - beta) * q
    return beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)


def formula(kind, weight_hard_loss=0.5, weight_soft_loss=0.5, beta=0.5, ignore_index=-100, temperature=1.0,
            softcap=None, logit_scale=1.0, teacher_softcap=None, teacher_logit_scale=1.0, compiled=True,
            chunk_size=1024, return_soft_hard_loss=True):  # fmt: skip
    def run(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, target):
        live = target != ignore_index

        def logits(hidden, weight, bias, cap, scale):
            z = linear(hidden, weight, bias) * scale
            z = (z if cap is None else cap * torch.tanh(z / cap))[live]
            return z if z.dtype is torch.float64 else z.float()

        z = logits(hidden, weight, bias, softcap, logit_scale)
        z_p = logits(teacher_hidden, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale)
        soft = divergence(kind, z / temperature, z_p / temperature, beta).mean()
        hard = cross_entropy(z, target[live])
        return weight_soft_loss * soft + weight_hard_loss * hard, (soft, hard)

    return run


def fused(kind, **options):
    loss = getattr(chunked_loss, CLASSES[kind])(return_soft_hard_loss=True, **options)

    def run(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, target):
        value, *parts = loss(hidden, weight, teacher_hidden, teacher_weight, target, bias, teacher_bias)
        return value, tuple(parts)

    return run


@pytest.fixture
def given(device):
    """Two sequences of 7 tokens, a teacher of another width, a masked prompt."""
    target = torch.randint(4, 101, (2, 7)).to(device)
    target[:, :2] = -100
    made = dict(hidden=(2, 7, 16), weight=(101, 16), bias=(101,), teacher_hidden=(2, 7, 8), teacher_weight=(101, 8),
                teacher_bias=(101,))  # fmt: skip
    return {name: torch.randn(shape).to(device) for name, shape in made.items()} | {"target": target}


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("kind", CLASSES)
def test_every_loss(kind, budget, given, impl, monkeypatch):
    monkeypatch.setenv("LIGER_KERNEL_WORKSPACE_MB", BUDGETS[budget])
    assert_same(fused(kind), formula(kind), given)


OPTIONS = [
    dict(weight_hard_loss=0.0), dict(weight_soft_loss=0.0), dict(weight_hard_loss=0.2, weight_soft_loss=0.9),
    dict(beta=0.0), dict(beta=1.0), dict(beta=0.1), dict(ignore_index=3), dict(temperature=2.0), dict(softcap=2.0),
    dict(logit_scale=0.3), dict(teacher_softcap=2.0), dict(teacher_logit_scale=0.3),
]  # fmt: skip


@pytest.mark.parametrize("kind, option", [(k, o) for k in CLASSES for o in OPTIONS], ids=str)
def test_every_option_changes_the_loss_as_it_changes_the_formula(kind, option, given):
    if "ignore_index" in option:
        given["target"] = given["target"].where(given["target"] >= 0, 3)
    assert_same(fused(kind, **option), formula(kind, **option), given)
    blind = kind == "cosine" and set(option) <= {"temperature", "logit_scale", "teacher_logit_scale"} - {"logit_scale"}
    if "ignore_index" not in option and not blind:
        before, after = formula(kind)(**given)[0], formula(kind, **option)(**given)[0]
        assert (before - after).abs() > 1e-4, "this case does not show the option"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", CLASSES)
def test_sixteen_bits_as_good_as_torch(kind, dtype, given):
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}
    assert_as_good_as_torch(fused(kind), formula(kind), given, dtype)


def test_attributes_are_read_at_the_call(given):
    """Other projects change them after construction."""
    loss = chunked_loss.LigerFusedLinearJSDLoss(beta=0.3)
    loss.weight_hard_loss, loss.weight_soft_loss, loss.temperature = 0.0, 1.0, 2.0
    ours = loss(given["hidden"], given["weight"], given["teacher_hidden"], given["teacher_weight"], given["target"],
                given["bias"], given["teacher_bias"])  # fmt: skip
    truth = formula("JSD", weight_hard_loss=0.0, weight_soft_loss=1.0, temperature=2.0, beta=0.3)(**given)[0]
    assert_close(ours, truth, "loss")


def test_a_subclass_with_a_loss_of_its_own(given):
    """The hook on logits, forward as a classmethod over the base's, a static backward."""

    class Squares(LigerFusedLinearDistillationBase):
        @staticmethod
        def distillation_loss_fn(student_logits, teacher_logits, target=None, ignore_index=None):
            return (student_logits - teacher_logits).square().sum(-1).where(target != ignore_index, 0.0).sum()

        @classmethod
        def forward(cls, ctx, hidden, weight, teacher_hidden, teacher_weight, target, bias, teacher_bias):
            return super().forward(
                cls=cls, ctx=ctx, student_input=hidden, student_weight=weight, teacher_input=teacher_hidden,
                teacher_weight=teacher_weight, target=target, student_bias=bias, teacher_bias=teacher_bias,
                weight_hard_loss=0.0, weight_soft_loss=1.0,
            )  # fmt: skip

        @staticmethod
        def backward(ctx, *grad_output):
            return *LigerFusedLinearDistillationBase.backward(ctx, grad_output)[:6], None

    def run(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, target):
        return Squares.apply(hidden, weight, teacher_hidden, teacher_weight, target, bias, teacher_bias), ()

    def plain(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, target):
        gap = linear(hidden, weight, bias) - linear(teacher_hidden, teacher_weight, teacher_bias)
        return gap[target != -100].square().sum(-1).mean(), ()

    assert_same(run, plain, given)


@pytest.mark.parametrize("options", [{}, dict(softcap=2.0, logit_scale=0.3, temperature=2.0)], ids=str)
def test_the_cosines_written_gradient_is_the_one_autograd_takes_of_its_hook(options, given):
    """Also of logits that are all 0, which have no angle."""
    given["bias"] = torch.zeros_like(given["bias"])
    given["hidden"][1, 3] = 0.0
    ours = chunked_loss.LigerFusedLinearCosineSimilarityLoss(return_soft_hard_loss=True, **options)

    class Other(chunked_loss.cosine_similarity_loss.LigerFusedLinearCosineSimilarityFunction):
        @staticmethod
        def distillation_loss_fn(*args, **kwargs):
            return super(Other, Other).distillation_loss_fn(*args, **kwargs)

    def hook(hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, target):
        value, *parts = Other.apply(hidden, weight, teacher_hidden, teacher_weight, target, bias, teacher_bias, 0.5,
                                    0.5, 0.5, -100, ours.temperature, True, 1024, True, ours.softcap,
                                    ours.logit_scale)  # fmt: skip
        return value, tuple(parts)

    found = outcome(fused("cosine", **options), given, torch.float64)
    autograds = outcome(hook, given, torch.float64)
    for a, b in zip((found[0], *found[1], *found[2]), (autograds[0], *autograds[1], *autograds[2]), strict=True):
        assert_close(a, b, "fp64", rtol=1e-12)  # some thousand roundings of fp64, of the largest value


def test_inputs_that_do_not_fit_raise(given):
    for change, word in [
        (dict(teacher_weight=given["teacher_weight"][:50], teacher_bias=None), "classes"),
        (dict(target=given["target"][:, :3]), "target"), (dict(teacher_hidden=given["teacher_hidden"][:, :3]), "rows"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=word):
            fused("JSD")(**(given | change))
    with pytest.raises(ValueError, match="beta"):
        fused("JSD", beta=1.5)
