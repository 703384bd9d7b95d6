"""Real shapes with random weights: nothing is fetched, and the time of a dense step does not depend on what they hold."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

# Field names of transformers' configurations.
_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "vocab_size",
)  # fmt: skip
_QWEN3 = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "max_position_embeddings": 40960}
_LLAMA3 = {
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
# Family, sizes, whether the lm_head is the input embedding, and what else the published configuration sets.
SHAPES: dict[str, tuple[str, tuple[int, ...], bool, dict[str, Any]]] = {
    "smollm2-135m": ("llama", (576, 30, 9, 3, 64, 1536, 49152), True, {"max_position_embeddings": 8192}),
    "qwen2.5-0.5b": ("qwen2", (896, 24, 14, 2, 64, 4864, 151936), True, {"max_position_embeddings": 32768}),
    "qwen3-0.6b": ("qwen3", (1024, 28, 16, 8, 128, 3072, 151936), True, _QWEN3),
    "qwen3-1.7b": ("qwen3", (2048, 28, 16, 8, 128, 6144, 151936), True, _QWEN3),
    "qwen3-4b": ("qwen3", (2560, 36, 32, 8, 128, 9728, 151936), True, _QWEN3),
    "qwen3-8b": ("qwen3", (4096, 36, 32, 8, 128, 12288, 151936), False, _QWEN3),
    "qwen3-14b": ("qwen3", (5120, 40, 40, 8, 128, 17408, 151936), False, _QWEN3),
    "llama-3.2-1b": ("llama", (2048, 16, 32, 8, 64, 8192, 128256), True, _LLAMA3),
    "tiny": ("llama", (64, 2, 4, 2, 16, 128, 512), True, {"max_position_embeddings": 32768}),  # for trying scripts out
}


def sizes_of(shape: str) -> dict[str, int]:
    """The sizes by their names in transformers."""
    return dict(zip(_FIELDS, SHAPES[shape][1], strict=True))


def parameter_bytes(shape: str, itemsize: int) -> int:
    """Of the whole model, the lm_head counted once more where it is not the input embedding."""
    s = sizes_of(shape)
    heads = (2 * s["num_attention_heads"] + 2 * s["num_key_value_heads"]) * s["head_dim"]
    layer = s["hidden_size"] * (heads + 3 * s["intermediate_size"])
    ends = s["hidden_size"] * s["vocab_size"] * (1 if SHAPES[shape][2] else 2)
    return (s["num_hidden_layers"] * layer + ends) * itemsize


def build_model(shape: str, dtype: torch.dtype, device: str, layers: int | None = None) -> Any:
    """The model, or its first layers, its weights drawn on the device itself."""
    family, _, tied, more = SHAPES[shape]
    sizes = sizes_of(shape)
    sizes["num_hidden_layers"] = layers or sizes["num_hidden_layers"]
    config = CONFIG_MAPPING[family](**sizes, tie_word_embeddings=tied, pad_token_id=0, **more)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    return model
