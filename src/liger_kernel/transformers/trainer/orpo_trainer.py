"""The trainer where others import it from, and the older place of the FSDP redirection, which needs no TRL."""

from liger_kernel._lazy import lazy_names
from liger_kernel.transformers.fsdp import _FSDPForwardRedirection  # noqa: F401

__all__, __getattr__ = lazy_names(__name__, {f"{__package__}.orpo": ("LigerORPOTrainer",)})
