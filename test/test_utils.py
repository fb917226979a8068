"""The helper modules that other projects import: liger_kernel.utils, ops.utils, ops.backends."""

import operator

import pytest
import torch

from liger_kernel import backends, utils
from liger_kernel.ops import utils as ops_utils
from liger_kernel.ops.backends import (
    IMPL_REGISTRY,
    LIGER_KERNEL_IMPL_ENV,
    ImplInfo,
    register_impl,
    registry,
    select_impl,
)

# liger_kernel.utils


def test_device_facts_are_those_of_the_backend(device):
    backend = backends.current()
    assert utils.infer_device() == device.type
    assert utils.infer_comm_backend() == backend.comm
    assert utils.infer_device_arch() == backend.arch(torch.device(device.type, 0))
    assert utils.is_npu_available() is False
    assert utils.PEFT_AVAILABLE is utils.is_peft_available()


def test_total_memory_of_no_accelerator_raises(device):
    if device.type == "cpu":
        with pytest.raises(RuntimeError, match="no accelerator"):
            utils.get_total_gpu_memory()
    else:
        assert 1 <= utils.get_total_gpu_memory() < 1024


@pytest.mark.parametrize("required, expected", [("4.0.0", ("after", 2)), ("99.0.0", ("before", 1))])
def test_transformers_version_dispatch(required, expected):
    def say(word, number=0):
        return word, number

    found = utils.transformers_version_dispatch(
        required, say, say, ("before",), ("after",), {"number": 1}, {"number": 2}
    )
    assert found == expected


# liger_kernel.ops.utils


def test_ensure_contiguous_leaves_what_is_no_tensor():
    @ops_utils.ensure_contiguous
    def forward(ctx, x, n, y=None):
        return ctx, x.is_contiguous(), n, y.is_contiguous()

    x = torch.ones(3, 4).T
    assert forward("ctx", x, 5, y=x) == ("ctx", True, 5, True)
    assert forward.__name__ == "forward"


@pytest.mark.parametrize("n, block", [(1, 1), (2, 2), (3, 4), (4096, 4096), (4097, 8192), (65536, 65536)])
def test_calculate_settings_holds_the_row(n, block):
    found, warps = ops_utils.calculate_settings(n)
    assert found == block
    assert warps in (4, 8, 16, 32) and warps <= backends.current().max_warps


def test_calculate_settings_refuses_a_row_too_long():
    with pytest.raises(RuntimeError, match="65537"):
        ops_utils.calculate_settings(65537)


def test_compare_version():
    assert ops_utils.compare_version("torch", operator.ge, "2.0.0")
    assert not ops_utils.compare_version("torch", operator.lt, "2.0.0")
    assert not ops_utils.compare_version("no_such_package", operator.ge, "0")


def test_custom_functions_see_autocast_of_this_device(device):
    class Double(torch.autograd.Function):
        @staticmethod
        @ops_utils.amp_custom_fwd
        def forward(ctx, x):
            ctx.autocast = torch.is_autocast_enabled(device.type)
            return x * 2

        @staticmethod
        @ops_utils.amp_custom_bwd
        def backward(ctx, dy):
            assert torch.is_autocast_enabled(device.type) == ctx.autocast
            return dy * 2

    x = torch.ones(2, requires_grad=True, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = Double.apply(x)
    y.sum().backward()
    assert x.grad.tolist() == [2.0, 2.0]


def test_facts_of_devices_that_are_not_here(device):
    assert ops_utils.is_hip() == (torch.version.hip is not None)
    assert ops_utils.get_npu_core_count(default=7) == 7
    with ops_utils.device_context(device):
        assert torch.ones(1, device=device).device.type == device.type
    arguments = {"num_warps": 4}
    ops_utils.set_large_grf_mode(arguments)
    assert arguments == {"num_warps": 4, "grf_mode": "large"}


def test_torch_to_triton_dtype():
    tl = pytest.importorskip("triton.language")
    names = ops_utils.torch_to_triton_dtype
    assert names == {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@pytest.mark.parametrize("columns", [1, 5, 40])
def test_element_mul_kernel_multiplies_in_place(columns, device):
    x = torch.randn(3, columns, device=device)
    expected = x * 2.5
    factor = torch.tensor(2.5, device=device)
    ops_utils.element_mul_kernel[(3,)](x, x.stride(0), factor, columns, BLOCK_SIZE=16, num_warps=4)
    assert torch.equal(x, expected)


def test_element_mul_kernel_takes_strided_columns(device):
    x = torch.randn(7, 3, device=device)
    expected = x * -2
    ops_utils.element_mul_kernel[(3,)](x, 1, torch.tensor(-2.0, device=device), 7, BLOCK_SIZE=4, X_col_stride=3)
    assert torch.equal(x, expected)


def test_unknown_name_of_ops_utils():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ops_utils.__getattr__("nothing")


# liger_kernel.ops.backends


def test_registry_is_one_object_and_holds_none_of_ours():
    assert IMPL_REGISTRY is registry.IMPL_REGISTRY
    assert IMPL_REGISTRY == {}
    assert LIGER_KERNEL_IMPL_ENV == "LIGER_KERNEL_IMPL"


def test_registering_says_that_it_runs_nothing(monkeypatch):
    monkeypatch.setattr(registry, "IMPL_REGISTRY", {})
    info = ImplInfo("acme", devices=("acme", "cpu"), default_devices=("acme",), module_path="acme.ops")
    with pytest.warns(UserWarning, match="runs no op"):
        register_impl(info)
    assert [*registry.IMPL_REGISTRY.items()] == [("acme", info)]
    assert select_impl("acme") is info
    assert select_impl("cpu") is None
    assert select_impl("cpu", "acme") is info
    with pytest.raises(ValueError, match="acme, cpu, not on 'moon'"):
        select_impl("moon", "acme")
    with pytest.raises(ValueError, match=r"known: \['acme'\]"):
        select_impl("cpu", "other")


def test_backends_offers_what_upstreams_does():
    from liger_kernel import backends
    from liger_kernel.ops import core

    assert (backends.available_impls, backends.get_impl, backends.set_impl) == (
        core.available_impls, core.get_impl, core.set_impl,
    )  # fmt: skip
    with pytest.raises(AttributeError, match="no_such"):
        backends.no_such  # noqa: B018
