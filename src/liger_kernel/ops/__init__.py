"""Public op names, one line per op. Importing this package imports no kernel and no room."""

from liger_kernel._lazy import lazy_names

# room -> the names it offers
EXPORTS: dict[str, tuple[str, ...]] = {
    "attn_res": ("LigerAttnResFunction", "attn_res_backward", "attn_res_forward"),
    "cross_entropy": ("LigerCrossEntropyFunction", "cross_entropy_backward", "cross_entropy_forward"),
    "dyt": ("LigerDyTFunction",),
    "embedding": ("LigerEmbeddingFunction",),
    "fused_add_rms_norm": (
        "LigerFusedAddRMSNormFunction",
        "fused_add_rms_norm_backward",
        "fused_add_rms_norm_forward",
    ),
    "fused_ce_tvd": ("LigerFusedCETVDFunction", "fused_ce_tvd_backward", "fused_ce_tvd_forward"),
    "fused_linear_cross_entropy": (
        "LigerFusedLinearCrossEntropyFunction",
        "fused_linear_cross_entropy_backward",
        "fused_linear_cross_entropy_forward",
    ),
    "fused_linear_jsd": ("LigerFusedLinearJSDFunction", "fused_linear_jsd_backward", "fused_linear_jsd_forward"),
    "fused_linear_kl_div": (
        "LigerFusedLinearKLDivFunction",
        "fused_linear_kl_div_backward",
        "fused_linear_kl_div_forward",
    ),
    "fused_linear_scaled_cross_entropy": (
        "LigerFusedLinearScaledCrossEntropyFunction",
        "LigerFusedLinearScaledCrossEntropyTPFunction",
    ),
    "fused_neighborhood_attention": ("LigerFusedNeighborhoodAttentionFunction",),
    "gated_rms_norm": ("GatedRMSNormFunction",),
    "geglu": ("LigerGELUMulFunction", "geglu_backward", "geglu_forward"),
    "group_norm": ("LigerGroupNormFunction", "group_norm_backward", "group_norm_forward"),
    "relu_squared": ("LigerReLUSquaredFunction", "relu_squared_backward", "relu_squared_forward"),
    "jsd": ("LigerJSDFunction", "jsd_backward", "jsd_forward"),
    "kl_div": ("LigerKLDivLossFunction",),
    "layer_norm": ("LigerLayerNormFunction", "layer_norm_backward", "layer_norm_forward"),
    "mhc_coeffs": ("LigerMHCCoeffsFunction",),
    "mhc_post_res": ("LigerMHCPostResFunction",),
    "mhc_pre": ("LigerMHCPreFunction",),
    "modulated_rms_norm": (
        "LigerModulatedRMSNormFunction",
        "modulated_rms_norm_backward",
        "modulated_rms_norm_forward",
    ),
    "poly_norm": ("LigerPolyNormFunction", "poly_norm_backward", "poly_norm_forward"),
    "rms_norm": ("LigerRMSNormFunction", "rms_norm_backward", "rms_norm_forward"),
    "softmax": ("LigerSoftmaxFunction",),
    "sparsemax": ("LigerSparsemaxFunction",),
    "rope": ("LigerRopeFunction", "rope_backward", "rope_forward"),
    "swiglu": ("LigerFusedGateUpSiLUMulFunction", "LigerSiLUMulFunction", "swiglu_backward", "swiglu_forward"),
    "tvd": ("LigerTVDLossFunction",),
}

# Modules that put rooms together or give their kernels another interface.
FORMS: dict[str, tuple[str, ...]] = {
    "fused_moe": ("LigerFusedMoEFunction",),
    "grpo_loss": ("GrpoLossFunction",),
    "llama4_rope": ("LigerLlama4RopeFunction",),
    "mlp": ("LigerMLPFunction",),
    "multi_token_attention": ("LigerMultiTokenAttentionFunction",),
    "qwen2vl_mrope": ("LigerQwen2VLMRopeFunction",),
    "vocab_parallel_cross_entropy": ("LigerVocabParallelCEFunction",),
    "tiled_mlp": ("LigerTiledMLPFunction", "apply_tiled_mlp"),
}

PARTS = ("head_slabs", "weight_sum")  # pairs inside the head's engine
_HOMES = {f"{__name__}.{module}": names for module, names in (EXPORTS | FORMS).items()}
__all__, __getattr__ = lazy_names(__name__, _HOMES)
