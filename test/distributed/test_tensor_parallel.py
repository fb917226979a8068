"""A model split by tensor parallelism and patched afterwards gives what it gave, and talks no more than it did."""

import pytest
import torch

pytest.importorskip("transformers")

from support_tensor_parallel import (  # noqa: E402
    compare,
    compare_in_triton,
    errors_in_bf16,
    op_errors,
    other_uses,
    peaks,
    second_backward,
    watched,
)

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


def compared(ranks, case, **flags) -> list[dict]:
    how, options = CASES[case]
    try:
        return ranks(compare, how=how, options=options, flags=flags)
    except AssertionError as error:
        if "must be divisible by the tensor parallel size" in str(error):  # 5.17; 5.24 has no such limit
            pytest.skip("this transformers splits a vocabulary into equal parts only")
        raise


@pytest.mark.nccl
@pytest.mark.parametrize("case", CASES)
def test_the_head_stays_split_and_gathers_no_logits(ranks, case):
    for found in compared(ranks, case):
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
    for found in compared(ranks, case, fused_linear_cross_entropy=False):
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
@pytest.mark.parametrize("options", [{}, {"normalizer": 3.5}, EVERYTHING, {**RESULTS, "lse_square_scale": 1e-2}])
def test_the_loss_of_dtensors_is_that_of_whole_tensors(ranks, placement, sizes, reduction, options):
    if reduction == "none" and "normalizer" in options:
        pytest.skip("refused")
    for errors in ranks(op_errors, sizes=sizes, placement=placement, options=options | {"reduction": reduction}):
        for name, error in errors.items():
            assert error < 40 * 2.0**-24, (name, error)  # see SLACK of support_vocab_parallel


def test_no_rank_ever_holds_more_than_its_part_of_the_logits(ranks):
    rows, n_classes = 64, 1000
    for found in ranks(watched, sizes=(rows, 8, n_classes), options={}):
        part = -(-n_classes // 2 // 16) * 16  # its rows start at 16-byte boundaries
        assert rows * n_classes // 2 <= found["most"] <= rows * part


def test_memory_beside_the_inputs_is_that_of_the_part(ranks):
    sizes = rows, width, n_classes = 64, 256, 1 << 17
    for found in ranks(peaks, sizes=sizes, workspace_bytes=1 << 20):
        gradient = 4 * n_classes * width
        # Beside it: a chunk of 1 MiB, some temporaries of it, and what the allocator keeps of them.
        assert gradient / 2 <= found["split"] <= gradient / 2 + (16 << 20), found
        assert found["whole"] >= gradient, found


@pytest.mark.parametrize("n_classes", [32, 33, 1000])  # 33: rows of the two parts' logits take different memory
@pytest.mark.parametrize("live", [64, 40])
@pytest.mark.parametrize("n_results", [0, 2])
def test_one_pass_with_one_small_gather_a_chunk(ranks, n_classes, live, n_results):
    rows, width = 64, 8
    part = -(-n_classes // 2)
    row = 4 * -(-part // 16) * 16
    options = {"workspace_bytes": 16 * row, "return_predicted_tokens": bool(n_results)}
    for rank, found in enumerate(ranks(watched, sizes=(rows, width, n_classes), options=options, live=live)):
        chunks = [min(16, live - i) for i in range(0, live, 16)]
        # The sizes of the parts, then lse, nll and entropy of both ranks' rows; at the end both ranks' largest logits.
        assert found["brought"] == [2, *(2 * 3 * n for n in chunks), *[2 * rows] * n_results]
        assert found["flops"] == 6 * live * width * (part if rank == 0 else n_classes - part)


@pytest.mark.parametrize("case, products", [
    (dict(options={"reduction": "none"}), 4), (dict(options={}, fp16=True), 4), (dict(options={}, gradients=False), 1),
])  # fmt: skip
def test_where_no_gradient_is_formed_in_the_forward_there_is_one_gather(ranks, case, products):
    rows, width, n_classes = 64, 8, 1000
    case["options"] |= {"workspace_bytes": 16 * 512 * 4}
    for found in ranks(watched, sizes=(rows, width, n_classes), **case):
        assert found["brought"] == [2, 2 * 3 * rows]
        assert found["flops"] == 2 * products * rows * width * n_classes // 2


@pytest.mark.parametrize("chunks", [1, 4])
def test_bf16_gradients_are_no_further_from_the_truth_than_those_of_a_whole_weight(ranks, chunks):
    sizes = rows, _, n_classes = 64, 32, 1000
    for found in ranks(errors_in_bf16, sizes=sizes, workspace_bytes=rows * 1008 * 2 // chunks):
        # The rounding of the gradients of the logits outweighs all others. A rank rounds its share of d_hidden once
        # more; d_weight differs by what comes from the fp32 numbers of the softmax.
        for name, slack in (("hidden", 1.1), ("weight", 1.001)):
            split, whole = found[name]
            assert split <= slack * whole, (name, split, whole)


def test_a_second_backward_says_why_there_is_none(ranks):
    for found in ranks(second_backward, sizes=(9, 16, 41)):
        assert "handed out by the first" in found


def test_what_a_split_vocabulary_does_not_offer_is_refused_by_name(ranks):
    for found in ranks(op_errors, sizes=(9, 16, 41), placement="rows", options={"label_smoothing": 0.1}):
        assert "label_smoothing is not offered" in found["refused"]
    for found in ranks(op_errors, sizes=(9, 16, 41), placement="rows", options={"reduction": "mode"}):
        assert "reduction must be one of" in found["refused"]


def test_what_cannot_be_fused_gets_the_true_logits_of_a_split_head(ranks):
    for found in ranks(other_uses):
        assert max(found.values()) < SLACK, found
