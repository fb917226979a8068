"""What is special about attn_res: the paper's formula, its helpers, large logits, many blocks, its messages."""

import pytest
import torch
from torch.nn.functional import rms_norm

from liger_kernel.ops import LigerAttnResFunction
from liger_kernel.ops.attn_res import attn_res_backward, attn_res_forward
from liger_kernel.transformers.functional import liger_attn_res


def arguments(device, *shape, requires_grad=False):
    sizes = (shape, shape[-1:], shape[-1:])
    return [torch.randn(s, device=device).requires_grad_(requires_grad) for s in sizes]


def test_is_the_papers_attention_over_blocks(impl, device):
    v, w_query, w_norm = arguments(device, 5, 2, 3, 16)
    keys = torch.stack([rms_norm(block, (16,), w_norm, 1e-6) for block in v])
    weights = torch.einsum("d, n b t d -> n b t", w_query, keys).softmax(0)
    wanted = torch.einsum("n b t, n b t d -> b t d", weights, v)
    torch.testing.assert_close(liger_attn_res(v, w_query, w_norm), wanted)
    torch.testing.assert_close(LigerAttnResFunction.apply(v, w_query, w_norm, 1e-6), wanted)


def test_a_query_of_zeros_is_the_mean_and_one_block_is_itself(impl, device):
    v, w_query, w_norm = arguments(device, 4, 7, 16)
    torch.testing.assert_close(liger_attn_res(v, torch.zeros_like(w_query), w_norm), v.mean(0))
    torch.testing.assert_close(liger_attn_res(v[:1], w_query, w_norm), v[0])


@pytest.mark.parametrize("n_blocks", [1, 33])
def test_logits_beyond_exp_are_a_choice(n_blocks, impl, device):
    """Logits of a few thousand, rising from block to block and falling: exp of none may overflow."""
    v = torch.randn(n_blocks, 3, 16, device=device)
    w_query = torch.full((16,), 1000.0, device=device)
    w_norm = torch.ones(16, device=device)
    best = rms_norm(v, (16,), eps=1e-6).sum(-1).argmax(0)
    found = liger_attn_res(v.requires_grad_(), w_query, w_norm)
    assert torch.equal(found, v[best, torch.arange(3, device=device)])
    found.sum().backward()
    assert v.grad.isfinite().all()


def test_helpers_have_upstreams_signatures(impl, device):
    v, w_query, w_norm = arguments(device, 3, 2, 5, 8, requires_grad=True)
    h = liger_attn_res(v, w_query, w_norm)
    dh = torch.randn_like(h)
    wanted = torch.autograd.grad(h, (v, w_query, w_norm), dh)
    with torch.no_grad():
        found, v_3d, alpha, rstd = attn_res_forward(list(v), w_query, w_norm)
        assert torch.equal(found, h) and torch.equal(v_3d, v.view(3, 10, 8))
        torch.testing.assert_close(alpha.sum(0), torch.ones(10, device=device))
        torch.testing.assert_close(rstd, v_3d.pow(2).mean(-1).add(1e-6).rsqrt())
        grads = attn_res_backward(dh, v_3d, w_query, w_norm, alpha, rstd)
    for a, b in zip(grads, wanted, strict=True):
        assert torch.equal(a, b.view_as(a))


def test_more_tiles_than_programs(device):
    """Rows enough that every program takes several tiles; short rows share one; and the loop over columns agrees."""
    from liger_kernel.ops.kernels import attn_res as triton_room
    from liger_kernel.ops.kernels.blocks import RowTiles

    v, w_query, w_norm = arguments(device, 3, 21, 70)
    dh = torch.randn(21, 70, device=device)
    found = []
    for rows, block in ((2, 128), (1, 128), (2, 32)):
        tiles = RowTiles(rows=rows, block=block, loop=block < 70, num_warps=1, programs=3)
        h, alpha, rstd = triton_room.attn_res_forward(v, w_query, w_norm, 1e-6, tiles)
        found.append((h, *triton_room.attn_res_backward(dh, v, w_query, w_norm, alpha, rstd, tiles)))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)  # du: a sum of 63 terms of size 1, in another order


@pytest.mark.parametrize(
    "call, message",
    [
        (dict(V=torch.ones(4)), r"V must be \(N, ..., D\)"),
        (dict(V=torch.ones(0, 2, 4)), "N of at least 1"),
        (dict(w_query=torch.ones(5)), r"w_query of shape \(5,\)"),
        (dict(w_norm=torch.ones(4, device="meta")), "w_norm on meta"),
        (dict(V=torch.ones(2, 3, 4, dtype=torch.int32)), "floating dtype"),
    ],
)
def test_bad_input_is_named(call, message):
    known = dict(V=torch.randn(2, 3, 4), w_query=torch.ones(4), w_norm=torch.ones(4))
    with pytest.raises(ValueError, match=message):
        liger_attn_res(**known | call)
