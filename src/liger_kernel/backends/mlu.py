"""Cambricon's MLUs, with torch-mlu and Cambricon's Triton: facts only, nothing was run on one."""

import torch

from liger_kernel.backends import Backend, guard_of, torch_has, triton_for, while_tracing


@while_tracing
def cores(device: torch.device) -> int:
    return getattr(torch.get_device_module("mlu").get_device_properties(device), "multi_processor_count", 1)


BACKEND = Backend(
    name="mlu",
    device_type="mlu",
    is_available=torch_has("mlu"),
    why_no_triton=triton_for("mlu"),
    cores=cores,
    persistent=True,
    max_programs=65535,
    threads=False,
    tile_bytes=64 * 1024,  # a core's memory is larger than Ascend's buffer
    guard=guard_of("mlu"),
    comm="cncl",
)
