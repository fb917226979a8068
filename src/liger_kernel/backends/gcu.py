"""Enflame's GCUs, with torch-gcu and Enflame's Triton: facts only, nothing was run on one."""

import torch

from liger_kernel.backends import Backend, guard_of, torch_has, triton_for, while_tracing


@while_tracing
def cores(device: torch.device) -> int:
    return getattr(torch.get_device_module("gcu").get_device_properties(device), "multi_processor_count", 1)


BACKEND = Backend(
    name="gcu",
    device_type="gcu",
    is_available=torch_has("gcu"),
    why_no_triton=triton_for("gcu"),
    cores=cores,
    max_programs=65535,
    max_warps=4,
    tile_bytes=64 * 1024,
    guard=guard_of("gcu"),
    comm="eccl",
)
