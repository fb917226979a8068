"""What the tests of a split vocabulary run on every rank."""

import torch
from torch import distributed as dist
from torch.nn import functional

from liger_kernel.ops.fused_linear_scaled_cross_entropy import reference
from liger_kernel.ops.vocab_parallel_head import liger_vocab_parallel_logprobs

from support_ranks import rank_device

ROWS, WIDTH = 9, 16
# Of sums over vocabulary and tokens in another order than the truth's: fp32 has 24 bits, some 40 roundings.
SLACK = 40 * 2.0**-24


def _inputs(sizes, confident, ignore_index=-100):
    generator = torch.Generator().manual_seed(3)
    n_classes = sum(sizes)
    hidden = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(n_classes, WIDTH, generator=generator, dtype=torch.float64)
    target = torch.randint(0, n_classes, (ROWS,), generator=generator)
    target[2] = ignore_index
    hidden[:confident] = 4.0 * weight[target[:confident]]  # whose own class gets nearly all of the probability
    first = sum(sizes[: dist.get_rank()])
    part = slice(first, first + sizes[dist.get_rank()])
    return hidden.float(), weight.float(), target, part


def head_errors(sizes, bias=False, ignore_index=-100, **options) -> dict:
    """{output or gradient: (error, limit)} of this rank's fp32 against fp64 on one rank."""
    hidden, weight, target, part = _inputs(sizes, 2, ignore_index)
    b = torch.linspace(-1, 1, weight.shape[0]) if bias else None
    factors = torch.randn(3, ROWS, generator=torch.Generator().manual_seed(4))

    def outcome(run, *given):
        given = [None if x is None else x.clone().requires_grad_() for x in given]
        outputs = run(*given)
        sum((f.to(o) * o).sum() for f, o in zip(factors, outputs)).backward()
        return [o.detach() for o in outputs], [None if x is None else x.grad for x in given]

    def ours(hidden, weight, bias):
        found = liger_vocab_parallel_logprobs(
            hidden, weight, target.to(hidden.device), bias, return_entropy=True, workspace_bytes=1,
            ignore_index=ignore_index, **options,
        )  # fmt: skip
        return found.log_prob, found.lse, found.entropy

    place = rank_device()
    local = (hidden.to(place), weight[part].to(place), None if b is None else b[part].to(place))
    found, grads = outcome(ours, *local)
    wide = (hidden.double(), weight.double(), None if b is None else b.double())
    label = target.masked_fill(target == ignore_index, -100)
    truth, true_grads = outcome(lambda h, w, bias: reference(h, w, bias, label, **options), *wide)
    names = ("log_prob", "lse", "entropy", "d_hidden", "d_weight", "d_bias")
    true_grads = [true_grads[0], true_grads[1][part], None if b is None else true_grads[2][part]]
    return _errors(names, [*found, *grads], [*truth, *true_grads])


def under_upstreams_name(sizes) -> dict:
    """The same of liger-kernel's signature, its arguments by position, without a bias."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyTPFunction as Function
    from liger_kernel.transformers.functional import liger_fused_linear_scaled_cross_entropy_tp

    hidden, weight, target, part = _inputs(sizes, confident=2)
    factors = torch.randn(2, ROWS, generator=torch.Generator().manual_seed(4))

    def outcome(run, *given):
        given = [x.clone().requires_grad_() for x in given]
        outputs = run(*given)
        sum((f.to(o) * o).sum() for f, o in zip(factors, outputs)).backward()
        return [*(o.detach() for o in outputs), *(x.grad for x in given)]

    place = rank_device()
    label, local = target.to(place), (hidden.to(place), weight[part].to(place))
    found = outcome(lambda h, w: Function.apply(h, w, label, dist.group.WORLD, 0.7, -100, 2, True), *local)
    alone = liger_fused_linear_scaled_cross_entropy_tp(*local, label, dist.group.WORLD, 0.7)
    assert torch.equal(alone, found[0])

    def true(h, w):
        log_prob, _, entropy = reference(h, w, None, target, temperature=0.7)
        return -log_prob, entropy

    truth = outcome(true, hidden.double(), weight.double())
    truth[3] = truth[3][part]
    return _errors(("nll", "entropy", "d_hidden", "d_weight"), found, truth)


def logits_errors(sizes, formula, mode, smoothing) -> dict:
    """The same of the loss of logits."""
    from liger_kernel.transformers import LigerVocabParallelCrossEntropy

    hidden, weight, target, part = _inputs(sizes, confident=2)
    whole = (hidden @ weight.t()).double().requires_grad_()
    n_smoothed = sizes[dist.get_rank()] if mode == "partition" else sum(sizes)
    amount = smoothing * n_smoothed / (n_smoothed - 1) if formula == "megatron" and n_smoothed > 1 else smoothing
    log_p = whole.log_softmax(-1)
    nll = functional.nll_loss(log_p, target, reduction="none")
    even = -(log_p[:, part] if mode == "partition" else log_p).mean(-1)
    truth = ((1 - amount) * nll + amount * even).where(target != -100, 0.0) if smoothing else nll
    factor = torch.randn(ROWS, generator=torch.Generator().manual_seed(4))
    (truth * factor.double()).sum().backward()

    x = whole.detach().float()[:, part].to(rank_device()).requires_grad_()
    loss = LigerVocabParallelCrossEntropy(
        label_smoothing=smoothing, label_smoothing_formula=formula, label_smoothing_mode=mode
    )(x, target.to(x.device))
    (loss * factor.to(x.device)).sum().backward()
    return _errors(("loss", "dx"), [loss.detach(), x.grad], [truth.detach(), whole.grad[:, part]])


def _errors(names, found, truth) -> dict:
    errors = {}
    for name, ours, true in zip(names, found, truth, strict=True):
        if true is None or not true.numel():
            assert ours is None or not ours.numel()
            continue
        errors[name] = ((ours.cpu().double() - true).abs().max().item(), SLACK * max(1.0, true.abs().max().item()))
    return errors
