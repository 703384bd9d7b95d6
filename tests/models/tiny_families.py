"""Every causal LM of the installed transformers, tiny and random, built from its configuration class."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

VOCAB = 61


def _named(size: Any, *names: str) -> dict[str, Any]:
    return dict.fromkeys(names, size)


# Sizes by the names that configurations use for them; a family gets those that its own configuration has.
SIZES: dict[str, Any] = {
    **_named(
        32, "hidden_size", "n_embd", "d_model", "emb_dim", "embedding_dim", "embedding_size", "word_embed_proj_dim"
    ),
    **_named(32, "input_embedding_size", "output_embedding_size", "lru_width", "attention_hidden_size", "mamba_d_ssm"),
    **_named(48, "intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size", "dff", "d_inner", "dim_ff"),
    **_named(48, "decoder_ffn_dim", "encoder_ffn_dim", "intermediate_size_mlp", "shared_intermediate_size"),
    **_named(48, "feed_forward_size", "dense_intermediate_size"),
    **_named(24, "moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"),
    **_named(24, "moe_shared_expert_intermediate_size", "shared_experts_intermediate_size", "router_hidden_size"),
    **_named(2, "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"),
    **_named(2, "num_encoder_layers", "num_decoder_layers", "num_blocks", "num_layers_per_stack"),
    **_named(4, "num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads"),
    **_named(4, "encoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"),
    **_named(4, "swa_num_attention_heads", "linear_num_heads", "mamba_n_heads", "mamba_num_heads", "n_mamba_heads"),
    **_named(4, "linear_num_value_heads", "linear_num_key_heads", "index_n_heads"),
    **_named(2, "num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_query_groups"),
    **_named(
        8, "head_dim", "swa_head_dim", "linear_head_dim", "dim_head", "d_head", "kv_channels", "attention_head_size"
    ),
    **_named(8, "linear_key_head_dim", "linear_value_head_dim", "v_head_dim", "index_head_dim", "attention_head_dim"),
    **_named(8, "kv_lora_rank", "q_lora_rank", "o_lora_rank", "qk_nope_head_dim", "rotary_dim", "laurel_rank"),
    **_named(8, "mamba_d_head", "mamba_head_dim", "mamba_headdim", "mamba_d_state", "state_size", "ssm_state_size"),
    **_named(8, "mamba_dt_rank", "time_step_rank", "adapter_rank", "gated_norm_rank", "hc_lowrank", "loop_gate_rank"),
    **_named(8, "qk_rope_head_dim", "d_rel", "hidden_size_per_layer_input", "ple_embed_dim"),
    **_named(16, "rel_extent", "chunk_size", "mamba_chunk_size"),
    **_named(4, "block_size", "index_topk", "index_block_size"),
    **_named(1, "n_group", "topk_group", "num_expert_group", "n_groups", "mamba_n_groups"),
    **_named(128, "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"),
    **_named(128, "context_length", "model_max_length", "max_target_positions", "max_source_positions"),
    **_named(4, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"),
    **_named(2, "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"),
    **_named(7, "sliding_window", "sliding_window_size", "window_size", "local_attention", "attention_window_size"),
    **_named(16, "attention_chunk_size"),
    **_named(VOCAB, "vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size"),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Sizes that have to fit each other, small thresholds that matter in longer texts, and what a family cannot be built without.
_LATENT_HEADS = {"num_key_value_heads": 4}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
EXTRA: dict[str, dict[str, Any]] = {
    **_named(
        _LATENT_HEADS, "axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_linear"
    ),
    **_named(_LATENT_HEADS, "glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "minicpm3", "sarvam_mla", "youtu"),
    "bamba": {"mamba_d_head": 16, "attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": VOCAB},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "doge": {"keep_window_size": 4},
    "dory": {
        "num_hidden_layers": 3,
        "n_input_layers": 1,
        "n_recurrent_layers": 1,
        "n_output_layers": 1,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {
        **_LATENT_HEADS,
        "head_dim": 16,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 8,
        "swa_kv_lora_rank": 8,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {
        "mamba_d_head": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "num_hidden_layers": 2,
    },
    "hrm_text": {"num_hidden_layers": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 16},
    "minimax_m3_vl_text": {"index_topk_blocks": 2},
    "ministral3": {"rope_parameters": {**_ROPE, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 4}},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 50,
        "make_ngram_vocab_size_divisible_by": 1,
        "split_ngram_parts": 1,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [8, 16],
        "attn_layers": ["local", "lsh"],
    },
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": VOCAB,
        "shape_embed_dim": 8,
        "shape_vocab_size": VOCAB,
    },
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_headdim": 16,
    },
    "zaya": {"num_experts_per_tok": 1},
}
# Names of the mapping that are not built, with the reason.
SKIPPED = {
    "blt": "transformers itself makes no cache of its configuration, which has no num_hidden_layers",
    "dots3_note": "a configuration with images and sound; its text model is dots3_note_text",
    "gemma3n": "its images need the timm package; its text model is gemma3n_text",
    "gemma4_assistant": "drafts for another model on that one's cache; does not generate by itself",
    "gemma4_unified_assistant": "drafts for another model on that one's cache; does not generate by itself",
    "musicgen": "the configuration is that of an encoder, a decoder and a codec; the class takes the decoder's",
    "musicgen_melody": "the configuration is that of an encoder, a decoder and a codec; the class takes the decoder's",
}
# Given even where a family's default is None.
_ALWAYS = {
    "head_dim", "num_key_value_heads", "num_experts_per_tok", "n_routed_experts", "pad_token_id", "bos_token_id",
    "eos_token_id",
}  # fmt: skip
# What configurations work out from other sizes.
_WORKED_OUT = {"num_layers_per_stack"}


def _sized(name: str, config: Any) -> dict[str, Any]:
    """Arguments of a small configuration of the same class as the given one."""
    known = config.to_dict()
    named = {key for key in SIZES if key in known and (known[key] is not None or key in _ALWAYS)} - _WORKED_OUT
    given = {key: SIZES[key] for key in named} | EXTRA.get(name, {})
    for key in getattr(config, "sub_configs", ()):
        inner = getattr(config, key, None)
        if inner is not None and key not in given:
            given[key] = _sized(inner.model_type, inner)
            if "model_type" in known[key]:
                given[key]["model_type"] = inner.model_type
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    types = getattr(config, "attribute_map", {}).get("layer_types", "layer_types")
    if kinds and types in known and types not in given:
        given[types] = kinds * 2 if len(kinds) == 1 else kinds
        if "num_hidden_layers" in given:
            given["num_hidden_layers"] = len(given[types])
    return given


def tiny(name: str) -> Any:
    """A random float32 model of a model_type, the same one every time, with a layer of each kind that its layer_types name."""
    config_class = CONFIG_MAPPING[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**_sized(name, config_class()))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:  # as in conftest: fresh weights make every layer nearly the identity
                parameter.normal_(0, 0.08)
    model.generation_config.eos_token_id = None  # all tokens are of interest
    return model
