"""The device of a tensor decides what runs, for devices that are not here: a fake one takes their names in turn."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from liger_kernel import backends
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
        command, env=os.environ | {"PYTHONPATH": path} | environment, capture_output=True, text=True, timeout=300
    )
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


# Intel GPUs: torch has the name, so no fake device can take it. FakeTensors have the device without the memory.


def test_xpu_tensors_take_the_xpu_backend(monkeypatch):
    monkeypatch.setattr(core, "_resolved", {})
    monkeypatch.setattr(backends, "_BY_TYPE", {})
    assert backends.device_of(torch.device("xpu")).name == "xpu"
    assert core.resolve("rms_norm", "xpu").source in ("torch", "triton")
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        x, w = torch.empty(3, 8, device="xpu", dtype=torch.bfloat16), torch.empty(8, device="xpu", dtype=torch.bfloat16)
        core.set_impl("torch")
        try:
            y = F.liger_rms_norm(x, w, 1e-6)
            a = F.liger_swiglu(x, x)
        finally:
            core.set_impl(None)
    for out in (y, a):
        assert (out.device.type, out.dtype, out.shape) == ("xpu", x.dtype, x.shape)


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
