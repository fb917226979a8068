"""One softmax over a vocabulary that is split, among the ranks of a group say: what each part finds, put together.

Rank r holds z_j for j in its part; of a token it finds lse_r, the nll_r of the label where the label is its own, and
entropy_r, all of the softmax over its part alone. With s_r = exp(lse_r - lse), the share of that part:

    lse = log(sum_r exp(lse_r))        nll = nll_r + log(1 + sum_{q != r} exp(lse_q - lse_r)), r the label's rank
    entropy = sum_r s_r * (lse - lse_r + entropy_r)

    dz_j = f (p_j - [j = y]) + g p_j - e p_j (z_j - lse + entropy)     f, g, e: gradients of nll, lse and entropy
         = f' (q_j - [j = y]) + g' q_j - e' q_j (z_j - lse_r + entropy_r)
    q the softmax over the part, p_j = s_r q_j, and where y is in the part: f' = f, elsewhere 0;
    e' = e s_r;  g' = s_r (g - e (lse_r - lse + entropy - entropy_r)) + (f s_r, or f (s_r - 1) where y is in the part)

The second form is what the kernel of a row computes. 1 - s_r is the sum of the other shares, so nothing cancels.

Needs     the same targets on all ranks of the group; the parts in the order of the ranks, of any sizes.
Traffic   three numbers per token and rank, gathered, and the size of each part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import distributed as dist

from liger_kernel.ops.core import debug_enabled
from liger_kernel.ops.row_loss import Given, RowLoss, Stats


def of_part(loss: RowLoss) -> RowLoss:
    """The same with an ignore_index that is no class: a label within the part could be the same number."""
    return loss if loss.ignore_index < 0 else replace(loss, ignore_index=-1)


@dataclass(frozen=True)
class Part:
    """This rank's part of the vocabulary, and its labels (T,)."""

    target: torch.Tensor  # within this part; 0 where the label is in another one, or ignored as of_part has it
    owner: torch.Tensor  # (ranks, T): whether the label is in the part of that rank
    live: torch.Tensor  # whether the label is not ignored
    rank: int
    size: int
    n_classes: torch.Tensor  # 0-d: of all parts
    start: torch.Tensor  # 0-d: the first class of this part

    @property
    def here(self) -> torch.Tensor:
        return self.owner[self.rank]

    @property
    def inside(self) -> torch.Tensor:
        return self.owner.any(0)

    def take(self, rows: slice | torch.Tensor) -> Part:
        return replace(self, target=self.target[rows], owner=self.owner[:, rows], live=self.live[rows])


@dataclass(frozen=True)
class Whole:
    """Of each token (T,): the numbers of the whole softmax, and those of this rank's part that the backward needs."""

    nll: torch.Tensor
    lse: torch.Tensor
    entropy: torch.Tensor
    share: torch.Tensor  # s_r
    rest: torch.Tensor  # 1 - s_r
    lse_here: torch.Tensor
    entropy_here: torch.Tensor


def size_and_rank(group) -> tuple[int, int]:
    """Of a group; None is all ranks of the job, and a single one where there is no job."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1, 0
    return dist.get_world_size(group), dist.get_rank(group)


def gather(tensor: torch.Tensor, group) -> torch.Tensor:
    """(ranks, *shape) of every rank's tensor."""
    n_ranks, _ = size_and_rank(group)
    if n_ranks == 1:
        return tensor[None]
    found = tensor.new_empty(n_ranks * tensor.numel())
    dist.all_gather_into_tensor(found, tensor.reshape(-1).contiguous(), group=group)
    return found.view(n_ranks, *tensor.shape)


