"""Whether a Llama-like decoder is what the fast engines compute, checked on the live modules that transformers would run.

Everything that the forwards of the four families read is looked at, module by module: the classes, the sizes, the numbers
(eps of each norm, scale of each attention), the activation. What the packed form has no place for is refused with a reason, so
that an edited model runs on the eager engine, which runs the modules themselves.
"""

import sys
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from latentmas_kernels.architecture import Architecture

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # the others change their frequencies with the length
DTYPES = (torch.float32, torch.bfloat16)
# transformers puts hooks of its own on every layer, once output_hidden_states was asked for; they only look.
PASSIVE_HOOKS = "transformers.utils.output_capturing"
# What a plain model is built from, besides linear layers and embeddings. An adapter or a quantised layer is something else.
OWN_MODULES = ("transformers.models.", "transformers.activations")
PLAIN_MODULES = (nn.ModuleList, nn.SiLU)
SILU = (nn.SiLU, type(ACT2FN["silu"]))
GLOBAL_HOOKS = (nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks)
# Functions beside the classes that their forwards call, which some libraries put others in the place of.
FUNCTIONS = ("apply_rotary_pos_emb", "rotate_half", "repeat_kv", "eager_attention_forward")


class NotPackable(Exception):
    """The model is outside of what the packed form can say; the message says why, in a clause."""


def check_packable(model: Any, architecture: Architecture) -> list[Any]:
    """Raise NotPackable where a module is not what the kernels compute. Moves nothing.

    Returns:
        The decoder layers that run, in order.
    """
    name = type(model).__name__
    if name not in FAMILIES or not type(model).__module__.startswith("transformers."):
        raise NotPackable(f"{name} is none of {', '.join(FAMILIES)}")
    if architecture.dtype not in DTYPES:
        raise NotPackable(f"its dtype is {architecture.dtype}; covered are bfloat16 and float32")
    if any(GLOBAL_HOOKS):
        raise NotPackable(
            "there are hooks on all modules (register_module_forward_hook), which the kernels would pass by"
        )
    for path, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if "forward" in vars(module) or any(getattr(h, "__module__", None) != PASSIVE_HOOKS for h in hooks):
            raise NotPackable(f"{path or name} has hooks or a forward of its own, which the kernels would pass by")
        kind = type(module)
        if kind not in (nn.Linear, nn.Embedding, *PLAIN_MODULES) and not kind.__module__.startswith(OWN_MODULES):
            raise NotPackable(f"{path} is a {kind.__module__}.{kind.__name__}, not a plain layer")
        if not kind.forward.__module__.startswith(("transformers.", "torch.")):
            raise NotPackable(f"the forward of {kind.__name__} was replaced, which the kernels would pass by")
    return _Family(model, architecture).check()


