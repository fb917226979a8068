"""What is special about neighbourhood attention: who sees whom, a head too wide for few rows, modules, messages."""

import pytest
import torch

from liger_kernel.transformers.functional import liger_fused_neighborhood_attention
from liger_kernel.transformers.fused_neighborhood_attention import (
    LigerFusedNeighborhoodAttention,
    LigerFusedNeighborhoodAttentionConfig,
    LigerFusedNeighborhoodAttentionLayer,
)


@pytest.mark.parametrize("kernel_size, dilation", [(3, 1), (5, 2), (7, 3)])
def test_a_query_sees_its_neighbours_and_nobody_else(kernel_size, dilation, impl, device):
    seq, at = 20, 9
    q = torch.zeros(1, 1, seq, seq, device=device)  # equal scores: what comes out is the mean of those seen
    seen = liger_fused_neighborhood_attention(q, q, torch.eye(seq, device=device)[None, None], kernel_size, dilation)
    wanted = {at + dilation * n for n in range(-(kernel_size // 2), kernel_size // 2 + 1)}
    assert set(seen[0, 0, at].nonzero().flatten().tolist()) == {j for j in wanted if 0 <= j < seq}
    assert set(seen[0, 0, 0].nonzero().flatten().tolist()) == {dilation * n for n in range(kernel_size // 2 + 1)}
    torch.testing.assert_close(seen.sum(-1), torch.ones(1, 1, seq, device=device))


def test_a_window_as_wide_as_the_sequence_is_attention(impl, device):
    q, k, v = (torch.randn(2, 2, 9, 16, device=device) for _ in range(3))
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(liger_fused_neighborhood_attention(q, k, v, 17), wanted)


def test_large_scores_do_not_overflow(impl, device):
    q = 100 * torch.ones(1, 1, 5, 8, device=device)
    v = torch.randn(1, 1, 5, 8, device=device)
    y = liger_fused_neighborhood_attention(q, q, v, 3)
    torch.testing.assert_close(y[0, 0, 2], v[0, 0, 1:4].mean(0))


def test_gradcheck():
    args = [torch.randn(1, 2, 7, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *a: liger_fused_neighborhood_attention(*a, 3, 2), args)


def test_layer_of_a_config_adds_the_attention_of_the_normed(impl, device):
    config = LigerFusedNeighborhoodAttentionConfig(hidden_size=24, num_heads=3, kernel_size=3, dilation=2)
    layer = LigerFusedNeighborhoodAttentionLayer(**config.to_dict()).to(device)
    x = torch.randn(2, 11, 24, device=device, requires_grad=True)
    attention, normed = layer.attention, layer.layer_norm(x)
    heads = [
        p(normed).view(2, 11, 3, 8).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    ]
    place = torch.arange(11, device=device)
    apart = (place[:, None] - place).abs()
    mask = (apart == 0) | (apart == 2)
    o = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=mask)
    wanted = x + attention.o_proj(o.transpose(1, 2).reshape(2, 11, 24))
    found = layer(x)
    torch.testing.assert_close(found, wanted)
    upstream = torch.randn_like(x)
    for ours, theirs in zip(*(torch.autograd.grad(y, [x, *layer.parameters()], upstream, retain_graph=True)
                              for y in (found, wanted)), strict=True):  # fmt: skip
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)  # sums of 22 tokens in another order


@pytest.mark.parametrize(
    "call, message",
    [
        (dict(kernel_size=4), "kernel_size must be odd"),
        (dict(kernel_size=-1), "kernel_size must be odd"),
        (dict(dilation=0), "dilation must be"),
        (dict(key=torch.randn(1, 2, 5, 4)), "must be .B, H, S, D."),
        (dict(value=torch.randn(1, 2, 6, 4).half()), "must be .B, H, S, D."),
    ],
)
def test_bad_input_is_named(call, message):
    x = torch.randn(1, 2, 6, 4)
    with pytest.raises(ValueError, match=message):
        liger_fused_neighborhood_attention(**dict(query=x, key=x, value=x) | call)


def test_a_mask_and_odd_heads_are_refused():
    with pytest.raises(ValueError, match="attention_mask"):
        LigerFusedNeighborhoodAttention(8, 2)(torch.randn(1, 4, 8), torch.ones(1, 4))
    with pytest.raises(ValueError, match="num_heads=3"):
        LigerFusedNeighborhoodAttention(8, 3)
