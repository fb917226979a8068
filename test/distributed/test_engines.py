"""Training on two ranks ends where one process ends that has the whole batch."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from support_engines import ENGINES, KINDS, LOSSES, ZERO, distances, refusal  # noqa: E402
from support_ranks import Ranks  # noqa: E402

IN_MAKE_TEST = {
    ("ddp", "full", "dpo"), ("fsdp1", "lora", "head"), ("fsdp2", "full", "head"), ("fsdp2", "tied_lora", "head"),
    ("fsdp2_root", "full", "dpo"), ("fsdp2_root_kept", "tied", "head"), ("zero2", "lora", "dpo"),
    ("zero3", "full", "head"), ("zero3", "tied", "dpo"),
}  # fmt: skip


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


def cells() -> list:
    return [*_cells()]


def _cells():
    for engine in ENGINES:
        for kind in KINDS:
            for loss in LOSSES:
                slow = [] if (engine, kind, loss) in IN_MAKE_TEST else [pytest.mark.slow]
                yield pytest.param(engine, kind, loss, id=f"{engine}-{kind}-{loss}", marks=slow)


@pytest.mark.parametrize("engine, kind, loss", cells())
def test_ends_where_one_process_ends(ranks, engine, kind, loss):
    if engine in ZERO:
        pytest.importorskip("deepspeed")
    for wrong, moved in ranks(distances, engine=engine, kind=kind, loss=loss):
        assert moved > 1e-2  # so that a step left out or done twice shows
        assert wrong < 1e-5


@pytest.mark.parametrize("engine, name", [("fsdp1", "FSDP1"), ("fsdp2", "FSDP2"), ("zero3", "ZeRO-3")])
def test_a_weight_that_is_not_gathered_is_refused_by_its_engines_name(ranks, engine, name):
    if engine in ZERO:
        pytest.importorskip("deepspeed")
    for message in ranks(refusal, engine=engine):
        assert name in message
