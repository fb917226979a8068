"""The functional forms, `liger_<op>`: each is defined in its op's room and resolved at first use.

Looked up late on this module object: a replaced attribute takes effect in everything that calls it.
"""

from __future__ import annotations

from liger_kernel._lazy import lazy_names

_OPS = "liger_kernel.ops"

__all__, __getattr__ = lazy_names(
    __name__,
    {
        f"{_OPS}.attn_res": ("liger_attn_res",),
        f"{_OPS}.cross_entropy": ("CrossEntropyOutput", "liger_cross_entropy"),
        f"{_OPS}.dyt": ("liger_dyt",),
        f"{_OPS}.fused_add_rms_norm": ("liger_fused_add_rms_norm",),
        f"{_OPS}.fused_linear_cross_entropy": ("liger_fused_linear_cross_entropy",),
        f"{_OPS}.fused_linear_jsd": ("liger_fused_linear_jsd",),
        f"{_OPS}.fused_linear_kl_div": ("liger_fused_linear_kl_div",),
        f"{_OPS}.fused_linear_scaled_cross_entropy": (
            "liger_fused_linear_logprobs", "liger_fused_linear_scaled_cross_entropy_tp",
        ),
        f"{_OPS}.fused_neighborhood_attention": ("liger_fused_neighborhood_attention",),
        f"{_OPS}.gated_rms_norm": ("liger_gated_rms_norm",),
        f"{_OPS}.geglu": ("liger_geglu",),
        f"{_OPS}.group_norm": ("liger_group_norm",),
        f"{_OPS}.jsd": ("liger_jsd",),
        f"{_OPS}.kl_div": ("liger_kl_div",),
        f"{_OPS}.layer_norm": ("liger_layer_norm",),
        f"{_OPS}.mhc": ("liger_mhc_apply", "liger_mhc_forward"),
        f"{_OPS}.mhc_coeffs": ("liger_mhc_coeffs",),
        f"{_OPS}.mhc_post_res": ("liger_mhc_post_res",),
        f"{_OPS}.mhc_pre": ("liger_mhc_pre",),
        f"{_OPS}.modulated_rms_norm": ("liger_modulated_rms_norm",),
        f"{_OPS}.multi_token_attention": ("liger_multi_token_attention",),
        f"{_OPS}.poly_norm": ("liger_poly_norm",),
        f"{_OPS}.qwen2vl_mrope": ("liger_qwen2vl_mrope",),
        f"{_OPS}.relu_squared": ("liger_relu_squared",),
        f"{_OPS}.rms_norm": ("liger_rms_norm",),
        f"{_OPS}.rope": ("liger_rope",),
        f"{_OPS}.softmax": ("liger_softmax",),
        f"{_OPS}.sparsemax": ("liger_sparsemax",),
        f"{_OPS}.swiglu": ("liger_swiglu",),
        f"{_OPS}.vocab_parallel_head": ("liger_vocab_parallel_logprobs",),
        f"{_OPS}.tvd": ("liger_tvd",),
    },
)  # fmt: skip
