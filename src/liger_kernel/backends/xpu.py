"""Intel GPUs, with torch's XPU build and the Triton that comes with it."""

import functools

import torch

from liger_kernel.backends import Backend, guard_of, torch_has, triton_for, while_tracing


@functools.cache
def _properties(index: int):
    return torch.xpu.get_device_properties(index)


@while_tracing
def cores(device: torch.device) -> int:
    return _properties(device.index or 0).gpu_subslice_count


BACKEND = Backend(
    name="xpu",
    device_type="xpu",
    is_available=torch_has("xpu"),
    why_no_triton=triton_for("xpu"),
    cores=cores,
    guard=guard_of("xpu"),
    may_wait=lambda: True,
    arch=lambda device: _properties(device.index or 0).name,
    driver=lambda device: _properties(device.index or 0).driver_version,
    comm="xccl",
)