def find_part(target: torch.Tensor, n_here: int, loss: RowLoss, group, op: str) -> Part:
    """Where this rank stands. ValueError on a CPU or under LIGER_KERNEL_DEBUG for a label outside all parts."""
    sizes = gather(torch.full((), n_here, dtype=torch.int64, device=target.device), group)
    ends = sizes.cumsum(0)[:, None]
    starts = ends - sizes[:, None]
    live = target != loss.ignore_index
    owner = live & (target >= starts) & (target < ends)
    if (target.device.type == "cpu" or debug_enabled()) and (live & ~owner.any(0)).any():
        row = int((live & ~owner.any(0)).nonzero()[0])
        raise ValueError(
            f"{op}: target[{row}] is {int(target[row])}, which is neither a class in [0, {int(ends[-1])}) nor "
            f"ignore_index={loss.ignore_index}"
        )
    rank = size_and_rank(group)[1]
    local = (target - starts[rank]).where(owner[rank], 0).masked_fill(~live, of_part(loss).ignore_index)
    return Part(local, owner, live, rank, n_here, ends[-1, 0], starts[rank, 0])


def combine(part: Part, nll, lse, entropy, group) -> Whole:
    """The whole softmax's numbers from those of this part, each (T,); of an empty part they are not read."""
    lse = lse if part.size else torch.full_like(lse, float("-inf"))
    found = gather(torch.stack((lse, nll.where(part.here, 0.0), entropy)), group)
    lses, nlls, entropies = found.unbind(1)
    whole_nll, whole_lse, whole_entropy = put_together(lses, nlls, entropies, part.owner)
    others = lses.clone()
    others[part.rank].fill_(float("-inf"))
    others = others.logsumexp(0)
    return Whole(
        whole_nll.where(part.inside, float("nan")).where(part.live, 0.0),
        whole_lse.where(part.live, 0.0),
        whole_entropy.where(part.live, 0.0),
        (lses[part.rank] - whole_lse).exp(),
        (others - whole_lse).exp(),
        lse,
        entropy,
    )


def put_together(lses, nlls, entropies, owner):
    """(nll, lse, entropy) of each token (T,) from those of the parts, each (parts, T); entropies may be None.

    owner: (parts, T), whether the label is in that part; nll has no meaning where it is in none.
    """
    lse, here = lses.logsumexp(0), lses.where(owner, 0.0).sum(0)
    others = lses.masked_fill(owner, float("-inf")).logsumexp(0)
    nll = nlls.where(owner, 0.0).sum(0) + torch.logaddexp(lses.new_zeros(()), others - here)
    # All logits of the label's part are -inf, of other parts not.
    nll = nll.masked_fill((here == float("-inf")) & (lse > here), float("inf"))
    if entropies is None:
        return nll, lse, None
    shares = (lses - lse).exp()
    return nll, lse, (shares * (lse - lses + entropies)).where(shares != 0, 0.0).sum(0)


def first_of_largest(tops, places) -> torch.Tensor:
    """Of each token (T,) the place, of those (parts, T), that has the largest logit; the first of equal ones."""
    return places.gather(0, tops.argmax(0, keepdim=True)).squeeze(0)


def first_largest(part: Part, stats: Stats, group) -> torch.Tensor:
    """argmax over all parts (T,), -1 where ignored, from the largest logit of this part and its place in it."""
    top, predicted = stats.top, stats.predicted
    assert top is not None and predicted is not None
    top = top if part.size else torch.full_like(top, float("-inf"))
    tops, places = gather(top, group), gather(predicted + part.start, group)
    return first_of_largest(tops, places).where(part.live, -1)


def upstream(part: Part, whole: Whole, d_nll, d_lse=None, d_entropy=None) -> Given:
    """What the kernel of a row is given to form this part's gradient from those of nll, lse and entropy, each (T,)."""
    slope = torch.where(part.here, -whole.rest, whole.share) * d_nll
    if d_lse is not None:
        slope = slope + whole.share * d_lse
    if d_entropy is not None:
        d_entropy = (whole.share * d_entropy).contiguous()
        shift = whole.lse_here - whole.lse + whole.entropy - whole.entropy_here
        slope = slope - (d_entropy * shift).where(whole.share > 0, 0.0)
    slope = slope.where(part.inside | ~part.live, float("nan"))
    factor = d_nll.where(part.here, 0.0)
    return Given(part.target, factor=factor.contiguous(), d_lse=slope.contiguous(), d_entropy=d_entropy)
