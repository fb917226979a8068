"""Puts our norm, cross entropy and SwiGLU into Megatron-Core."""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

from liger_kernel.megatron.cross_entropy import LigerMegatronCrossEntropy
from liger_kernel.megatron.rms_norm import LigerMegatronRMSNorm
from liger_kernel.megatron.swiglu import LigerMegatronSwiGLU

_MARK = "_liger_kernel"
_NORMS = (
    ("megatron.core.transformer.torch_norm", "WrappedTorchNorm"),
    ("megatron.core.extensions.transformer_engine", "TENorm"),
)


def apply_liger_kernel_to_megatron(rms_norm: bool = True, cross_entropy: bool = False, swiglu: bool = False) -> None:
    """Patch Megatron-Core in this process; models built from now on have it, and a second call changes nothing.

    rms_norm: norms of a config with normalization="RMSNorm" are LigerMegatronRMSNorm, with and without Transformer
    Engine (whose fused norm and linear stay). cross_entropy: both of Megatron-Core's functions of logits that are split
    by the vocabulary. swiglu: bias_swiglu_impl. Raises ImportError without megatron-core.
    """
    importlib.import_module("megatron.core")
    if rms_norm:
        for module, name in _NORMS:
            _patch_norm(module, name)
    if cross_entropy:
        _replace("megatron.core.tensor_parallel.cross_entropy", "vocab_parallel_cross_entropy", _plain_cross_entropy)
        _replace(
            "megatron.core.fusions.fused_cross_entropy", "fused_vocab_parallel_cross_entropy", _fused_cross_entropy
        )
    if swiglu:
        _replace("megatron.core.fusions.fused_bias_swiglu", "bias_swiglu_impl", LigerMegatronSwiGLU)


def _plain_cross_entropy(own):
    def vocab_parallel_cross_entropy(vocab_parallel_logits, target, label_smoothing=0.0):
        return LigerMegatronCrossEntropy(label_smoothing=label_smoothing)(vocab_parallel_logits, target)

    return functools.wraps(own)(vocab_parallel_cross_entropy)


def _fused_cross_entropy(own):
    def fused_vocab_parallel_cross_entropy(vocab_parallel_logits, target, tp_group):
        return LigerMegatronCrossEntropy()(vocab_parallel_logits, target, tp_group)

    return functools.wraps(own)(fused_vocab_parallel_cross_entropy)


def _patch_norm(module: str, name: str) -> None:
    """Let the class, which only ever makes others' instances, make ours: specs that hold it already are served too."""
    kind: Any = getattr(importlib.import_module(module), name, None)
    if kind is None or hasattr(kind.__new__, _MARK):
        return
    own = kind.__new__

    def new(cls, config, hidden_size, eps=1e-5, *args, **kwargs):
        if config.normalization == "RMSNorm":
            return LigerMegatronRMSNorm(config, hidden_size, eps)
        return own(cls, config, hidden_size, eps, *args, **kwargs)

    setattr(new, _MARK, True)
    kind.__new__ = staticmethod(new)


def _replace(module: str, name: str, make) -> None:
    """Put make(function) in the place of a function, in every module of Megatron-Core that has imported it."""
    own = getattr(importlib.import_module(module), name)
    if hasattr(own, _MARK):
        return
    ours = make(own)
    setattr(ours, _MARK, True)
    for loaded_name, loaded in list(sys.modules.items()):
        if loaded_name.startswith("megatron.") and getattr(loaded, "__dict__", {}).get(name) is own:
            setattr(loaded, name, ours)
