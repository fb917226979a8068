"""What the losses share: an autograd Function over liger_kernel.ops.head_groups, and the checks of its inputs."""

from __future__ import annotations

import torch

from liger_kernel.ops import head, head_groups
from liger_kernel.ops.head_groups import Batch, Outcome
from liger_kernel.ops.row_loss import RECOMPUTED, GradAware, RowLoss, Stats, check_target, taken

IGNORE_INDEX = -100


class HeadLoss(GradAware):
    """A loss over a head, of hidden (B, L, H), weight (V, H) and bias (V,), which stand at PLACES of apply's arguments.

    The gradients are formed in the forward where that is cheaper, so a second backward may raise a RuntimeError.
    """

    PLACES = (0, 1, 3)

    @classmethod
    def solve(cls, ctx, batch: Batch, objective, sides, late=False, fields=()) -> Outcome:
        """The outcome of head_groups.run, which the backward continues."""
        if torch.compiler.is_compiling():
            return traced(batch, objective, sides, fields)
        needs = tuple(ctx.needs_input_grad[place] for place in cls.PLACES)
        ctx.needs = *needs[:2], batch.bias is not None and needs[2]
        outcome = head_groups.run(batch, objective, sides, ctx.needs, late, fields)
        ctx.places, ctx.grads, ctx.name = cls.PLACES, outcome.grads or (), cls.__name__
        if outcome.d_log_prob is not None:
            kept = (getattr(outcome.stats, field) for field in RECOMPUTED)
            ctx.save_for_backward(batch.hidden, batch.weight, batch.bias, batch.target, outcome.d_log_prob, *kept)
            ctx.constants = batch.loss, batch.dtype
        return outcome

    @staticmethod
    def backward(ctx, d_loss, *_):
        while isinstance(d_loss, tuple):  # subclasses written for upstream hand on the tuple they got
            d_loss = d_loss[0]
        found = [None] * len(ctx.needs_input_grad)
        if ctx.saved_tensors:
            *inputs, d_log_prob, nll, top, log_sum = ctx.saved_tensors
            stats = Stats(nll, nll=nll, top=top, log_sum=log_sum)
            grads = head_groups.backward(Batch(*inputs, *ctx.constants), d_log_prob * d_loss, stats, ctx.needs)
        else:
            grads = head.scaled(taken(ctx, ctx.name), d_loss)
        for place, grad in zip(ctx.places, grads):
            found[place] = grad
        return tuple(found)


class Call:
    """function.apply, also in a compiled graph: Dynamo hands no autograd Function to a classmethod; it gets a twin."""

    def __init__(self, function: type[GradAware]):
        members: dict[str, object] = {}
        for base in reversed(function.__mro__[: function.__mro__.index(GradAware)]):
            members |= {name: m for name, m in vars(base).items() if isinstance(m, (staticmethod, classmethod))}
        self.function, self.twin = function, type(function.__name__, (), members | {"__doc__": function.__doc__})

    def __call__(self, *args):
        if torch.compiler.is_compiling():
            return self.twin.forward(Traced(), *args)  # type: ignore[attr-defined]
        return self.function.apply(*args)


class Traced:
    """The ctx of a forward that Dynamo traces."""


def traced(batch: Batch, objective, sides, fields) -> Outcome:
    """The objective as a graph of its own over differentiable log-probabilities, 8 T H V."""
    log_prob, mean = traced_log_probs(batch, fields)
    loss, aux = objective(batch.units(log_prob), **sides)
    return Outcome(loss, aux, batch.units(log_prob), None if mean is None else batch.units(mean))


def traced_log_probs(batch: Batch, fields=()):
    """(B, L) log-probabilities and, on request, the rows' mean logits."""
    from liger_kernel.ops.head_compile import traced_logprobs  # registers ops

    hidden, target = batch.hidden.reshape(-1, batch.hidden.shape[-1]), batch.target.reshape(-1)
    log_prob, *_, mean = traced_logprobs(hidden, batch.weight, target, batch.bias, batch.loss, fields, None)
    return log_prob.view(batch.target.shape), None if mean is None else mean.view(batch.target.shape)


def row_loss(ignore_index=IGNORE_INDEX, softcap=None, logit_scale=1.0, temperature=1.0) -> RowLoss:
    return RowLoss(ignore_index, softcap=softcap, scale=logit_scale, temperature=temperature)


def batch_of(hidden, weight, bias, target, loss: RowLoss, per_unit: int, op: str) -> Batch:
    """ValueError for what does not go together."""
    head.check(hidden, weight, bias, op)
    if hidden.dim() != 3 or target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{op}: expected hidden states (B, L, H) and a target (B, L), got {tuple(hidden.shape)} and "
            f"{tuple(target.shape)}"
        )
    if target.shape[0] % per_unit:
        raise ValueError(f"{op}: a batch of chosen, then rejected sequences is even, got {target.shape[0]}")
    check_target(target.numel(), weight.shape[0], target.reshape(-1), hidden.device, loss, op)
    return Batch(hidden, weight, bias, target, loss, head.product_dtype(hidden), per_unit)


def log_probs_of(hidden, weight, bias, target, loss: RowLoss, op: str) -> torch.Tensor:
    """(B, L) log-probabilities of the targets, 0 where ignored, without gradients: those of a reference model."""
    if hidden is None or weight is None:
        raise ValueError(f"{op}: the reference model needs ref_input and ref_weight")
    batch = batch_of(hidden, weight, bias, target, loss, 1, op)
    if torch.compiler.is_compiling():
        return traced_log_probs(batch)[0].detach()
    # The policy's groups take as much afterwards, and larger products are faster.
    stats = head_groups.row_stats(batch, workspace_bytes=head_groups.budget(batch))
    return stats.loss.neg().view(target.shape)


def detached(value):
    """value, a tensor, number or (nested) tuple of them, cut from the graph."""
    if isinstance(value, tuple):
        return tuple(detached(v) for v in value)
    return value.detach() if isinstance(value, torch.Tensor) else value
