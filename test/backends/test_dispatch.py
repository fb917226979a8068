"""The device of a tensor decides what runs, for devices that are not here: a fake one takes their names in turn."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from liger_kernel import backends, utils
from liger_kernel.ops import core
from liger_kernel.transformers import functional as F

import fake_device

ROOT = Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(fake_device.cannot_build() is not None, reason=str(fake_device.cannot_build()))

FACTS = {  # device type -> backend, cores, torch.distributed's backend
    "npu": ("ascend", 48, "hccl"),
    "mlu": ("mlu", 12, "cncl"),
    "gcu": ("gcu", 12, "eccl"),
    "acme": ("acme", 1, "gloo"),  # nobody has described it
}


@pytest.fixture(scope="session")
def library():
    return fake_device.build()


def on_device(name, script="on_device.py", **environment):
    command = [sys.executable, Path(__file__).with_name(script), name]
    path = f"{ROOT / 'src'}:{ROOT / 'test'}"
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""} | environment,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs_compiler
@pytest.mark.parametrize("name", FACTS)
def test_the_device_of_a_tensor_decides(name, library):
    pytest.importorskip("triton")
    found = on_device(name, TRITON_INTERPRET="1")
    backend, cores, comm = FACTS[name]
    assert (found["backend"], found["cores"]) == (backend, cores)
    if name != "acme":  # one that nobody has described is not looked for
        assert (found["device"], found["comm"], found["memory"]) == (name, comm, 64)
        assert found["arch"] == ("fake npu" if name == "npu" else name)
    assert found["is_npu"] is (name == "npu")
    pair = "torch" if name == "acme" else "triton"
    assert found["source"] == pair and found["impls"][0] == pair
    assert found["used"] == [["cpu", "torch"], [name, pair], [name, pair], ["cpu", "torch"]]
    assert found["devices"] == [f"{name}:0"] * 2 + [f"{name}:1"] * 2 + ["cpu"] * 2
    assert found["error"] < 1e-5  # fp32 sums of 40 elements, in another order
    assert found["current"] == 0, "a launch on the second device left it current"
    assert found["autocast"] == [f"{name}:0", "torch.float32", True]


@needs_compiler
def test_a_model_on_two_devices_launches_on_each_one_what_lies_there(library):
    for package in ("triton", "transformers", "accelerate"):
        pytest.importorskip(package)
    found = on_device("mlu", "two_devices.py", TRITON_INTERPRET="1")
    for op, launches in found["ops"].items():
        assert launches, f"{op} launched nothing"
        assert all((devices, current) == (["mlu:1"], "mlu:1") for devices, current in launches), (op, launches)
    assert not found["left"] and found["lazy"] == "LazyLogits"
    for devices, current in found["launches"]:
        assert devices == [current]  # a kernel's tensors are on the device that is current while it starts
    assert {current for _, current in found["launches"]} == {"mlu:0", "mlu:1"}
    assert found["current"] == 0 and found["places"] == ["mlu:0", "mlu:1"]
    # fp32 of 24 bits, norm-wise: two layers' sums of some hundred terms in another order
    assert found["loss"] < 1e-6 and max(found["errors"].values()) < 2e-6, found["errors"]
    assert "hidden is on mlu:0 and the weight on mlu:1" in found["refused"]


@needs_compiler
def test_a_triton_for_other_devices_is_not_used(library):
    pytest.importorskip("triton")
    found = on_device("npu", TRITON_INTERPRET="0")
    assert found["source"] == "torch" and found["impls"] == ["torch"]
    assert "the installed triton" in found["why"]
    assert found["used"][1] == ["npu", "torch"]


def test_why_no_triton_names_what_the_installed_one_is_for(monkeypatch):
    driver = pytest.importorskip("triton.runtime").driver
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    class Target:
        backend = "xpu"

    class Active:
        get_current_target = staticmethod(lambda: Target)

    monkeypatch.setattr(type(driver), "active", Active, raising=False)
    assert backends.triton_for("xpu")() is None
    assert "for 'xpu' devices" in backends.triton_for("npu")()


@pytest.mark.parametrize(
    "hip, name, arch", [("6.4", "rocm", "gfx942"), ("6.4", "rdna", "gfx1100"), (None, "cuda", "sm_90")]
)
def test_amd_and_nvidia_share_a_device_type_and_not_their_facts(hip, name, arch, monkeypatch):
    from types import SimpleNamespace

    from liger_kernel.backends import cuda

    properties = SimpleNamespace(multi_processor_count=304, gcnArchName=f"{arch}:sramecc+:xnack-")
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(cuda, "_properties", lambda index: properties)
    monkeypatch.setattr(backends, "_BY_TYPE", {})
    device = torch.device("cuda", 0)
    backend = backends.device_of(device)
    assert (backend.name, backend.cores(device), backend.comm) == (name, 304, "nccl")
    assert (utils.infer_device(), utils.infer_comm_backend(), utils.infer_device_arch()) == ("cuda", "nccl", arch)
    assert backend.warp_width * backend.max_warps == 1024, "a program has 1024 lanes at most"
    assert not utils.is_npu_available()


# Intel GPUs: torch has the name, so no fake device can take it. FakeTensors have the device without the memory.


@pytest.fixture
def fake_mode(monkeypatch):
    from torch._subclasses import FakeTensorMode, fake_tensor

    monkeypatch.setattr(fake_tensor, "init_gpu_context", lambda device: None)  # where there is CUDA it asks for XPU too
    return FakeTensorMode


def test_xpu_tensors_take_the_xpu_backend(monkeypatch, fake_mode):
    monkeypatch.setattr(core, "_resolved", {})
    monkeypatch.setattr(backends, "_BY_TYPE", {})
    assert backends.device_of(torch.device("xpu")).name == "xpu"
    assert core.resolve("rms_norm", "xpu").source in ("torch", "triton")
    with fake_mode():
        x, w = torch.empty(3, 8, device="xpu", dtype=torch.bfloat16), torch.empty(8, device="xpu", dtype=torch.bfloat16)
        core.set_impl("torch")
        try:
            y = F.liger_rms_norm(x, w, 1e-6)
            a = F.liger_swiglu(x, x)
        finally:
            core.set_impl(None)
    for out in (y, a):
        assert (out.device.type, out.dtype, out.shape) == ("xpu", x.dtype, x.shape)


def test_autocast_on_xpu_gives_the_dtypes_that_it_gives_on_a_cpu(fake_mode):
    def dtypes(device):
        x, weight, w = (torch.ones(shape, device=device) for shape in ((3, 8), (16, 8), (16,)))
        with torch.autocast(device, dtype=torch.bfloat16):
            h = torch.nn.functional.linear(x, weight)
            found = h, F.liger_rms_norm(h, w, 1e-6), F.liger_swiglu(h, h), F.liger_layer_norm(h, w, w, 1e-6)
        assert {t.device.type for t in found} == {device}
        return [t.dtype for t in found]

    core.set_impl("torch")
    try:
        expected = dtypes("cpu")
        with fake_mode():
            assert dtypes("xpu") == expected
    finally:
        core.set_impl(None)
    assert expected[0] is torch.bfloat16


def test_a_launch_on_xpu_is_guarded_by_the_device_of_its_tensors(monkeypatch):
    import contextlib

    from liger_kernel.backends import xpu

    entered = []

    @contextlib.contextmanager
    def device(which):
        entered.append(which)
        yield

    monkeypatch.setattr(torch.xpu, "device", device)
    with xpu.BACKEND.guard(torch.device("xpu", 1)):
        assert entered == [torch.device("xpu", 1)]


def test_xpu_facts_are_read_from_torch(monkeypatch):
    from types import SimpleNamespace

    from liger_kernel.backends import xpu

    xpu._properties.cache_clear()
    monkeypatch.setattr(
        torch.xpu, "get_device_properties", lambda index: SimpleNamespace(gpu_subslice_count=56, name=f"Max {index}")
    )
    device = torch.device("xpu", 1)
    assert (xpu.BACKEND.cores(device), xpu.BACKEND.arch(device), xpu.BACKEND.comm) == (56, "Max 1", "xccl")
    xpu._properties.cache_clear()
