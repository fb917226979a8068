"""The Triton kernels, one file per op. Imported at the first Triton dispatch, never by `import liger_kernel`."""

import triton
from packaging.version import Version

if Version(triton.__version__) < Version("3.2"):
    raise ImportError(f"liger_kernel needs triton >= 3.2 for its kernels, found {triton.__version__}")
