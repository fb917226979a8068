"""AMD GPUs, which torch also calls "cuda". A wavefront is 64 lanes on CDNA: 16 of them are the largest program."""

import torch

from liger_kernel.backends import Backend, cuda, triton_missing

BACKEND = Backend(
    name="rocm",
    device_type="cuda",
    is_available=lambda: torch.version.hip is not None and torch.cuda.is_available(),
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
