"""Training on two ranks ends where one process ends that has the whole batch."""

import pytest

pytest.importorskip("transformers")
pytest.importorskip("peft")

from support_engines import ENGINES, KINDS, LOSSES, ZERO, distances  # noqa: E402
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
