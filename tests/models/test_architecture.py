"""architecture: what is read of a model, and every model that is refused by name."""

import pytest
import torch
from tiny_models import FAMILIES, OTHERS, VOCAB, ragged, tiny_model
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from latentmas_kernels import UnsupportedModelError, generate, latent_generate
from latentmas_kernels.models.architecture import Architecture, decoder_of

MIXED_WINDOWS = (8, None, 8)
WINDOWS = {
    "qwen2-mixed": MIXED_WINDOWS,
    "qwen3-mixed": MIXED_WINDOWS,
    "mistral-window": (8, 8, 8),
    "gemma2": MIXED_WINDOWS,
    "gemma3": MIXED_WINDOWS,
    "cohere2": (8, 8, 8),
    "gpt-oss": MIXED_WINDOWS,
}
KV_HEADS = {"gpt2": 4}
HEAD_DIM = {"gpt2": 12, "phi3": 12}


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_families_are_read_as_they_are_configured(name):
    """Heads and their width where the configuration does not name them, and a window per layer."""
    model = tiny_model(name)
    architecture = Architecture.of(model)
    assert architecture.name == type(model).__name__
    assert architecture.windows == WINDOWS.get(name, (None, None, None))
    assert architecture.layers == 3
    assert architecture.kv_heads == KV_HEADS.get(name, 2)
    assert architecture.head_dim == HEAD_DIM.get(name, 16)
    assert architecture.hidden_size == 48
    assert architecture.vocab_size == VOCAB
    assert architecture.max_positions == 512
    assert architecture.dtype == torch.float32
    assert architecture.device == torch.device("cpu")


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
@torch.no_grad()
def test_keys_have_the_shape_that_was_read(name):
    model = tiny_model(name)
    architecture = Architecture.of(model)
    cache = model(input_ids=torch.arange(5)[None], use_cache=True).past_key_values
    assert len(cache.layers) == architecture.layers
    assert all(layer.keys.shape == (1, architecture.kv_heads, 5, architecture.head_dim) for layer in cache.layers)


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
@torch.no_grad()
def test_decoder_gives_the_state_in_front_of_the_lm_head(name):
    """Without logits: the head's own weight on it gives the model's logits up to a cap or a scale, so ranks agree."""
    model, ids = tiny_model(name), torch.arange(3, 9)[None]
    logits = model.get_output_embeddings()(decoder_of(model)(input_ids=ids).last_hidden_state)
    assert torch.equal(logits.topk(5).indices, model(input_ids=ids).logits.topk(5).indices)


def test_layer_types_speak_transformers_language():
    mixed = Architecture.of(tiny_model("qwen3-mixed"))
    assert mixed.layer_types == ("sliding_attention", "full_attention", "sliding_attention")
    assert set(Architecture.of(tiny_model("llama")).layer_types) == {"full_attention"}


def test_dtype_and_resized_vocabulary_are_those_of_the_weights():
    model = tiny_model().bfloat16()
    model.resize_token_embeddings(VOCAB + 3)
    architecture = Architecture.of(model)
    assert architecture.dtype == torch.bfloat16
    assert architecture.vocab_size == VOCAB + 3


# ---- refused -------------------------------------------------------------------------------------------------------


def causal(model_type, **options):
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**{**sizes, **heads, **options}))


def encoder_decoder():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    )


def multimodal():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=8, patch_size=4)
    text = CONFIG_MAPPING["llama"](vocab_size=VOCAB, **sizes)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))


def recurrent():
    return causal("mamba", state_size=4)


def hybrid_linear_attention():
    experts = {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    }
    linear = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    return causal("qwen3_next", head_dim=8, layer_types=["linear_attention", "full_attention"], **experts, **linear)


def hybrid_mamba():
    return causal("jamba", mamba_d_state=4, num_experts=2, num_experts_per_tok=1)


def latent_kv():
    heads = {
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "head_dim": 8,
    }
    experts = {
        "n_routed_experts": 2,
        "num_experts_per_tok": 1,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
    }
    return causal("deepseek_v3", **heads, **experts)


def shared_kv():
    model = tiny_model()
    model.config.num_kv_shared_layers = 1
    return model


def chunked_attention():
    return causal("llama4_text", head_dim=8, num_local_experts=2, intermediate_size_mlp=16, attention_chunk_size=8)


def bloom():
    return AutoModelForCausalLM.from_config(
        CONFIG_MAPPING["bloom"](vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2)
    )


def without_head():
    return AutoModel.from_config(tiny_model().config)


def with_attention(implementation):
    model = tiny_model()
    model.config._attn_implementation = implementation
    return model


