"""The adapters compute what Megatron-Core computes."""

from types import SimpleNamespace

import pytest
import torch

from liger_kernel.megatron import LigerMegatronRMSNorm, LigerMegatronSwiGLU

from support_ranks import Ranks


def config(**options):
    return SimpleNamespace(**(dict(normalization="RMSNorm", sequence_parallel=True) | options))


@pytest.mark.parametrize("zero_centered", [False, True])
def test_rms_norm_is_torchs(zero_centered):
    norm = LigerMegatronRMSNorm(config(layernorm_zero_centered_gamma=zero_centered), 24, eps=1e-4)
    assert norm.weight.sequence_parallel
    with torch.no_grad():
        norm.weight.add_(torch.randn(24))
    x = torch.randn(3, 2, 24)
    wanted = torch.nn.functional.rms_norm(x, (24,), norm.weight + zero_centered, 1e-4)
    torch.testing.assert_close(norm(x), wanted)
    with pytest.raises(ValueError, match="LayerNorm"):
        LigerMegatronRMSNorm(config(normalization="LayerNorm"), 24)


def test_swiglu_takes_a_bias_and_hands_on_what_it_does_not_do():
    x, bias = torch.randn(3, 2, 16), torch.randn(16)
    gate, up = (x + bias).chunk(2, -1)
    torch.testing.assert_close(LigerMegatronSwiGLU()(x, bias), torch.nn.functional.silu(gate) * up)
    assert LigerMegatronSwiGLU(lambda *given: given)(x, None, True) == (x, None, True, False)
    with pytest.raises(ValueError, match="fallback_impl"):
        LigerMegatronSwiGLU()(x, None, cpu_offload_input=True)


def test_patched_megatron_agrees_with_itself_on_two_ranks():
    pytest.importorskip("megatron.core")
    from support_megatron import differences

    ranks = Ranks(2)
    try:
        for found in ranks(differences):
            for name, (ours, theirs) in found.items():
                torch.testing.assert_close(ours, theirs, msg=lambda m, n=name: f"{n}: {m}")
    finally:
        ranks.stop()
