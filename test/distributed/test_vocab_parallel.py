"""A vocabulary split among ranks gives what the whole vocabulary gives on one."""

import pytest
import torch

from support_ranks import Ranks
from support_vocab_parallel import head_errors, logits_errors, under_upstreams_name

SIZES = [(20, 21), (40, 1), (41, 0)]


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@pytest.mark.nccl
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("options", [{}, dict(softcap=6.0, logit_scale=1.5, temperature=0.7, bias=True)])
def test_head_is_that_of_one_rank(ranks, sizes, options):
    for errors in ranks(head_errors, sizes=sizes, **options):
        for name, (ours, limit) in errors.items():
            assert ours <= limit, (name, ours, limit)


@pytest.mark.parametrize("ignore_index", [0, 3, 25])
def test_rows_whose_label_is_another_ranks_were_ignored_where_ignore_index_is_a_class(ranks, ignore_index):
    for errors in ranks(head_errors, sizes=(20, 21), ignore_index=ignore_index):
        for name, (ours, limit) in errors.items():
            assert ours <= limit, (name, ours, limit)


@pytest.mark.parametrize("sizes", SIZES)
def test_head_under_upstreams_name(ranks, sizes):
    for errors in ranks(under_upstreams_name, sizes=sizes):
        for name, (ours, limit) in errors.items():
            assert ours <= limit, (name, ours, limit)


@pytest.mark.parametrize("formula, mode, smoothing", [
    ("pytorch", "global", 0.0), ("pytorch", "global", 0.1), ("megatron", "global", 0.1), ("pytorch", "partition", 0.1),
    ("megatron", "partition", 0.1),
])  # fmt: skip
def test_logits_give_the_loss_of_one_rank(ranks, formula, mode, smoothing):
    for sizes in SIZES[:2] if mode == "partition" else SIZES:
        for errors in ranks(logits_errors, sizes=sizes, formula=formula, mode=mode, smoothing=smoothing):
            for name, (ours, limit) in errors.items():
                assert ours <= limit, (sizes, name, ours, limit)


def test_without_a_job_there_is_one_part():
    from liger_kernel.transformers import LigerVocabParallelCrossEntropy

    x = torch.randn(3, 5, 17, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 17, (3, 5))
    target[1, 2] = -100
    loss = LigerVocabParallelCrossEntropy(reduction="mean", label_smoothing=0.2)(x, target)
    loss.backward()
    y = x.detach().clone().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(y.view(-1, 17), target.view(-1), label_smoothing=0.2)
    wanted.backward()
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(x.grad, y.grad)


def test_a_label_outside_all_parts_raises():
    from liger_kernel.transformers import LigerVocabParallelCrossEntropy

    with pytest.raises(ValueError, match=r"target\[1\] is 5"):
        LigerVocabParallelCrossEntropy()(torch.randn(2, 5), torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="label_smoothing_mode"):
        LigerVocabParallelCrossEntropy(label_smoothing_mode="local")
