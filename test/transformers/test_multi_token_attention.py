"""Multi-token attention against its formula written out, its causality, its module, its messages."""

import pytest
import torch
from torch.nn import functional as F

from liger_kernel.ops import softmax, sparsemax
from liger_kernel.transformers.functional import liger_multi_token_attention
from liger_kernel.transformers.multi_token_attention import LigerMultiTokenAttention

from support import assert_as_good_as_torch, dtypes


def formula(scores, weight, bias, sparse, **conv):
    past = torch.ones(scores.shape[-2:], device=scores.device, dtype=torch.bool).tril()
    p = (sparsemax if sparse else softmax).reference(torch.where(past, scores, float("-inf")))
    y = F.conv2d(p, weight, bias, **conv)
    return y * torch.ones_like(y[0, 0]).tril()


CONVOLUTIONS = (
    dict(padding=1),
    dict(padding=(2, 0), dilation=(2, 1), groups=2),
    dict(stride=2),
)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
def test_equals_the_formula(conv, sparse, impl, device):
    for dtype in dtypes(impl, device):
        torch.manual_seed(0)
        sizes = ((2, 4, 9, 9), (6, 4 // conv.get("groups", 1), 3, 3), (6,))
        args = [torch.randn(size, device=device).to(dtype) for size in sizes]
        upstream, results = None, []
        for call, to in ((liger_multi_token_attention, dtype), (formula, dtype), (formula, torch.float64)):
            leaves = [a.to(to).requires_grad_() for a in args]
            y = call(*leaves, sparse=sparse, **conv)
            upstream = torch.randn_like(y) if upstream is None else upstream
            results.append(([y.detach()], torch.autograd.grad(y, leaves, upstream.to(to))))
        (ours, our_grad), (torchs, torch_grad), (truth, truth_grad) = results
        assert ours[0].dtype == dtype
        assert_as_good_as_torch(ours, torchs, truth, dtype, f"{conv} output")
        assert_as_good_as_torch(our_grad, torch_grad, truth_grad, dtype, f"{conv} gradient")


@pytest.mark.parametrize("sparse", [False, True])
def test_nothing_of_the_future_is_used(sparse, impl, device):
    scores = torch.randn(1, 2, 6, 6, device=device)
    weight = torch.randn(3, 2, 3, 3, device=device)
    y = liger_multi_token_attention(scores, weight, padding=1, sparse=sparse)
    other = scores.masked_fill(torch.ones(6, 6, device=device).triu(1) == 1, float("nan"))
    assert torch.equal(liger_multi_token_attention(other, weight, padding=1, sparse=sparse), y)
    assert (y.triu(1) == 0).all() and (y.tril() != 0).any()
    scores.requires_grad_()
    liger_multi_token_attention(scores, weight, padding=1, sparse=sparse).sum().backward()
    assert (scores.grad.triu(1) == 0).all()


def test_gradcheck():
    sizes = ((1, 2, 4, 4), (2, 2, 3, 3), (2,))
    args = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
    assert torch.autograd.gradcheck(lambda *a: liger_multi_token_attention(*a, padding=1), args)


def test_module_begins_as_a_convolution_and_trains(impl, device):
    torch.manual_seed(0)
    ours = LigerMultiTokenAttention(4, 6, 3, padding=1, groups=2).to(device)
    torch.manual_seed(0)
    theirs = torch.nn.Conv2d(4, 6, 3, padding=1, groups=2).to(device)
    assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)
    scores = torch.randn(2, 4, 5, 5, device=device)
    p = scores.masked_fill(torch.ones(5, 5, device=device).triu(1) == 1, float("-inf")).softmax(-1)
    torch.testing.assert_close(ours(scores), theirs(p).tril())
    assert LigerMultiTokenAttention(1, 1, (1, 3), bias=False).bias is None


@pytest.mark.parametrize(
    "call, message",
    [
        (dict(scores=torch.randn(1, 2, 4, 5)), "must be floats"),
        (dict(scores=torch.ones(1, 2, 4, 4, dtype=torch.int64)), "must be floats"),
        (dict(weight=torch.randn(2, 2, 3)), "weight must be"),
        (dict(weight=torch.randn(2, 2, 3, 3).double()), "weight torch.float64"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        liger_multi_token_attention(**dict(scores=torch.randn(1, 2, 4, 4), weight=torch.randn(2, 2, 3, 3)) | call)
    with pytest.raises(ValueError, match="groups=3"):
        LigerMultiTokenAttention(4, 6, 3, groups=3)
