"""FAMILIES: the decoders of transformers that the fast engines cover, one row each.

To add a family whose decoder computes what Llama's does, add a row here and one in `tests/tiny_models.py:FAMILIES`; the tests
of packed weights and of all engines then run on it. `check_packable` refuses, with the reason, whatever in a model is not as
the row says; a module that the row names and the model lacks is an AttributeError.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Classes and module names of one family.

    The modules beside the layers have the same names in all of them: model.embed_tokens, model.layers, model.norm,
    model.rotary_emb and lm_head.

    Attributes:
        prefix: how the names of its classes begin ("Llama" of LlamaForCausalLM, LlamaAttention, LlamaRMSNorm).
        attention, mlp: modules of a layer. input_norm, mlp_norm: the norms before them.
        qkv, output: linear layers of attention: queries, keys, values, in this order; the one behind attention.
        head_norms: norms of each head's queries and keys; None where there are none.
        gate_up, down: linear layers of the MLP: gate and up, in this order; the one behind them.
    """

    prefix: str
    input_norm: str = "input_layernorm"
    attention: str = "self_attn"
    qkv: tuple[str, str, str] = ("q_proj", "k_proj", "v_proj")
    head_norms: tuple[str, str] | None = None
    output: str = "o_proj"
    mlp_norm: str = "post_attention_layernorm"
    mlp: str = "mlp"
    gate_up: tuple[str, str] = ("gate_proj", "up_proj")
    down: str = "down_proj"


FAMILIES = {
    f"{family.prefix}ForCausalLM": family
    for family in (
        Family("Llama"),
        Family("Mistral"),
        Family("Qwen2"),
        Family("Qwen3", head_norms=("q_norm", "k_norm")),
    )
}
"""By the class of the model."""
