"""Shared by every test: the interpreter where there is no GPU, one seed, poisoned memory for op tests."""

import importlib.util
import os
import sys

import torch

if (engines := os.environ.get("LIGER_TEST_ENGINES")) and engines not in sys.path:
    sys.path.append(engines)  # of the processes that a test starts as well
ASCEND = importlib.util.find_spec("ascendnpuir") is not None  # the environment of test/npu: its triton has a device
if not torch.cuda.is_available() and not ASCEND:  # before triton is imported: kernels are decorated when they are
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402

from liger_kernel import backends  # noqa: E402
from liger_kernel.ops import core  # noqa: E402

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def small_heads_take_the_engine(monkeypatch):
    """The tests' heads are so small that plain torch would be chosen for them, which a test of its own is about."""
    monkeypatch.setattr("liger_kernel.ops.fused_linear_cross_entropy.SMALL", 0)


@pytest.fixture
def device() -> torch.device:
    """The accelerator of this machine, or the CPU."""
    return torch.device(backends.current().device_type)


@pytest.fixture
def on_device(device):
    """What the test makes without naming a device, models and inputs, is made on the accelerator of this machine."""
    if device.type != "cpu":
        torch.set_default_device(device)
    yield
    torch.set_default_device(None)


@pytest.fixture
def poisoned_memory(monkeypatch):
    """torch.empty returns NaN, so an output that a kernel forgot to write cannot pass."""
    for name in ("empty", "empty_like", "empty_strided"):
        make = getattr(torch, name)

        def poisoned(*args, _make=make, **kwargs):
            made = _make(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        monkeypatch.setattr(torch, name, poisoned)


@pytest.fixture
def fused_calls(monkeypatch) -> list[dict]:
    """The keywords of each call of the fused loss head."""
    from liger_kernel.transformers import functional

    calls = []
    own = functional.liger_fused_linear_cross_entropy

    def counted(*args, **kwargs):
        calls.append(kwargs)
        return own(*args, **kwargs)

    monkeypatch.setattr(functional, "liger_fused_linear_cross_entropy", counted)
    return calls


@pytest.fixture(params=["torch", "triton"])
def impl(request):
    """Each implementation that runs here: the plain-torch pair, and Triton (in its interpreter on a CPU)."""
    core.set_impl(request.param)
    yield request.param
    core.set_impl(None)