REFUSED = {
    "encoder-decoder": (encoder_decoder, "T5ForConditionalGeneration is an encoder-decoder model; supported are decoder-only"),
    "multimodal": (multimodal, r"LlavaForConditionalGeneration is multimodal; supported .* Load its text model by itself"),
    "recurrent": (recurrent, "MambaForCausalLM (has layers of type linear_attention|keeps a recurrent state)"),
    "linear attention": (hybrid_linear_attention, "Qwen3NextForCausalLM has layers of type linear_attention; supported"),
    "mamba layers": (hybrid_mamba, "JambaForCausalLM (has layers of type|keeps a recurrent state)"),
    "latent kv": (latent_kv, "DeepseekV3ForCausalLM compresses or shares its KV cache between layers"),
    "shared kv": (shared_kv, "LlamaForCausalLM compresses or shares its KV cache between layers"),
    "chunked attention": (chunked_attention, "Llama4ForCausalLM has layers of type chunked_attention"),
    "no positions": (bloom, r"BloomForCausalLM does not take position_ids in forward\(\)"),
    "no head": (without_head, r"LlamaModel has no output embeddings .* Load it with AutoModelForCausalLM"),
    "flash attention": (lambda: with_attention("flash_attention_2"), "'flash_attention_2', which cannot mask ragged rows"),
    "flex attention": (lambda: with_attention("flex_attention"), "load it with attn_implementation='sdpa'"),
    "plain module": (lambda: nn.Linear(2, 2), "got a Linear, which is no transformers model; supported are decoder-only"),
    "nested module": (lambda: nn.Sequential(tiny_model()), "got a Sequential, which is no transformers model"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_models_that_cannot_run_are_refused_by_name(what):
    """With what was got, what is supported and, where there is one, the way out."""
    make, words = REFUSED[what]
    with pytest.raises(UnsupportedModelError, match=words):
        Architecture.of(make().eval())


def refusal(model):
    """Why a model is refused; "" where it is not."""
    try:
        Architecture.of(model.eval())
    except UnsupportedModelError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra"])
def test_encoders_that_load_as_causal_models_are_refused_with_the_way_out(model_type):
    """AutoModelForCausalLM takes them, but every position sees those behind it. With is_decoder=True they are causal."""
    encoder = causal(model_type, max_position_embeddings=32)
    assert refusal(encoder) == (
        f"{type(encoder).__name__} ({model_type}) attends in both directions; supported are decoder-only causal LMs of "
        "transformers with full or sliding-window attention. Where its weights were trained as a decoder's, load it with "
        "is_decoder=True in its configuration."
    )
    decoder = causal(model_type, max_position_embeddings=32, is_decoder=True)
    assert "both directions" not in refusal(decoder)


def test_a_causal_model_is_not_judged_by_is_decoder():
    """GPT-NeoX has False there, and no position of it sees those behind it."""
    model = causal("gpt_neox", max_position_embeddings=32).eval()
    assert model.config.is_decoder is False
    assert refusal(model) == ""
    ids = torch.arange(3, 9)[None]
    changed = ids.clone()
    changed[0, -1] = 50
    with torch.no_grad():
        assert torch.equal(model(ids).logits[:, :-1], model(changed).logits[:, :-1])
    out = latent_generate(model, ids, latent_steps=2, aligner="identity", engine="eager")
    assert out.past_key_values.lengths.tolist() == [8]


def test_a_recurrent_state_is_noticed_without_layer_types():
    """By transformers' own mark: configurations of older versions name no layer types."""
    model = tiny_model()
    type(model)._is_stateful, before = True, type(model)._is_stateful
    try:
        with pytest.raises(
            UnsupportedModelError, match="LlamaForCausalLM keeps a recurrent state instead of keys and values"
        ):
            Architecture.of(model)
    finally:
        type(model)._is_stateful = before


def test_training_mode_is_refused():
    with pytest.raises(
        UnsupportedModelError, match=r"training mode, where dropout is random; call model.eval\(\) first"
    ):
        Architecture.of(tiny_model().train())


@pytest.mark.parametrize("call", [latent_generate, generate])
@pytest.mark.parametrize("why", ["training mode", "flex_attention", "sliding_window_of_tomorrow"])
def test_calls_refuse_before_any_work_is_done(call, why):
    """No module of the model runs."""
    model, ran = tiny_model(), []
    if why == "training mode":
        model.train()
    elif why == "flex_attention":
        model.config._attn_implementation = why
    else:
        model.config.layer_types = ["full_attention", why, "full_attention"]
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, _: ran.append(module))
    with pytest.raises(UnsupportedModelError, match=why):
        call(model, *ragged([3, 5]))
    assert ran == []
