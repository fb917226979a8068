"""The models whose function `apply_liger_kernel_to_<name>` has flags of its own. Adding one is adding a row.

What is patched inside a model is found by structure and verified by running it (patch.py), so a row says only what
cannot be derived: the flags that upstream's function takes, in its order, and the types that share it. Every other
type of transformers has a function too, with the flags of `Model()`.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

APPLY_PREFIX = "apply_liger_kernel_to_"
MLP_FLAGS = ("swiglu", "geglu")  # one flag for a model's gated MLPs, whichever activation its configuration chose

_HEAD = "cross_entropy, fused_linear_cross_entropy"
ANY = f"rope, {_HEAD}, rms_norm, layer_norm, swiglu, geglu, relu_squared, model"
DECODER = f"rope, {_HEAD}, rms_norm, swiglu, model"
GEMMA = f"rope, {_HEAD}, rms_norm, geglu, model"
GEMMA_VISION = f"rope, {_HEAD}, layer_norm, rms_norm, geglu, model"
LLAMA_VISION = f"rope, {_HEAD}, layer_norm, rms_norm, swiglu, model"
# upstream's take any keyword and hand it to the function of the text model
VISION = f"{_HEAD}, rms_norm, layer_norm, model, *, rope, swiglu, geglu"


@dataclass(frozen=True)
class Model:
    """One model family: its flags, the types of its parts, and what the tests put over TINY (None: not run by them)."""

    flags: str = ANY
    parts: tuple[str, ...] = ()
    tiny: dict | None = field(default=None, compare=False)

    def parameters(self) -> list[inspect.Parameter]:
        """The parameters of the family's function, with what a flag comes to when it is not given."""
        made: list[inspect.Parameter] = []
        kind: Any = inspect.Parameter.POSITIONAL_OR_KEYWORD
        for name in self.flags.split(", "):
            if name == "*":
                kind = inspect.Parameter.KEYWORD_ONLY
            else:
                default = None if name == "model" else name != "cross_entropy"
                made.append(inspect.Parameter(name, kind, default=default))
        return made


TINY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=256, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
_HEAD16 = dict(head_dim=16)
_GEMMA2 = _HEAD16 | dict(query_pre_attn_scalar=16)
_MIXTRAL = dict(num_local_experts=4, num_experts_per_tok=2, output_router_logits=True)

MODELS = {
    "deepseek_v2": Model(DECODER),
    "deepseek_v3": Model(DECODER),
    "deepseek_v4": Model(DECODER),
    "exaone4": Model(DECODER),
    "falcon_h1": Model(DECODER),
    "gemma": Model(GEMMA, tiny=_HEAD16),
    "gemma2": Model(GEMMA, tiny=_GEMMA2),
    "gemma3": Model(GEMMA_VISION),
    "gemma3_text": Model(GEMMA, tiny=_GEMMA2),
    "gemma4": Model(GEMMA_VISION),
    "gemma4_text": Model(GEMMA),
    "glm4": Model(DECODER),
    "glm4v": Model(DECODER),
    "glm4v_moe": Model(DECODER),
    "gpt_oss": Model(DECODER),
    "granite": Model(DECODER, tiny=dict(logits_scaling=8.0)),
    "hunyuan_v1_dense": Model(DECODER),
    "hunyuan_v1_moe": Model(DECODER),
    "internvl": Model(VISION),
    "llama": Model(DECODER, tiny={}),
    "llama4": Model(f"{DECODER}, layer_norm", parts=("llama4_text",)),
    "llava": Model(f"{_HEAD}, model, *, rope, rms_norm, layer_norm, swiglu, geglu"),
    "ministral": Model(DECODER),
    "mistral": Model(DECODER, tiny={}),
    "mixtral": Model(DECODER, tiny=_MIXTRAL),
    "mllama": Model(LLAMA_VISION, parts=("mllama_text_model",)),
    "muse_glimmer": Model(LLAMA_VISION),
    "nemotron": Model(f"relu_squared, {_HEAD}, model, *, rope, layer_norm"),
    "olmo2": Model(DECODER, tiny={}),
    "olmo3": Model(DECODER),
    "paligemma": Model(GEMMA_VISION),
    "phi3": Model(DECODER, tiny={}),
    "pixtral": Model("rope, rms_norm, swiglu, model"),
    "qwen2": Model(DECODER, tiny={}),
    "qwen2_5_vl": Model(DECODER, parts=("qwen2_5_vl_text",)),
    "qwen2_vl": Model(f"rope, {_HEAD}, rms_norm, layer_norm, swiglu, model", parts=("qwen2_vl_text",)),
    "qwen3": Model(DECODER, tiny=_HEAD16),
    "qwen3_5": Model(DECODER, parts=("qwen3_5_text",)),
    "qwen3_5_moe": Model(DECODER, parts=("qwen3_5_moe_text",)),
    "qwen3_moe": Model(DECODER),
    "qwen3_next": Model(DECODER),
    "qwen3_vl": Model(DECODER, parts=("qwen3_vl_text",)),
    "qwen3_vl_moe": Model(DECODER, parts=("qwen3_vl_moe_text",)),
    "smollm3": Model(DECODER, tiny={}),
    "smolvlm": Model(VISION),
}
FAMILY = {part: name for name, row in MODELS.items() for part in (name, *row.parts)}  # type -> its row
TESTED = [name for name, row in MODELS.items() if row.tiny is not None]


def row_of(model_type: str) -> Model:
    """A type's row, or that of every type without one."""
    return MODELS.get(model_type, Model())


def function_name(model_type: str) -> str:
    """The name of a type's function: "gpt-sw3" -> "apply_liger_kernel_to_gpt_sw3"."""
    return APPLY_PREFIX + model_type.replace("-", "_").replace(".", "_")


def apply_names() -> list[str]:
    """The function names that need no transformers to be known."""
    return [APPLY_PREFIX + name for name in FAMILY]
