"""Every room, every case, both implementations, against its own reference in fp64.

An op that lists itself in ops.EXPORTS and has a CONTRACT is tested here and needs no test of its own for any of this.
"""

import importlib

import pytest
import torch
from packaging.version import Version

from liger_kernel.ops import EXPORTS, core
from liger_kernel.selftest import call as run
from liger_kernel.selftest import differentiable, outputs_of

from support import assert_as_good_as_torch, dtypes

# Dynamo of torch 2.11 asserts, and of 2.13 does not, where a size that was dynamic becomes a constant in a Function.
SIZES_MUST_STAY = Version(torch.__version__) < Version("2.13")
OPS = [op for op in EXPORTS if hasattr(importlib.import_module(f"liger_kernel.ops.{op}"), "CONTRACT")]


def contract_of(op):
    return importlib.import_module(f"liger_kernel.ops.{op}").CONTRACT


def check(op, case, dtype, times=1):
    contract = contract_of(op)
    truth_out, truth_grad, upstream = run(contract.reference, case, dtype=torch.float64)
    torch_out, torch_grad, _ = run(contract.reference, case, upstream)
    our_out, our_grad, _ = run(contract.call, case, upstream)
    assert [o.dtype for o in our_out] == [o.dtype for o in torch_out]
    what = f"{op} {case.kwargs} on {[tuple(a.shape) for a in case.args if isinstance(a, torch.Tensor)]}"
    assert_as_good_as_torch(our_out, torch_out, truth_out, dtype, f"{what}: output", times)
    assert_as_good_as_torch(our_grad, torch_grad, truth_grad, dtype, f"{what}: gradient", times)


@pytest.mark.parametrize("op", OPS)
def test_matches_reference(op, impl, device, poisoned_memory):
    for dtype in dtypes(impl, device):
        torch.manual_seed(0)
        for case in contract_of(op).cases(dtype, device):
            check(op, case, dtype)


@pytest.mark.parametrize("op", OPS)
def test_fp64_keeps_its_precision(op, device):
    for case in contract_of(op).cases(torch.float64, device)[:8]:
        check(op, case, torch.float64)


def strided(value):
    """The same values in memory that is contiguous in no dimension."""
    if not isinstance(value, torch.Tensor) or not value.numel():
        return value
    wide = value.new_zeros((*value.shape[:-1], value.shape[-1] * 2)) if value.dim() else value
    if value.dim():
        wide[..., ::2] = value
        return wide[..., ::2]
    return value


@pytest.mark.parametrize("op", OPS)
def test_any_memory_layout(op, impl, device):
    contract = contract_of(op)
    for case in contract.cases(torch.float32, device)[:6]:
        plain, plain_grad, upstream = run(contract.call, case)
        leaves = [strided(a.detach()).requires_grad_() if differentiable(a) else strided(a) for a in case.args]
        outputs = [o for o in outputs_of(contract.call(*leaves, **case.kwargs)) if o is not None]
        grown = [o for o in outputs if o.requires_grad]
        torch.autograd.backward(grown, [strided(g.to(o)) for g, o in zip(upstream, grown, strict=True)])
        # Not bit for bit: torch may pick another GEMM for another layout.
        for o, p in zip(outputs, plain, strict=True):
            torch.testing.assert_close(o, p)
        grads = [a.grad for a in leaves if differentiable(a)]
        for g, p in zip(grads, plain_grad, strict=True):
            torch.testing.assert_close(g, p)


@pytest.mark.parametrize("op", OPS)
def test_inputs_and_upstream_gradients_are_left_alone(op, impl, device):
    contract = contract_of(op)
    for case in contract.cases(torch.float32, device)[:6]:
        before = [a.clone() if isinstance(a, torch.Tensor) else a for a in case.args]
        leaves = [a.detach().requires_grad_() if differentiable(a) else a for a in case.args]
        grown = [o for o in outputs_of(contract.call(*leaves, **case.kwargs)) if o is not None and o.requires_grad]
        upstream = [torch.randn_like(o) for o in grown]
        copies = [g.clone() for g in upstream]
        torch.autograd.backward(grown, upstream)
        for a, b in zip([*case.args, *upstream], [*before, *copies], strict=True):
            if isinstance(a, torch.Tensor):
                assert torch.equal(a, b), f"{op} wrote into a tensor it was only given to read"


@pytest.mark.parametrize("op", OPS)
def test_same_inputs_same_bits(op, impl, device):
    contract = contract_of(op)
    for case in contract.cases(torch.float32, device)[:4]:
        first, first_grad, upstream = run(contract.call, case)
        again, again_grad, _ = run(contract.call, case, upstream)
        for a, b in zip([*first, *first_grad], [*again, *again_grad], strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("op", OPS)
def test_compiles_into_one_graph(op, device):
    contract = contract_of(op)
    torch._dynamo.reset()
    core.set_impl(None)  # nothing resolved yet: dispatch must trace from cold
    for case in contract.cases(torch.float32, device)[:2]:
        if SIZES_MUST_STAY:
            torch._dynamo.reset()
        # inductor on a GPU, where the Triton launches must survive it; on a CPU its C++ build would only cost time
        compiled = torch.compile(
            contract.call, fullgraph=True, backend="inductor" if device.type != "cpu" else "aot_eager"
        )
        ours, our_grad, upstream = run(compiled, case)
        eager, eager_grad, _ = run(contract.call, case, upstream)
        for a, b in zip([*ours, *our_grad], [*eager, *eager_grad], strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_never_waits_for_the_device_and_can_be_captured(op, device):
    contract = contract_of(op)
    case = contract.cases(torch.bfloat16, device)[0]
    results, _, upstream = run(contract.call, case)  # compiled, and every lazy initialisation done
    grown = [o for o in results if o.requires_grad]
    upstream = [g.to(o) for g, o in zip(upstream, grown, strict=True)]
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(contract.call, case, upstream)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    leaves = [a.detach().requires_grad_() if differentiable(a) else a for a in case.args]

    def step():
        grown = [o for o in outputs_of(contract.call(*leaves, **case.kwargs)) if o is not None and o.requires_grad]
        wanted, upstream = [a for a in leaves if differentiable(a)], [torch.ones_like(o) for o in grown]
        return [g for g in torch.autograd.grad(grown, wanted, upstream, allow_unused=True) if g is not None]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        expected = [g.clone() for g in step()]
    assert expected
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
