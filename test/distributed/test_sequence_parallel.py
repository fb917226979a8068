"""A sequence whose parts lie on different ranks, with labels shifted before they were split, gives the whole's loss."""

import pytest

pytest.importorskip("transformers")

from support_sequence_parallel import errors  # noqa: E402

from support_ranks import Ranks  # noqa: E402


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@pytest.mark.nccl
@pytest.mark.parametrize("how", ["context", pytest.param("ulysses", marks=pytest.mark.slow)])
def test_shift_labels_of_a_part_give_the_loss_of_the_whole(ranks, how):
    if how == "ulysses":
        pytest.importorskip("deepspeed")
    for found in ranks(errors, how=how):
        assert found["lazy"]
        # fp32 of 24 bits, norm-wise: two layers' sums of some hundred terms in another order
        assert found["loss"] < 1e-6 and found["gradients"] < 1e-6, found
