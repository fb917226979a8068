"""The older place of the FSDP redirection."""

from liger_kernel.transformers.fsdp import _FSDPForwardRedirection  # noqa: F401
