"""Tiny random models of every type in transformers: the default configuration with its sizes made small."""

import dataclasses
import inspect

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB, HEADS, KV_HEADS, HEAD_DIM = 128, 4, 2, 16
FIRST_WORD = 40  # token ids below are special ones
SEQ = 12

# size -> the fields of configurations that are set to it
_FIELDS = {
    0: """num_kv_shared_layers num_nextn_predict_layers""",
    1: """first_k_dense_replace mamba_n_groups moe_layer_end_index n_group n_groups n_layers_per_attn_res_block
        num_hash_layers num_random_blocks split_ngram_parts topk_group""",
    2: """centroid_intermediate_top_k decoder_layers depth depths_text encoder_layers heads_per_ngram
        index_kpool index_n_heads index_topk_blocks linear_num_key_heads max_window_layers merge_size moe_k
        moe_top_k moe_topk n_layer n_layers num_blocks num_codebooks num_decoder_layers num_encoder_layers
        num_experts_per_tok num_global_key_value_heads num_global_layers num_hidden_layers num_kv_heads
        num_layers num_quantizers o_groups spatial_merge_size swa_num_key_value_heads top_k zero_expert_num""",
    4: """attention_heads d_rel decoder_attention_heads encoder_attention_heads gated_norm_rank index_topk
        linear_num_heads linear_num_value_heads moe_num_experts n_head n_heads n_mamba_heads n_routed_experts
        num_attention_heads num_decoder_attention_heads num_encoder_attention_heads num_experts num_filters
        num_heads num_local_experts prompt_length swa_num_attention_heads""",
    8: """adapter_rank attention_window_size block_size hc_lowrank index_block_size laurel_rank local_attention
        make_ngram_vocab_size_divisible_by mamba_dt_rank mamba_n_heads mamba_num_heads num_centroids patch_size
        rotary_dim sliding_window sliding_window_size time_step_rank window_size""",
    16: """attention_head_dim attention_head_size chunk_size d_head d_kv dim_head global_head_dim head_dim
        hidden_size_per_layer_input input_size kv_channels kv_lora_rank linear_head_dim linear_key_head_dim
        linear_value_head_dim local_attention_window_len mamba_chunk_size mamba_d_head mamba_d_state
        mamba_head_dim num_mel_bins num_position_embeddings o_lora_rank ple_embed_dim q_lora_rank
        qk_nope_head_dim qk_rope_head_dim query_pre_attn_scalar rel_extent ssm_state_size state_size
        swa_head_dim v_head_dim""",
    32: """attention_chunk_size codebook_size codebook_vocab_size dim_model_base expert_ffn_hidden_size
        image_size index_head_dim moe_intermediate_size moe_shared_expert_intermediate_size
        original_max_position_embeddings qk_head_dim router_hidden_size shared_expert_intermediate_size
        shared_experts_intermediate_size shared_intermediate_size""",
    64: """adapter_out_dim attention_hidden_size audio_hidden_size audio_vocab_size backbone_hidden_size
        codebook_dim context_length cross_attention_hidden_size d_inner_text decoder_hidden_size d_model dim
        emb_dim embed_dim embed_proj_dim embedding_dim embedding_size encoder_hash_byte_group_vocab
        encoder_hidden_size floor_scale hidden_dim hidden_size hidden_size_global input_embedding_size
        keep_window_size lm_head_size lru_width max_position_embeddings max_seq_len max_source_positions
        max_target_positions multimodal_hidden_size n_ctx n_embd n_positions ngram_vocab_size_base
        out_hidden_size output_embedding_size projection_dim projector_hidden_size projector_input_dim
        projector_output_dim qformer_hidden_size text_hidden_size vision_hidden_size vision_output_dim
        word_embed_proj_dim""",
    96: """d_ff decoder_ffn_dim dense_intermediate_size dff dim_ff encoder_ffn_dim feed_forward_size ffn_dim
        ffn_hidden_size intermediate_size intermediate_size_mlp mlp_dim n_inner""",
    128: """decoder_vocab_size mamba_d_ssm pronunciation_vocab_size shape_vocab_size unpadded_vocab_size
        vocab_size vocab_size_per_layer_input""",
}  # fmt: skip
SIZES = {field: size for size, fields in _FIELDS.items() for field in fields.split()}
_PER_LAYER = {
    "layer_types", "mlp_layer_types", "layers_block_type", "indexer_types", "num_attention_heads_per_layer",
    "no_rope_layers", "layer_rope_theta", "activation_sparsity_pattern", "attn_layers", "block_types", "layer_groups",
}  # fmt: skip
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")

