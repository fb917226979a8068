"""Intel GPUs."""

import torch

from liger_kernel.backends import Backend, triton_missing

BACKEND = Backend(
    name="xpu",
    device_type="xpu",
    is_available=lambda: hasattr(torch, "xpu") and torch.xpu.is_available(),
    why_no_triton=triton_missing,
    cores=lambda device: torch.xpu.get_device_properties(device).max_compute_units,
    max_warps=32,
    guard=lambda device: torch.xpu.device(device),
    arch=lambda device: torch.xpu.get_device_properties(device).name,
    comm="xccl",
)
