"""The kernels round where transformers rounds: the forward has its bits, but for sums taken in another order."""

import pytest
import torch
import torch.nn.functional as F

from liger_kernel.transformers.functional import liger_geglu, liger_rms_norm, liger_swiglu

from support import dtypes

# What is not equal is a tie that another order of summation, or another exp, decides the other way. Rounding in another
# place changes every tenth bf16 element or more.
SAME = 0.998
ROWS, COLS = 64, 512


def norm_of(name):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama").LlamaRMSNorm
    gemma = pytest.importorskip("transformers.models.gemma.modeling_gemma").GemmaRMSNorm
    return {"llama": (llama, ("llama", 0.0)), "gemma": (gemma, ("gemma", 1.0))}[name]


def norm(name, dtype, device):
    cls, (mode, offset) = norm_of(name)
    module = cls(COLS, eps=1e-6).to(device, dtype)
    torch.nn.init.normal_(module.weight)
    x = 3 * torch.randn(ROWS, COLS, dtype=dtype, device=device)
    return liger_rms_norm(x, module.weight, 1e-6, offset, mode, False), module(x)


def unit(name, dtype, device):
    a, b = (2 * torch.randn(ROWS, COLS, dtype=dtype, device=device) for _ in range(2))
    if name == "swiglu":
        return liger_swiglu(a, b), F.silu(a) * b
    return liger_geglu(a, b), F.gelu(a, approximate="tanh") * b


@pytest.mark.parametrize("name, pair", [("llama", norm), ("gemma", norm), ("swiglu", unit), ("geglu", unit)])
def test_forward_rounds_where_transformers_does(name, pair, impl, device):
    for dtype in dtypes(impl, device):
        ours, theirs = (t.detach() for t in pair(name, dtype, device))
        # a factor that rounds to its neighbour is off by one unit, and its product by that and its own rounding
        torch.testing.assert_close(ours, theirs, rtol=2 * torch.finfo(dtype).eps * 2, atol=1e-6)
        if dtype is not torch.float32:
            same = (ours == theirs).double().mean().item()
            assert same >= SAME, f"{name} {dtype}: {same:.2%} of the elements are equal"


def test_another_order_of_rounding_would_be_seen():
    x, w = torch.randn(ROWS, COLS).bfloat16(), torch.randn(COLS).bfloat16()
    llama, gemma = (liger_rms_norm(x, w, 1e-6, 0.0, mode, False) for mode in ("llama", "gemma"))
    assert (llama == gemma).double().mean() < 0.9
    a, b = (torch.randn(ROWS, COLS).bfloat16() for _ in range(2))
    late = (F.silu(a.float()) * b.float()).bfloat16()
    assert (liger_swiglu(a, b) == late).double().mean() < 0.9
