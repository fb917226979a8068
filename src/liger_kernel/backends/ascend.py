"""Huawei's Ascend NPUs, with torch-npu and triton-ascend.

A program runs on one vector core, whose Unified Buffer of 192 KB (910B) or 248 KB (950) holds all its tiles and copies
of them in flight. The grid is one program per core: more are started one after the other, 65 535 at most.
"""

import functools

import torch

from liger_kernel.backends import Backend, guard_of, torch_has, triton_for, while_tracing

_FEWEST_CORES = 40  # 910B3, 910B4; a 910B1 or B2 has 48


@functools.cache
def _cores(index: int) -> int:
    properties = torch.get_device_module("npu").get_device_properties(index)
    found = getattr(properties, "vector_core_num", None)
    if found is None:  # an older torch-npu does not say, triton-ascend does
        from triton.runtime import driver

        found = driver.active.utils.get_device_properties(index).get("num_vectorcore")
    return found or _FEWEST_CORES


@while_tracing
def cores(device: torch.device) -> int:
    return _cores(device.index or 0)


BACKEND = Backend(
    name="ascend",
    device_type="npu",
    is_available=torch_has("npu"),
    why_no_triton=triton_for("npu"),
    cores=cores,
    persistent=True,
    max_programs=65535,
    threads=False,
    tile_bytes=64 * 1024,
    guard=guard_of("npu"),
    arch=lambda device: torch.get_device_module("npu").get_device_name(device),
    driver=lambda device: str(getattr(torch.version, "cann", "unknown")),
    comm="hccl",
)
