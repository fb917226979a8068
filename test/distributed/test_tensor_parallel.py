"""A model split by tensor parallelism and patched afterwards gives what it gave, and talks no more than it did."""

import pytest
import torch

pytest.importorskip("transformers")

from support_tensor_parallel import compare, compare_in_triton, largest_of_a_step, op_errors, other_uses  # noqa: E402

from support_ranks import Ranks  # noqa: E402

# fp32 of 24 bits, sums in another order: of some hundred terms in each of two layers.
SLACK = 2e-6


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


def check(found) -> None:
    for name in ("loss", "of one process", "logits", "gradients", "gradients of one process"):
        assert found[name] < SLACK, (name, found[name])
    assert found["placed alike"] and found["reverted"]


CASES = {
    "auto": ("transformers", {}),
    "auto_even": ("transformers", {"vocab": 68}),
    "auto_tied": ("transformers", {"tied": True}),
    "torch": ("torch", {}),
    "torch_dtensors": ("torch", {"local": False}),
    "sequence": ("torch", {"sequence": True}),
    "sequence_dtensors": ("torch", {"sequence": True, "local": False}),
    "auto_qwen3": ("transformers", {"model_type": "qwen3"}),
}


@pytest.mark.nccl
@pytest.mark.parametrize("case", CASES)
def test_the_head_stays_split_and_gathers_no_logits(ranks, case):
    how, options = CASES[case]
    for found in ranks(compare, how=how, options=options, flags={}):
        check(found)
        assert found["lazy"]
        # transformers has put a forward of its own there, which sums their gradients
        assert all("q_norm" in row or "k_norm" in row for row in found["left"])
        (plain, ours) = found["counts"]
        # The logits are not gathered: in their place are three numbers a token, and the sizes of the parts.
        assert ours == plain | {"gather": plain["gather"] + 1}


@pytest.mark.nccl
@pytest.mark.parametrize("case", CASES)
def test_norms_mlp_and_rope_add_no_collective(ranks, case):
    how, options = CASES[case]
    for found in ranks(compare, how=how, options=options, flags={"fused_linear_cross_entropy": False}):
        check(found)
        assert found["counts"][0] == found["counts"][1]


@pytest.mark.parametrize("case", ["torch_dtensors", "sequence"])
def test_a_kernel_waits_for_a_tensor_that_is_on_its_way_between_ranks(ranks, case):
    """torch's hooks return such tensors, which have no address before they are waited for."""
    pytest.importorskip("triton")
    how, options = CASES[case]
    for found in ranks(compare_in_triton, how=how, options=options):
        check(found)
        assert found["lazy"]


@pytest.mark.nccl
def test_a_split_head_under_fsdp2(ranks):
    for found in ranks(compare, how="torch", options={"fsdp": True}, flags={}, counts=False):
        check(found)
        assert found["lazy"]


def test_a_head_split_otherwise_keeps_its_own_logits(ranks):
    for found in ranks(compare, how="torch", options={"head": "rows"}, flags={}):
        check(found)
        assert not found["lazy"] and "not split by rows" in found["left"][0]
        assert found["counts"][0] == found["counts"][1]


EVERYTHING = dict(
    lse_square_scale=1e-2, softcap=6.0, logit_scale=1.5, temperature=0.7, use_token_scaling=True, weighted=True,
    accum_dtype=torch.float32, workspace_bytes=1,
)  # fmt: skip
RESULTS = dict.fromkeys(("return_z_loss", "return_token_accuracy", "return_predicted_tokens", "return_entropy"), True)


@pytest.mark.parametrize("placement", ["rows", "whole", "columns"])
@pytest.mark.parametrize("sizes", [(9, 16, 40), (9, 16, 41), (4, 8, 1)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, EVERYTHING, {**RESULTS, "lse_square_scale": 1e-2}])
def test_the_loss_of_dtensors_is_that_of_whole_tensors(ranks, placement, sizes, reduction, options):
    for errors in ranks(op_errors, sizes=sizes, placement=placement, options=options | {"reduction": reduction}):
        for name, error in errors.items():
            assert error < 40 * 2.0**-24, (name, error)  # see SLACK of support_vocab_parallel


def test_no_rank_ever_holds_more_than_its_part_of_the_logits(ranks):
    rows, width, n_classes = 64, 8, 1000
    for most in ranks(largest_of_a_step, rows=rows, width=width, n_classes=n_classes):
        part = -(-n_classes // 2 // 16) * 16  # its rows start at 16-byte boundaries
        assert rows * n_classes // 2 <= most <= rows * part


def test_what_a_split_vocabulary_does_not_offer_is_refused_by_name(ranks):
    for found in ranks(op_errors, sizes=(9, 16, 41), placement="rows", options={"label_smoothing": 0.1}):
        assert "label_smoothing is not offered" in found["refused"]


def test_what_cannot_be_fused_gets_the_true_logits_of_a_split_head(ranks):
    for found in ranks(other_uses):
        assert max(found.values()) < SLACK, found