# What a rule above would get wrong, and what a default configuration leaves to the checkpoint.
_MROPE = dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3]))
_MROPE_HALF = dict(rope_parameters=_MROPE["rope_parameters"] | dict(mrope_section=[1, 1, 2], partial_rotary_factor=0.5))
OVERRIDES: dict[str, dict] = {
    "apertus1p5": dict(image_token_offset=32, audio_token_offset=64),
    "bailing_hybrid": dict(first_k_dense_replace=1),
    "chameleon": dict(vocabulary_map={"<image>": 3, "<pad>": 4, "IMGIMGAZ": 5}),
    "cohere_compass_text": dict(rope_parameters={
        kind: dict(rope_type="default", rope_theta=1e4) for kind in ("full_attention", "sliding_attention")
    }),
    "blip-2": dict(image_token_index=3, num_query_tokens=2),
    "dbrx": dict(attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8)),
    "deepseek_ocr2_text": dict(mlp_layer_types=["dense", "sparse"], num_experts_per_tok=2, n_group=1, topk_group=1),
    "deepseek_v2": dict(num_experts_per_tok=2, num_key_value_heads=HEADS, n_group=1, topk_group=1),
    "diffusion_gemma_text": dict(num_experts=4, top_k_experts=2, moe_intermediate_size=32),
    "dots1": dict(n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1),
    "dots3_note_audio_encoder": dict(adapter_input_size=64),
    "dots3_note_vision_encoder": dict(adapter_in_dim=64, mlp_layer_types=["dense", "sparse"]),
    "ernie4_5_vl_moe_text": dict(rope_parameters=_MROPE["rope_parameters"] | dict(mrope_section=[3, 3, 2])),
    "FunAsrNanoAdaptorConfig": dict(intermediate_size=16),
    "gemma3": dict(mm_tokens_per_image=4),
    "gemma3n_text": dict(intermediate_size=96),
    "git_vision_model": dict(image_size=16),
    "glm4v_moe_text": _MROPE_HALF,
    "glm5_next_text": dict(qk_rope_head_dim=0, head_dim=0),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "granite4_vision": dict(deepstack_layer_map=[[0, 0]], downsample_rate="2/4"),
    "hunyuan_v1_dense": dict(head_dim=HEAD_DIM),
    "hunyuan_v1_moe": dict(head_dim=HEAD_DIM, moe_topk=2, num_experts=4),
    "hunyuan_vl_text": _MROPE | dict(head_dim=HEAD_DIM),
    "instructblip": dict(image_token_index=3, num_query_tokens=2),
    "instructblipvideo": dict(video_token_index=3, num_query_tokens=2),
    "kosmos-2": dict(latent_query_num=2),
    "llama4_vision_model": dict(intermediate_size=256),
    "lfm2_moe": dict(layer_types=["conv", "full_attention", "conv", "full_attention"], num_hidden_layers=4),
    "mamba2": dict(num_heads=8, head_dim=16),
    "mimi": dict(upsample_groups=1),
    "ministral": dict(head_dim=HEAD_DIM),
    "mllama_vision_model": dict(intermediate_layers_indices=[0], vision_output_dim=128),
    "mllama_text_model": dict(cross_attention_layers=[1]),
    "molmo2_adapter": dict(vision_feature_layer=[1, 0]),
    "muse_glimmer": dict(out_hidden_size=256),
    "muse_spark": dict(out_hidden_size=256),
    "muse_spark_audio": dict(num_hidden_layers=4, hidden_sizes=(16, 32, 32, 64)),
    "musicgen_decoder": dict(dropout=0.0),
    "nemotron": dict(head_dim=HEAD_DIM, num_key_value_heads=KV_HEADS),
    "radio": dict(video_temporal_patch_size=2),
    "qwen4_exp_text": dict(indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=8,
                           indexer_compress_ratio=4),
    "qwen2_5_vl_vision": dict(window_size=32),
    "reformer": dict(is_decoder=True, axial_pos_shape=[2, SEQ // 2], axial_pos_embds_dim=[32, 32]),
    "step3p5": dict(sliding_window=8),
    "udop": dict(decoder_start_token_id=0),
    "vision-encoder-decoder": dict(pad_token_id=0, decoder_start_token_id=1),
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(attention_hidden_size=128, num_hidden_layers=4, layers_block_type=["mamba", "hybrid"] * 2),
    "zaya": dict(num_experts_per_tok=1),
} | dict.fromkeys(
    ["glm4v_text", "glm46v_text", "glm_ocr_text", "glmga_text", "paddleocr_vl_text", "qwen2_5_omni_text",
     "qwen2_5_vl_text", "qwen2_vl_text"], _MROPE
)  # fmt: skip

_A_DRAFT = "drafts for another model, whose caches it takes"
_BY_ITS_PARTS = "its class has no forward; its thinker is a type of its own"
NOT_RUN = {
    "evolla": "reads proteins, and transformers' auto classes do not build it",
    "fast_vlm": "needs timm for its vision tower",
    "gemma3n": "needs timm for its vision tower; gemma3n_text is its language model",
    "gemma4_assistant": _A_DRAFT,
    "gemma4_unified_assistant": _A_DRAFT,
    "inkling_mm_model": "needs scipy for its vision tower; inkling_text is its language model",
    "perception_lm": "needs timm for its vision tower",
    "pi0": "moves a robot: its loss is of actions, not of words",
    "qwen2_5_omni": _BY_ITS_PARTS,
    "qwen3_omni_moe": _BY_ITS_PARTS,
}


def causal_types() -> list[str]:
    return sorted(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def multimodal_types() -> list[str]:
    mappings = ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES")
    return sorted({t for name in mappings for t in getattr(modeling_auto, name, {})})


def fields_of(kind: type) -> set[str]:
    """What a configuration's constructor takes: it is a dataclass in transformers 5.2 and later, a class before."""
    if dataclasses.is_dataclass(kind) and "__init__" not in vars(kind):
        return {f.name for f in dataclasses.fields(kind) if f.init}
    return set(inspect.signature(kind.__init__).parameters)


def tiny_config(model_type: str):
    return _shrunk(CONFIG_MAPPING[model_type]())


def _shrunk(default):
    kind, old = type(default), dict(vars(default))
    old |= {n: old[kept] for n, kept in kind.attribute_map.items() if kept in old}  # kept under another name
    taken = fields_of(kind)
    new = {name: _size(name, old[name]) for name in taken & SIZES.keys() & old.keys() if _is_size(old[name])}
    new |= {name: 0.0 for name in taken & old.keys() if "drop" in name and isinstance(old[name], float)}
    if "num_key_value_heads" in taken and (kv := old.get("num_key_value_heads")) is not None:
        new["num_key_value_heads"] = HEADS if kv == old.get("num_attention_heads") else KV_HEADS
    new |= _fewer_layers(taken, old)
    tokens = (n for n in sorted(taken & old.keys()) if n.endswith(("token_id", "token_index")))
    new |= {n: 3 + i for i, n in enumerate(tokens) if isinstance(old[n], int) and old[n] >= VOCAB - 8}
    if isinstance(old.get("eos_token_id"), (list, tuple)):
        new["eos_token_id"] = [2]
    if isinstance(old.get("rope_parameters"), dict):
        new["rope_parameters"] = _shrunk_rope(old["rope_parameters"])
    for name in getattr(kind, "sub_configs", {}):
        if (part := old.get(name)) is None and hasattr(sub := kind.sub_configs[name], "model_type"):
            part = sub()  # left out by default
        if hasattr(part, "to_dict"):
            new[name] = _shrunk(part) if dataclasses.is_dataclass(part) else _shrunk(part).to_dict()
    new |= OVERRIDES.get(kind.model_type or kind.__name__, {})
    if "rope_parameters" not in taken and "rope_scaling" in taken and "rope_parameters" in new:
        new["rope_scaling"] = new.pop("rope_parameters")  # its name in transformers 4
    return kind(**new)


def _is_size(value) -> bool:
    return type(value) is int or isinstance(value, (list, tuple)) and bool(value) and type(value[0]) is int


def _size(name, value):
    return SIZES[name] if type(value) is int else type(value)([SIZES[name]] * len(value))


def _fewer_layers(taken, old) -> dict:
    """Lists with an entry per layer, cut to at most six layers that show every combination."""
    lists = {
        n: old[n] for n in taken & _PER_LAYER & old.keys() if isinstance(old[n], (list, tuple)) and len(old[n]) > 2
    }
    if not lists:
        return {}
    depth = max(map(len, lists.values()))
    lists = {n: v for n, v in lists.items() if len(v) == depth}
    first = {}
    for i, combination in enumerate(zip(*lists.values())):
        first.setdefault(str(combination), i)
    kept = sorted(first.values())[:6] if len(first) > 1 else [0, 1]
    new = {n: [v[i] for i in kept] for n, v in lists.items()}
    if "num_attention_heads_per_layer" in new:
        new["num_attention_heads_per_layer"] = [HEADS] * len(kept)
    return new | {n: len(kept) for n in _DEPTHS if n in taken}


def _shrunk_rope(rope: dict) -> dict:
    if any(isinstance(v, dict) for v in rope.values()):  # one per kind of layer
        return {k: _shrunk_rope(v) if isinstance(v, dict) else v for k, v in rope.items()}
    new = dict(rope)
    if "original_max_position_embeddings" in new:
        new["original_max_position_embeddings"] = 32
    if "mrope_section" in new:
        new["mrope_section"] = [2, 3, 3]
    for factor in ("short_factor", "long_factor"):
        if factor in new:
            new[factor] = new[factor][: HEAD_DIM // 2]
    return new


def tiny(model_type: str, multimodal: bool = False) -> torch.nn.Module:
    """A tiny random model with a language-model head, in training mode, its vectors away from their initial values.

    Of a type that has both, the causal class, or the multimodal one.
    """
    config = tiny_config(model_type)
    if model_type == "llama4":  # transformers 5.24 reads this of its text model's output, which does not have it
        transformers.modeling_outputs.MoeCausalLMOutputWithPast.image_outputs = None
    torch.manual_seed(0)
    if model_type.startswith("musicgen"):  # its causal class takes a part of the type's configuration
        model = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._from_config(config.decoder).train()
    else:
        model = _auto_class(model_type, multimodal).from_config(config).train()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
            if not p.isfinite().all():
                p.normal_(0, 0.02, generator=generator)
    return model


def _auto_class(model_type: str, multimodal: bool):
    if model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not multimodal:
        return transformers.AutoModelForCausalLM
    if model_type in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForMultimodalLM
