"""A row of logits and its loss: what goes in, what comes out, the torch pair, and the bookkeeping around it.

Shared by cross_entropy and by the fused heads; the mathematics is in liger_kernel.ops.cross_entropy.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from liger_kernel.backends import while_tracing
from liger_kernel.ops.core import Kernels, debug_enabled, kernels, upcast, wide

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class RowLoss:
    """What is computed of a row of logits: the constants of a kernel. Raises ValueError for a value out of range."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    lse_square_scale: float = 0.0
    softcap: float | None = None
    scale: float | torch.Tensor = 1.0  # as a tensor: of one element, on the device of the logits
    temperature: float | torch.Tensor = 1.0
    token_scaling: bool = False  # each token's loss times its detached probability

    def __post_init__(self):
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1], got {self.label_smoothing!r}")
        if self.softcap is not None and not self.softcap > 0.0:
            raise ValueError(f"softcap must be positive or None, got {self.softcap!r}")
        if not isinstance(self.temperature, torch.Tensor) and not self.temperature > 0.0:
            raise ValueError(f"temperature must be positive, got {self.temperature!r}")
        if isinstance(self.ignore_index, bool) or not isinstance(self.ignore_index, int):
            raise ValueError(f"ignore_index must be an int, got {self.ignore_index!r}")

    @property
    def rescales(self) -> bool:
        """Whether scale / temperature is something else than 1; a tensor's value is not asked for."""
        known = not (isinstance(self.scale, torch.Tensor) or isinstance(self.temperature, torch.Tensor))
        return not (known and self.scale == self.temperature)


@dataclass(frozen=True)
class Given:
    """What a row is given: its label, the class weights, and the factors of its loss and of its gradients."""

    target: torch.Tensor
    weight: torch.Tensor | None = None  # (V,)
    weight_sum: torch.Tensor | None = None  # 0-d
    norm: torch.Tensor | None = None  # (2,): 1 / N of the cross entropy, 1 / T of the z-loss; None: 1
    factor: torch.Tensor | None = None  # (R,): times the loss and its gradient
    d_lse: torch.Tensor | None = None  # (R,): gradient that arrives at lse
    d_entropy: torch.Tensor | None = None  # (R,)

    def rows(self, i: int, j: int) -> Given:
        return self.take(slice(i, j))

    def take(self, index) -> Given:
        """The rows that a slice or a tensor of indices picks."""
        cut = {k: v[index] for k in ("target", "factor", "d_lse", "d_entropy") if (v := getattr(self, k)) is not None}
        return dataclasses.replace(self, **cut)


@dataclass(frozen=True)
class Stats:
    """What a row yields, 0 where it is ignored (predicted: -1). What is None is not computed."""

    loss: torch.Tensor
    z_loss: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    # What the gradient of recomputed logits needs: z - lse is (z - top) - log_sum, exact where all logits are large.
    nll: torch.Tensor | None = None
    top: torch.Tensor | None = None  # the largest logit
    log_sum: torch.Tensor | None = None  # lse - top
    entropy: torch.Tensor | None = None
    predicted: torch.Tensor | None = None  # int64
    mean: torch.Tensor | None = None  # of the logits

    def rows(self, i: int, j: int) -> Stats:
        return self.take(slice(i, j))

    def take(self, index) -> Stats:
        """The rows that a slice or a tensor of indices picks."""
        return dataclasses.replace(self, **{f: v[index] for f in FIELDS if (v := getattr(self, f)) is not None})

    def spread(self, index: torch.Tensor, n_rows: int) -> Stats:
        """These rows at their places among n_rows, the others as ignored ones."""
        wide = {}
        for f in FIELDS:
            if (v := getattr(self, f)) is not None:
                wide[f] = v.new_full((n_rows,), -1 if f == "predicted" else 0).index_copy_(0, index, v)
        return dataclasses.replace(self, **wide)


RECOMPUTED = ("nll", "top", "log_sum")
FIELDS = ("loss", "z_loss", "lse", "nll", "top", "log_sum", "entropy", "predicted", "mean")


def empty_stats(n_rows: int, device: torch.device, dtype: torch.dtype, wanted) -> Stats:
    """Room for the loss and for the `wanted` fields of n_rows rows."""

    def make(name):
        return torch.empty(n_rows, device=device, dtype=torch.int64 if name == "predicted" else dtype)

    return Stats(make("loss"), **{name: make(name) for name in wanted})


def logits_of(x, loss: RowLoss):
    """z of the module's mathematics, in fp32."""
    if loss.softcap is None:
        return upcast(x) * (loss.scale / loss.temperature) if loss.rescales else upcast(x)
    return torch.tanh(upcast(x) * (loss.scale / loss.softcap)) * (loss.softcap / loss.temperature)


# Torch pair

TILE = 1 << 19  # elements of a tile: its passes stay in the caches of a CPU core


def _forward(x, given, loss, out, dx):
    step = max(1, TILE // max(x.shape[1], 1))
    if torch.compiler.is_compiling():
        step = max(1, x.shape[0])
    for i in range(0, x.shape[0], step):
        j = min(i + step, x.shape[0])
        _rows(x[i:j], given.rows(i, j), loss, out.rows(i, j), None if dx is None else dx[i:j])


def _rows(x, given, loss, out, dx):
    eps, n_classes = loss.label_smoothing, x.shape[1]
    live = given.target != loss.ignore_index
    inside = (given.target >= 0) & (given.target < n_classes)
    y = given.target.where(inside, 0)[:, None]
    z = logits_of(x, loss)
    slope = None
    if dx is not None and loss.softcap is not None:
        slope = 1 - (z * (loss.temperature / loss.softcap)).square_()
    # Where the exponentials go: the gradient's own memory, or a temporary, but never x unless dx is x.
    room = dx if dx is not None and dx.dtype == z.dtype else None if z is x else z
    top = z.amax(1, keepdim=True).clamp_min_(torch.finfo(z.dtype).min)  # -inf minus -inf is NaN
    z_y = z.gather(1, y)
    if out.predicted is not None:
        out.predicted.copy_(z.argmax(1).where(live, -1))
    if out.mean is not None:
        out.mean.copy_(z.mean(1).where(live, 0.0))
    smooth = None
    if eps:
        lower = z - z_y
        smooth = (lower if given.weight is None else lower.mul_(given.weight.to(z.dtype))).sum(1)
        del lower
    entropic = out.entropy is not None or given.d_entropy is not None
    shifted = z - top if entropic else None
    e = torch.sub(z, top, out=room).exp_() if room is not None else (z - top).exp_()
    moment = (e * shifted).nan_to_num_(nan=0.0).sum(1) if entropic else None  # 0 * -inf of a masked class
    e_y = (z_y - top).exp().squeeze(1)
    e.scatter_(1, y, 0.0)
    others = e.sum(1)
    total = others + e_y
    log_total, lower_y = total.log(), (top - z_y).squeeze(1)
    nll = torch.where(lower_y == 0, others.log1p(), log_total + lower_y)
    lse = log_total + top.squeeze(1)

    keep, spread, f_ce, f_z = factors(given, loss, nll, live, y.squeeze(1), n_classes)
    ce = keep * nll
    if smooth is not None:
        ce = ce + (eps / n_classes) * (spread * nll - smooth)
    z_loss = lse.square() * loss.lse_square_scale
    value = f_ce * ce
    if loss.lse_square_scale:
        value = value + f_z * z_loss
    out.loss.copy_(value.where(inside, float("nan")).where(live, 0.0))
    entropy = log_total - moment / total if entropic else None
    z_loss, top = f_z * z_loss, top.squeeze(1)
    for field, value in zip(FIELDS[1:7], (z_loss, lse, nll, top, log_total, entropy), strict=True):
        if (room_of := getattr(out, field)) is not None:
            room_of.copy_(value.where(live, 0.0))
    if dx is None:
        return

    d_lse = f_z * (2.0 * loss.lse_square_scale) * lse if loss.lse_square_scale else torch.zeros_like(lse)
    if eps:
        d_lse = d_lse + f_ce * (eps / n_classes) * spread
    if given.d_lse is not None:
        d_lse = d_lse + given.d_lse
    d_y = (d_lse * e_y - f_ce * keep * others) / total
    d_p = d_lse + f_ce * keep
    if given.d_entropy is not None:
        d_p = d_p - given.d_entropy * (entropy - log_total)
        d_y = d_y - given.d_entropy * (entropy - nll) * e_y / total
        e.mul_((d_p[:, None] - given.d_entropy[:, None] * shifted.nan_to_num_(neginf=0.0)) / total[:, None])
    else:
        e.mul_((d_p / total)[:, None])
    if eps:
        share = f_ce * (eps / n_classes)
        each = share[:, None] if given.weight is None else share[:, None] * given.weight.to(z.dtype)
        e.sub_(each)
        d_y = d_y - (each if given.weight is None else each.gather(1, y)).squeeze(1)
    e.scatter_(1, y, d_y[:, None])
    if slope is not None:
        e.mul_(slope)
    if loss.rescales:
        e.mul_(loss.scale / loss.temperature)
    e.masked_fill_((live & ~inside)[:, None], float("nan")).masked_fill_(~live[:, None], 0.0)
    if room is not dx:
        dx.copy_(e)


def factors(given, loss, nll, live, y, n_classes):
    """(that of nll in ce, the sum of the class weights, 1 / N and 1 / T with the row's own factor)."""
    keep, spread = 1.0 - loss.label_smoothing, float(n_classes)
    if given.weight is not None:
        keep, spread = keep * given.weight[y].to(nll.dtype), given.weight_sum
    f = live.to(nll.dtype)
    if given.factor is not None:
        f = f * given.factor
    if loss.token_scaling:
        f = f * (-nll).exp()
    return keep, spread, *((f, f) if given.norm is None else (f * given.norm[0], f * given.norm[1]))


def _backward(dx, factor):
    return dx.mul_(factor)


TORCH = Kernels(_forward, _backward)


# Around the rows


class GradAware(torch.autograd.Function):
    """A Function that forms gradients in its forward, and hears there whether anybody will ask for them."""

    @classmethod
    def apply(cls, *args, **kwargs):
        if not torch.is_grad_enabled():  # needs_input_grad does not know
            args = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)
        return super().apply(*args, **kwargs)


def taken(ctx, op: str, remedy: str = ""):
    """What the forward left at ctx.grads, handed out once. Raises RuntimeError the second time."""
    grads, ctx.grads = ctx.grads, None
    if grads is None:
        raise RuntimeError(
            f"{op}: a second backward through the same graph; its gradient was formed in the forward and handed out "
            f"by the first{remedy}"
        )
    return grads


RECOMPUTES = " (reduction='none' recomputes it each time)"  # the remedy of what has that reduction


def is_early(reduction: str, dtype: torch.dtype) -> bool:
    """Whether the gradient is formed in the forward: with reduction="none" its factors are not known there, and in
    fp16 it would underflow before the loss scale arrives."""
    return reduction != "none" and dtype is not torch.float16


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast gives to matrix products on this device, None where it is off."""
    if not _autocasts(device.type) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


@while_tracing
def _autocasts(device_type: str) -> bool:
    """Whether autocast knows this kind of device; for others its state cannot be asked for."""
    return torch.amp.is_autocast_available(device_type)


def rows_of(x):
    return x if x.stride(-1) == 1 or x.shape[1] <= 1 else x.contiguous()


def wanted(z_loss: bool, accuracy: bool, predicted: bool, entropy: bool = False) -> tuple[str, ...]:
    """The fields of Stats that serve these requests."""
    return ("z_loss",) * bool(z_loss) + ("predicted",) * bool(accuracy or predicted) + ("entropy",) * bool(entropy)


def compute(x, given: Given, loss: RowLoss, fields, dx=None) -> Stats:
    """The Stats of the rows of x, and their gradient into dx (which may be x)."""
    stats = empty_stats(x.shape[0], x.device, wide(x.dtype), fields)
    if x.numel():
        kernels("cross_entropy", x).forward(x, given, loss, stats, dx)
    return stats


def prepare(target, loss: RowLoss, like, weight=None, reduction="mean", factor=None, normalizer=None) -> Given:
    """The row inputs for logits like `like`: the normalisers stay on the device. factor: (R,) or None.

    normalizer, a number or a 0-d tensor, divides the sum in place of the count of tokens (or of their weights).
    """
    dtype, norm = wide(like.dtype), None
    weight = None if weight is None else weight.to(dtype).contiguous()
    if normalizer is not None:
        if not isinstance(normalizer, torch.Tensor):
            normalizer = torch.full((), float(normalizer), dtype=dtype, device=like.device)
        norm = inverse(normalizer.to(like.device, dtype)).expand(2).contiguous()
    elif reduction == "mean":
        live = target != loss.ignore_index
        count = live.sum(dtype=dtype)
        if weight is None:
            norm = inverse(count).expand(2).contiguous()
        else:
            weights = weight[target.clamp(0, weight.shape[0] - 1)]
            norm = inverse(torch.stack((weights.where(live, 0.0).sum(), count)))
    weight_sum = weight.sum() if weight is not None else None
    factor = None if factor is None else factor.detach().to(dtype).contiguous()
    return Given(target.contiguous(), weight, weight_sum, norm, factor)


def inverse(count):
    """1 / count, and 0 for no tokens at all: their loss is 0.0."""
    return torch.where(count == 0, 0.0, 1.0 / count)


def finish(stats, target, ignore_index, reduction, dtype, z_loss=False, accuracy=False, predicted=False):
    """(loss, z_loss, token_accuracy, predicted_tokens) of the public functions."""

    def reduced(values):
        return (values if reduction == "none" else values.sum()).to(dtype)

    return (
        reduced(stats.loss),
        reduced(stats.z_loss) if z_loss else None,
        token_accuracy(stats.predicted, target, ignore_index) if accuracy else None,
        stats.predicted if predicted else None,
    )


def token_accuracy(predicted, target, ignore_index):
    """Share of the tokens whose largest logit is the label's, over those not ignored; 0-d fp32."""
    live = target != ignore_index
    return ((predicted == target) & live).sum(dtype=torch.float32) * inverse(live.sum(dtype=torch.float32))


def check_class_weight(weight, n_classes, device, op) -> None:
    if weight is None:
        return
    if weight.shape != (n_classes,) or not weight.is_floating_point():
        raise ValueError(
            f"{op}: expected a float class weight of shape ({n_classes},), got {weight.dtype} of shape "
            f"{tuple(weight.shape)}"
        )
    if weight.device != device:
        raise ValueError(f"{op}: the input is on {device} and the class weight on {weight.device}")


def check_target(n_rows, n_classes, target, device, loss: RowLoss, op) -> None:
    """Shape, dtype and device of the labels; their values where that needs no synchronisation (or on request)."""
    if target.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{op}: target must be int64 or int32, got {target.dtype}")
    if target.shape != (n_rows,):
        raise ValueError(f"{op}: target of shape {tuple(target.shape)}, expected ({n_rows},)")
    if target.device != device:
        raise ValueError(f"{op}: the input is on {device} and the target on {target.device}")
    if torch.compiler.is_compiling() or not (device.type == "cpu" or debug_enabled()):
        return
    bad = (target != loss.ignore_index) & ((target < 0) | (target >= n_classes))
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"{op}: target[{row}] is {int(target[row])}, which is neither a class in [0, {n_classes}) nor "
            f"ignore_index={loss.ignore_index}"
        )
