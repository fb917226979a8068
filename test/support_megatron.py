"""What the tests of the Megatron-Core adapters run on every rank."""

from types import SimpleNamespace

import torch
from torch import distributed as dist

from support_ranks import rank_device


def differences() -> dict:
    """{what: (ours, Megatron-Core's own)} of the functions and the norm that are patched, with their gradients."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.fusions import fused_bias_swiglu
    from megatron.core.transformer import mlp, torch_norm

    from liger_kernel.megatron import LigerMegatronRMSNorm, apply_liger_kernel_to_megatron

    parallel_state.initialize_model_parallel(dist.get_world_size())
    place = rank_device()
    generator = torch.Generator().manual_seed(dist.get_rank())
    logits = torch.randn(5, 2, 16, generator=generator).to(place)
    target = torch.randint(0, 32, (5, 2), generator=torch.Generator().manual_seed(9)).to(place)
    packed = torch.randn(5, 2, 16, generator=generator).to(place)
    hidden = torch.randn(5, 2, 8, generator=generator).to(place)
    config = SimpleNamespace(
        normalization="RMSNorm", layernorm_zero_centered_gamma=False, persist_layer_norm=False,
        sequence_parallel=False, memory_efficient_layer_norm=False,
    )  # fmt: skip

    def outcome() -> dict:
        norm = torch_norm.WrappedTorchNorm(config, 8, 1e-5).to(place)
        calls = {
            "cross entropy": (tensor_parallel.vocab_parallel_cross_entropy, logits, (target,)),
            "smoothed cross entropy": (tensor_parallel.vocab_parallel_cross_entropy, logits, (target, 0.1)),
            "swiglu": (mlp.bias_swiglu_impl, packed, (None,)),
            "norm": (norm, hidden, ()),
        }
        found = {"kind of norm": type(norm)}
        for name, (function, x, more) in calls.items():
            x = x.clone().requires_grad_()  # Megatron-Core's cross entropy writes into its logits
            y = function(x.clone(), *more)
            y.backward(torch.linspace(-1, 1, y.numel(), device=place).view_as(y))
            found[name], found[f"gradient of {name}"] = y.detach().cpu(), x.grad.cpu()
        return found

    theirs = outcome()
    apply_liger_kernel_to_megatron(cross_entropy=True, swiglu=True)
    apply_liger_kernel_to_megatron(cross_entropy=True, swiglu=True)
    ours = outcome()
    assert ours.pop("kind of norm") is LigerMegatronRMSNorm
    assert theirs.pop("kind of norm") is torch.nn.RMSNorm
    assert fused_bias_swiglu.bias_swiglu_impl is mlp.bias_swiglu_impl
    return {name: (ours[name], theirs[name]) for name in theirs}