class _Family:
    """One model against the modules that its family is made of."""

    def __init__(self, model: Any, architecture: Architecture) -> None:
        self.model, self.architecture = model, architecture
        self.name, self.code = type(model).__name__.removesuffix("ForCausalLM"), type(model).__module__

    def check(self) -> list[Any]:
        model, decoder, width = self.model, self.model.model, self.architecture.hidden_size
        self._functions()
        self._is("model", decoder, "Model")
        self._embedding("model.embed_tokens", decoder.embed_tokens, width)
        self._rope("model.rotary_emb", decoder.rotary_emb)
        self._linear("lm_head", model.lm_head, self._rows("lm_head", model.lm_head), width)
        layers = list(decoder.layers[: model.config.num_hidden_layers])
        first, eps = layers[0], self._number("model.norm.variance_epsilon", decoder.norm.variance_epsilon)
        self._norm("model.norm", decoder.norm, width, eps)
        for index, layer in enumerate(layers):
            path = f"model.layers.{index}"
            self._is(path, layer, "DecoderLayer")
            self._norm(f"{path}.input_layernorm", layer.input_layernorm, width, eps)
            self._norm(f"{path}.post_attention_layernorm", layer.post_attention_layernorm, width, eps)
            self._attention(f"{path}.self_attn", layer.self_attn, first.self_attn, eps)
            self._mlp(f"{path}.mlp", layer.mlp, first.mlp)
        return layers

    def _attention(self, path: str, attention: Any, first: Any, eps: float) -> None:
        a = self.architecture
        self._is(path, attention, "Attention")
        scale = self._number(f"{path}.scaling", attention.scaling)
        if scale != first.scaling:
            raise NotPackable(f"{path}.scaling is {scale}, that of the first layer {first.scaling}")
        queries, keys = self._rows("model.layers.0.self_attn.q_proj", first.q_proj), a.kv_heads * a.head_dim
        if attention.head_dim != a.head_dim or attention.num_key_value_groups * keys != queries:
            raise NotPackable(
                f"{path} has heads of width {attention.head_dim} in groups of {attention.num_key_value_groups}; its weights "
                f"have {queries // a.head_dim} heads of width {a.head_dim} for queries and {a.kv_heads} for keys"
            )
        if attention.training and attention.attention_dropout:
            raise NotPackable(f"{path} is in training mode, where its dropout is random")
        linears = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        for name, rows in linears.items():
            self._linear(f"{path}.{name}", getattr(attention, name), rows, a.hidden_size)
        self._alike(path, attention, linears)
        self._linear(f"{path}.o_proj", attention.o_proj, a.hidden_size, queries)
        if self.name == "Qwen3":
            self._norm(f"{path}.q_norm", attention.q_norm, a.head_dim, eps)
            self._norm(f"{path}.k_norm", attention.k_norm, a.head_dim, eps)

    def _mlp(self, path: str, mlp: Any, first: Any) -> None:
        self._is(path, mlp, "MLP")
        if type(mlp.act_fn) not in SILU and mlp.act_fn is not nn.functional.silu:
            kind = getattr(mlp.act_fn, "__name__", type(mlp.act_fn).__name__)
            raise NotPackable(f"{path} uses {kind}; covered is SiLU")
        width, inner = self.architecture.hidden_size, self._rows("model.layers.0.mlp.gate_proj", first.gate_proj)
        for name in ("gate_proj", "up_proj"):
            self._linear(f"{path}.{name}", getattr(mlp, name), inner, width)
        self._alike(path, mlp, ("gate_proj", "up_proj"))
        self._linear(f"{path}.down_proj", mlp.down_proj, width, inner)

    def _rope(self, path: str, rope: Any) -> None:
        self._is(path, rope, "RotaryEmbedding")
        width = self.architecture.head_dim
        if rope.rope_type not in ROPE_TYPES:
            raise NotPackable(f"its RoPE is of type {rope.rope_type!r}; covered are {', '.join(ROPE_TYPES)}")
        if tuple(rope.inv_freq.shape) != (width // 2,) or width % 8 or width > 256:
            raise NotPackable(f"its heads are {width} wide, rotated in part or not a multiple of 8 up to 256")
        self._number(f"{path}.attention_scaling", rope.attention_scaling)

    def _embedding(self, path: str, embedding: Any, width: int) -> None:
        if type(embedding) is not nn.Embedding:
            raise NotPackable(f"{path} is a {type(embedding).__name__}, not a plain embedding")
        if embedding.max_norm is not None:
            raise NotPackable(f"{path} shortens the rows that it gives (max_norm={embedding.max_norm})")
        self._parameter(path, embedding.weight, (len(embedding.weight), width))

    def _norm(self, path: str, norm: Any, width: int, eps: float) -> None:
        self._is(path, norm, "RMSNorm")
        own = self._number(f"{path}.variance_epsilon", norm.variance_epsilon)
        if own != eps:
            raise NotPackable(f"{path}.variance_epsilon is {own}, that of model.norm {eps}")
        self._parameter(path, norm.weight, (width,))

    def _rows(self, path: str, linear: Any) -> int:
        if type(linear) is not nn.Linear:
            raise NotPackable(f"{path} is a {type(linear).__name__}, not a plain layer")
        return len(linear.weight)

    def _linear(self, path: str, linear: Any, rows: int, cols: int) -> None:
        self._rows(path, linear)
        self._parameter(path, linear.weight, (rows, cols))
        if linear.bias is not None:
            self._parameter(f"{path}.bias", linear.bias, (rows,))

    def _parameter(self, path: str, tensor: Any, shape: tuple[int, ...]) -> None:
        a = self.architecture
        if type(tensor) is not nn.Parameter or tensor.dtype != a.dtype:
            raise NotPackable(f"{path} holds a {type(tensor).__name__} of {tensor.dtype}, not a parameter of {a.dtype}")
        if tensor.device != a.device:
            raise NotPackable(f"{path} is on {tensor.device}, the embedding on {a.device}")
        if tuple(tensor.shape) != shape:
            raise NotPackable(f"{path} is {list(tensor.shape)}, where the other layers make it {list(shape)}")
        if tensor.stride()[-1] != 1 or (len(shape) == 2 and tensor.stride(0) != shape[1]):
            raise NotPackable(f"{path} is not contiguous")

    def _alike(self, path: str, module: Any, names: Any) -> None:
        """What is merged to one product has one bias, or none."""
        biased = [name for name in names if getattr(module, name).bias is not None]
        if biased and len(biased) != len(names):
            raise NotPackable(f"{path} has a bias in {', '.join(biased)} only")

    def _is(self, path: str, module: Any, role: str) -> None:
        kind = type(module)
        if kind.__module__ != self.code or kind.__name__ != self.name + role:
            raise NotPackable(f"{path} is a {kind.__name__} of {kind.__module__}, not a {self.name}{role}")

    def _number(self, path: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise NotPackable(f"{path} is a {type(value).__name__}, not a number")
        return float(value)

    def _functions(self) -> None:
        code = vars(sys.modules[self.code])
        for name in FUNCTIONS:
            if name in code and not code[name].__module__.startswith("transformers."):
                raise NotPackable(f"{name} of {self.code} was replaced, which the kernels would pass by")
        if ALL_ATTENTION_FUNCTIONS.get("sdpa") is not sdpa_attention_forward or "eager" in ALL_ATTENTION_FUNCTIONS:
            raise NotPackable("an attention of transformers was replaced, which the kernels would pass by")
