"""Modules, functionals and model patching for Hugging Face transformers. Importing this imports none of them."""

from __future__ import annotations

import importlib
import importlib.util

from liger_kernel import _lazy
from liger_kernel.transformers.models import APPLY_PREFIX, apply_names

_HERE = "liger_kernel.transformers"
_MODULES = {
    f"{_HERE}.cross_entropy": ("LigerCrossEntropyLoss",),
    f"{_HERE}.dyt": ("LigerDyT",),
    f"{_HERE}.fused_add_rms_norm": ("LigerFusedAddRMSNorm",),
    f"{_HERE}.fused_ce_tvd": ("LigerFusedCETVDLoss",),
    f"{_HERE}.fused_linear_cross_entropy": ("LigerFusedLinearCrossEntropyLoss",),
    f"{_HERE}.fused_linear_jsd": ("LigerFusedLinearJSD",),
    f"{_HERE}.fused_linear_kl_div": ("LigerFusedLinearKLDivLoss",),
    f"{_HERE}.geglu": ("LigerGEGLUMLP",),
    f"{_HERE}.jsd": ("LigerJSD",),
    f"{_HERE}.kl_div": ("LigerKLDIVLoss",),
    f"{_HERE}.layer_norm": ("LigerLayerNorm",),
    f"{_HERE}.llama4_rope": ("liger_llama4_text_rotary_pos_emb", "liger_llama4_vision_rotary_pos_emb"),
    f"{_HERE}.mhc": ("LigerMHC",),
    f"{_HERE}.mlp": ("LigerFalconH1MLP", "LigerMLP"),
    f"{_HERE}.modulated_rms_norm": ("LigerModulatedRMSNorm",),
    f"{_HERE}.multi_token_attention": ("LigerMultiTokenAttention",),
    f"{_HERE}.poly_norm": ("LigerPolyNorm",),
    f"{_HERE}.qwen2vl_mrope": ("liger_multimodal_rotary_pos_emb",),
    f"{_HERE}.relu_squared": ("LigerReLUSquared",),
    f"{_HERE}.rms_norm": (
        "LigerRMSNorm", "LigerRMSNormForMuseGlimmer", "LigerRMSNormForMuseGlimmerTextCentered",
    ),
    f"{_HERE}.rope": ("liger_rotary_pos_emb",),
    f"{_HERE}.softmax": ("LigerSoftmax",),
    f"{_HERE}.sparsemax": ("LigerSparsemax",),
    f"{_HERE}.swiglu": (
        "LigerBlockSparseTop2MLP", "LigerExperts", "LigerFalconH1SwiGLUMLP", "LigerPhi3SwiGLUMLP",
        "LigerQwen3MoeSwiGLUMLP", "LigerSwiGLUMLP", "LigerSwiGLUMLPForMuseGlimmer",
    ),
    f"{_HERE}.tiled_mlp": ("LigerTiledGEGLUMLP", "LigerTiledSwiGLUMLP"),
    f"{_HERE}.tvd": ("LigerTVDLoss",),
    f"{_HERE}.vocab_parallel_cross_entropy": ("LigerVocabParallelCrossEntropy",),
}  # fmt: skip
_ENGINE = {  # these need transformers
    f"{_HERE}.auto_model": ("AutoLigerKernelForCausalLM",),
    f"{_HERE}.monkey_patch": ("_apply_liger_kernel", "_apply_liger_kernel_to_instance", *apply_names()),
    f"{_HERE}.patch": ("apply_liger_kernel", "revert_liger_kernel"),
}

__all__, _resolve = _lazy.lazy_names(__name__, _MODULES | _ENGINE)
_NEEDS_TRANSFORMERS = {name for names in _ENGINE.values() for name in names}


def is_transformers_available() -> bool:
    """Whether Hugging Face transformers can be imported here."""
    return importlib.util.find_spec("transformers") is not None


def __getattr__(name: str):
    if name in _NEEDS_TRANSFORMERS and not is_transformers_available():
        raise ImportError(f"{__name__}.{name} needs transformers: pip install 'liger-kernel[train]'")
    if name.startswith(APPLY_PREFIX) and is_transformers_available():  # of a type without a row
        return getattr(importlib.import_module(f"{_HERE}.monkey_patch"), name)
    return _resolve(name)


def __dir__():
    return [*__all__, APPLY_PREFIX + "<model_type>"]
