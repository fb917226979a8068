"""Plain CPU. The torch pairs are the product here; Triton runs in its interpreter, for tests."""

import os

from liger_kernel.backends import Backend, triton_missing


def _interpreter_only() -> str | None:
    if why := triton_missing():
        return why
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "on a CPU Triton runs in its interpreter only, which needs TRITON_INTERPRET=1"


BACKEND = Backend(
    name="cpu",
    device_type="cpu",
    is_available=lambda: True,
    why_no_triton=_interpreter_only,
    may_wait=lambda: True,
    small_head=1 << 16,  # one thread, T H V: 64 64 512 1.0 ms against 3.2; 128 256 1000 8.0 against 7.7
    cores=lambda device: 4,  # programs of a persistent kernel in the interpreter: more than one, so that tests see it
)
