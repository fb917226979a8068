"""What is special about embedding: torch's module, indices that repeat or do not exist, its messages."""

import pytest
import torch
from torch import nn

from liger_kernel.ops.experimental.embedding import LigerEmbeddingFunction
from liger_kernel.transformers.experimental.embedding import LigerEmbedding


@pytest.mark.parametrize("padding_idx", [None, 3, -1])
def test_module_is_torchs(padding_idx, impl, device):
    ours, theirs = (kind(7, 5, padding_idx).to(device) for kind in (LigerEmbedding, nn.Embedding))
    assert padding_idx is None or not ours.weight[padding_idx].any()
    ours.load_state_dict(theirs.state_dict())
    index = torch.randint(7, (4, 9), device=device)
    dy = torch.randn(4, 9, 5, device=device)
    y, wanted = ours(index), theirs(index)
    assert torch.equal(y, wanted)
    y.backward(dy)
    wanted.backward(dy)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_one_row_for_all_is_summed_in_fp32(dtype, impl, device):
    w = torch.randn(3, 2, dtype=torch.float16, device=device, requires_grad=True)
    y = LigerEmbeddingFunction.apply(w, torch.full((41,), 1, dtype=dtype, device=device))
    dy = torch.ones_like(y)
    dy[0] = 2048  # in fp16 a sum of ones ends there
    y.backward(dy)
    assert w.grad.tolist() == [[0, 0], [2088, 2088], [0, 0]]


def test_an_index_outside_of_the_table_is_nan_and_takes_no_gradient(device):
    from liger_kernel.ops.kernels import embedding as triton_embedding

    index = torch.tensor([1, -1, 4, 0], device=device)
    y = triton_embedding.embedding_forward(torch.ones(4, 3, device=device), index)
    assert y.isnan().all(-1).tolist() == [False, True, True, False]
    dw = triton_embedding.embedding_backward(torch.ones_like(y), index, 4)
    assert dw[:, 0].tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize(
    "call, message",
    [
        (dict(w=torch.ones(4)), r"\(V, H\)"),
        (dict(w=torch.ones(4, 2, dtype=torch.int32)), "floating"),
        (dict(index=torch.ones(2)), "int32 or int64"),
        (dict(index=torch.ones(2, dtype=torch.int64, device="meta")), "indices on meta"),
    ],
)
def test_bad_input_is_named(call, message):
    known = dict(w=torch.randn(4, 2), index=torch.tensor([1])) | call
    with pytest.raises(ValueError, match=message):
        LigerEmbeddingFunction.apply(known["w"], known["index"])
    with pytest.raises(ValueError, match="padding_idx must be below"):
        LigerEmbedding(4, 2, padding_idx=4)
