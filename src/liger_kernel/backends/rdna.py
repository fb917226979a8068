"""AMD GPUs of the RDNA kind: ROCm's, with wavefronts of 32 lanes."""

from dataclasses import replace

from liger_kernel.backends import rocm

BACKEND = replace(rocm.BACKEND, name="rdna", is_available=rocm.has(wavefront=32), warp_width=32, max_warps=32)
