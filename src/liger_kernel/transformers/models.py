"""The models with a function of their own, `apply_liger_kernel_to_<name>`. Adding one is adding a row.

What is patched inside a model is found by structure and verified by running it (patch.py), so a row says only what
cannot be derived.
"""

from __future__ import annotations

from dataclasses import dataclass, field

APPLY_PREFIX = "apply_liger_kernel_to_"


@dataclass(frozen=True)
class Model:
    """One model family. mlp is the flag that upstream gives its gated MLP; tiny goes over TINY in the tests."""

    mlp: str = "swiglu"
    tiny: dict = field(default_factory=dict)

    def flags(self) -> dict[str, bool]:
        """The flags of the family's function, in upstream's order, with what they come to when they are not given."""
        names = ("rope", "cross_entropy", "fused_linear_cross_entropy", "rms_norm", self.mlp)
        return {name: name != "cross_entropy" for name in names}


TINY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=256, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
HEAD16 = dict(head_dim=16)

MODELS = {
    "gemma": Model("geglu", HEAD16),
    "gemma2": Model("geglu", HEAD16 | dict(query_pre_attn_scalar=16)),
    "gemma3_text": Model("geglu", HEAD16 | dict(query_pre_attn_scalar=16)),
    "granite": Model(tiny=dict(logits_scaling=8.0)),
    "llama": Model(),
    "mistral": Model(),
    "mixtral": Model(tiny=dict(num_local_experts=4, num_experts_per_tok=2, output_router_logits=True)),
    "olmo2": Model(),
    "phi3": Model(),
    "qwen2": Model(),
    "qwen3": Model(tiny=HEAD16),
    "smollm3": Model(),
}


def apply_names() -> list[str]:
    """Every public `apply_liger_kernel_to_<model>` name."""
    return [APPLY_PREFIX + name for name in MODELS]
