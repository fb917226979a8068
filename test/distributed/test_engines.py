"""Training on two ranks ends where one process ends that has the whole batch."""

import functools

import pytest
import torch

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


# What is run on two GPUs as well: LIGER_TEST_NCCL=1 pytest test/distributed -m nccl
ON_GPUS = {("fsdp2", "full", "head"), ("fsdp2", "tied_lora", "head"), ("zero3", "full", "head"), ("ddp", "full", "dpo")}
IN_BF16 = {("ddp", "full", "dpo"), ("fsdp2", "full", "head"), ("fsdp2", "tied_lora", "head")}


def cells(in_make_test) -> list:
    return [*_cells(in_make_test)]


def _cells(in_make_test):
    for engine in ENGINES:
        for kind in KINDS:
            for loss in LOSSES:
                marks = [] if (engine, kind, loss) in in_make_test else [pytest.mark.slow]
                marks += [pytest.mark.nccl] if (engine, kind, loss) in ON_GPUS else []
                yield pytest.param(engine, kind, loss, id=f"{engine}-{kind}-{loss}", marks=marks)


@pytest.mark.parametrize("engine, kind, loss", cells(IN_MAKE_TEST))
def test_ends_where_one_process_ends(ranks, engine, kind, loss):
    if engine in ZERO:
        pytest.importorskip("deepspeed")
    for wrong, moved in ranks(distances, engine=engine, kind=kind, loss=loss):
        assert moved > 1e-2  # so that a step left out or done twice shows
        assert wrong < 1e-5


@pytest.mark.parametrize("engine, kind, loss", cells(IN_BF16))
def test_bf16_ends_no_further_from_the_truth_than_unpatched(ranks, engine, kind, loss):
    if engine in ZERO:
        pytest.importorskip("deepspeed")
    run = functools.partial(ranks, distances, engine=engine, kind=kind, loss=loss, dtype=torch.bfloat16)
    for (ours, moved), (theirs, _) in zip(run(), run(patched=False), strict=True):
        assert moved > 1e-2
        # Nearly all of it is the rounding of the parameters after each step: which way the last bit falls is chance.
        assert ours < 1.05 * theirs


@pytest.mark.nccl
@pytest.mark.parametrize("engine, name", [("fsdp1", "FSDP1"), ("fsdp2", "FSDP2"), ("zero3", "ZeRO-3")])
def test_a_weight_that_is_not_gathered_is_refused_by_its_engines_name(ranks, engine, name):
    if engine in ZERO:
        pytest.importorskip("deepspeed")
    for message in ranks(refusal, engine=engine):
        assert name in message
