"""AMD GPUs of the CDNA kind, which torch also calls "cuda".

A wavefront is 64 lanes: 16 of them are the largest program.
"""

from collections.abc import Callable

import torch

from liger_kernel.backends import Backend, cuda, triton_missing


def has(wavefront: int) -> Callable[[], bool]:
    """is_available for AMD GPUs whose wavefront is of so many lanes: 32 on RDNA (gfx10 to gfx12), 64 on CDNA."""

    def available() -> bool:
        if torch.version.hip is None or not torch.cuda.is_available():
            return False
        arch = cuda.properties(torch.device("cuda")).gcnArchName
        return (32 if arch.startswith("gfx1") else 64) == wavefront

    return available


BACKEND = Backend(
    name="rocm",
    device_type="cuda",
    is_available=has(wavefront=64),
    why_no_triton=triton_missing,
    cores=cuda.cores,
    warp_width=64,
    max_warps=16,
    guard=cuda.guard,
    may_wait=cuda.may_wait,
    arch=lambda device: cuda.properties(device).gcnArchName.split(":")[0],
    driver=lambda device: str(torch.version.hip),
    comm="nccl",
)
