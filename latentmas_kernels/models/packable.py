"""Check that a Llama-like decoder is what the fast engines compute, on the live modules that transformers would run.

Everything that the forwards of the families read is looked at, module by module: the classes, the sizes, the numbers (eps of
each norm, scale of each attention), the activation. What `Weights` has no field for is refused with a reason, so that an edited
model runs on the eager engine, which runs the modules themselves.
"""

import sys
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from latentmas_kernels.models.architecture import Architecture
from latentmas_kernels.models.families import FAMILIES
from latentmas_kernels.models.module_settings import FUNCTIONS, GLOBAL_HOOKS, PASSIVE_HOOKS

ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # the frequencies of all other types change with the length
DTYPES = (torch.float32, torch.bfloat16)
# What a plain model is built from, besides linear layers and embeddings. Adapters and quantized layers are neither.
OWN_MODULES = ("transformers.models.", "transformers.activations")
PLAIN_MODULES = (nn.ModuleList, nn.SiLU)
SILU = (nn.SiLU, type(ACT2FN["silu"]))


class UnsupportedWeights(Exception):
    """`Weights` has no field for something that the model computes; the message says what, in a clause."""


def check_packable(model: Any, architecture: Architecture) -> list[Any]:
    """Raise UnsupportedWeights where a module is not what the kernels compute. This does not modify the model.

    Returns:
        The decoder layers that run, in order.
    """
    name = type(model).__name__
    if name not in FAMILIES or not type(model).__module__.startswith("transformers."):
        raise UnsupportedWeights(f"{name} is none of {', '.join(FAMILIES)}")
    if architecture.dtype not in DTYPES:
        raise UnsupportedWeights(f"its dtype is {architecture.dtype}; covered are bfloat16 and float32")
    if any(GLOBAL_HOOKS):
        raise UnsupportedWeights(
            "there are hooks on all modules (register_module_forward_hook), which the kernels would pass by"
        )
    kinds: set[type] = set()
    todo = [model]
    while todo:  # at every call: modules() and named_modules() take three times as long
        module = todo.pop()
        state = module.__dict__
        if state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state:
            hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
            if "forward" in state or any(getattr(h, "__module__", None) != PASSIVE_HOOKS for h in hooks):
                path = _path_of(module, model) or name
                raise UnsupportedWeights(f"{path} has hooks or a forward of its own, which the kernels would pass by")
        if type(module) not in kinds:
            _check_kind(module, model)
            kinds.add(type(module))
        todo.extend(child for child in reversed(state["_modules"].values()) if child is not None)
    return _Check(model, architecture).run()


def attention_of_transformers() -> bool:
    """Return whether the attentions that a model may name are those that transformers registered."""
    return ALL_ATTENTION_FUNCTIONS.get("sdpa") is sdpa_attention_forward and "eager" not in ALL_ATTENTION_FUNCTIONS


def _check_kind(module: nn.Module, model: nn.Module) -> None:
    """Raise UnsupportedWeights for a class that is neither one of torch's plain ones nor an unchanged one of transformers."""
    kind = type(module)
    if kind not in (nn.Linear, nn.Embedding, *PLAIN_MODULES) and not kind.__module__.startswith(OWN_MODULES):
        raise UnsupportedWeights(f"{_path_of(module, model)} is a {kind.__module__}.{kind.__name__}, not a plain layer")
    if not kind.forward.__module__.startswith(("transformers.", "torch.")):
        raise UnsupportedWeights(f"the forward of {kind.__name__} was replaced, which the kernels would pass by")


def _path_of(module: nn.Module, model: nn.Module) -> str:
    return next(path for path, other in model.named_modules() if other is module)


class _Check:
    """Compares one model with its row of FAMILIES. Full paths are built only where something is wrong."""

    def __init__(self, model: Any, architecture: Architecture) -> None:
        self.model, self.architecture = model, architecture
        self.family, self.code = FAMILIES[type(model).__name__], type(model).__module__
        self.dtype, self.device, self.width = architecture.dtype, architecture.device, architecture.hidden_size

    def run(self) -> list[Any]:
        """Check the model and return the decoder layers that run, in order."""
        model, decoder, a, family = self.model, self.model.model, self.architecture, self.family
        self._functions()
        self._is("model", decoder, "Model")
        self._embedding("model.embed_tokens", decoder.embed_tokens)
        self._rope("model.rotary_emb", decoder.rotary_emb)
        self._linear("", model, "lm_head", self._rows("", model, "lm_head"), self.width)
        layers = list(decoder.layers[: model.config.num_hidden_layers])
        self.eps = self._number("model.norm.variance_epsilon", decoder.norm.variance_epsilon)
        self._norm("model", decoder, "norm", self.width)
        path, first = "model.layers.0", layers[0]
        self._is(path, first, "DecoderLayer")
        attention, mlp = getattr(first, family.attention), getattr(first, family.mlp)
        attention_path, mlp_path = f"{path}.{family.attention}", f"{path}.{family.mlp}"
        self._is(attention_path, attention, "Attention")
        self._is(mlp_path, mlp, "MLP")
        self.scale = self._number(f"{attention_path}.scaling", attention.scaling)
        self.queries = self._rows(attention_path, attention, family.qkv[0])
        self.keys = a.kv_heads * a.head_dim
        self.qkv = dict(zip(family.qkv, (self.queries, self.keys, self.keys), strict=True))
        self.inner = self._rows(mlp_path, mlp, family.gate_up[0])
        self.gate_up = dict.fromkeys(family.gate_up, self.inner)
        for index, layer in enumerate(layers):
            path = f"model.layers.{index}"
            self._is(path, layer, "DecoderLayer")
            self._norm(path, layer, family.input_norm, self.width)
            self._norm(path, layer, family.mlp_norm, self.width)
            self._attention(f"{path}.{family.attention}", getattr(layer, family.attention))
            self._mlp(f"{path}.{family.mlp}", getattr(layer, family.mlp))
        return layers

    def _attention(self, path: str, attention: Any) -> None:
        a = self.architecture
        self._is(path, attention, "Attention")
        scale = self._number(f"{path}.scaling", attention.scaling)
        if scale != self.scale:
            raise UnsupportedWeights(f"{path}.scaling is {scale}, that of the first layer {self.scale}")
        if attention.head_dim != a.head_dim or attention.num_key_value_groups * self.keys != self.queries:
            raise UnsupportedWeights(
                f"{path} has heads of width {attention.head_dim} in groups of {attention.num_key_value_groups}; its weights "
                f"have {self.queries // a.head_dim} heads of width {a.head_dim} for queries and {a.kv_heads} for keys"
            )
        if attention.training and attention.attention_dropout:
            raise UnsupportedWeights(f"{path} is in training mode, where its dropout is random")
        self._merged(path, attention, self.qkv)
        self._linear(path, attention, self.family.output, self.width, self.queries)
        for norm in self.family.head_norms or ():
            self._norm(path, attention, norm, a.head_dim)

    def _mlp(self, path: str, mlp: Any) -> None:
        self._is(path, mlp, "MLP")
        if type(mlp.act_fn) not in SILU and mlp.act_fn is not nn.functional.silu:
            kind = getattr(mlp.act_fn, "__name__", type(mlp.act_fn).__name__)
            raise UnsupportedWeights(f"{path} uses {kind}; covered is SiLU")
        self._merged(path, mlp, self.gate_up)
        self._linear(path, mlp, self.family.down, self.width, self.inner)

    def _rope(self, path: str, rope: Any) -> None:
        self._is(path, rope, "RotaryEmbedding")
        width = self.architecture.head_dim
        if rope.rope_type not in ROPE_TYPES:
            raise UnsupportedWeights(f"its RoPE is of type {rope.rope_type!r}; covered are {', '.join(ROPE_TYPES)}")
        if tuple(rope.inv_freq.shape) != (width // 2,) or width % 8 or width > 256:
            raise UnsupportedWeights(f"its heads are {width} wide, rotated in part or not a multiple of 8 up to 256")
        self._number(f"{path}.attention_scaling", rope.attention_scaling)

    def _embedding(self, path: str, embedding: Any) -> None:
        if type(embedding) is not nn.Embedding:
            raise UnsupportedWeights(f"{path} is a {type(embedding).__name__}, not a plain embedding")
        if embedding.max_norm is not None:
            raise UnsupportedWeights(f"{path} shortens the rows that it gives (max_norm={embedding.max_norm})")
        self._parameter(path, embedding, "weight", (len(embedding.weight), self.width))

    def _norm(self, path: str, owner: Any, name: str, width: int) -> None:
        norm = getattr(owner, name)
        self._is(path, norm, "RMSNorm")
        eps = self._number(f"{path}.{name}.variance_epsilon", norm.variance_epsilon)
        if eps != self.eps:
            raise UnsupportedWeights(f"{path}.{name}.variance_epsilon is {eps}, that of model.norm {self.eps}")
        self._parameter(f"{path}.{name}", norm, "weight", (width,))

    def _merged(self, path: str, owner: Any, rows: dict[str, int]) -> None:
        """Check linear layers that become one matrix, by their rows: all of them have a bias, or none."""
        biased = [name for name, count in rows.items() if self._linear(path, owner, name, count, self.width)]
        if biased and len(biased) != len(rows):
            raise UnsupportedWeights(f"{path} has a bias in {', '.join(biased)} only")

    def _rows(self, path: str, owner: Any, name: str) -> int:
        linear = getattr(owner, name)
        if type(linear) is not nn.Linear:
            raise UnsupportedWeights(f"{path}.{name} is a {type(linear).__name__}, not a plain layer".removeprefix("."))
        return len(linear.weight)

    def _linear(self, path: str, owner: Any, name: str, rows: int, cols: int) -> bool:
        """Check a linear layer [rows, cols] and return whether it has a bias."""
        linear = getattr(owner, name)
        if type(linear) is not nn.Linear:
            raise UnsupportedWeights(f"{path}.{name} is a {type(linear).__name__}, not a plain layer")
        path = f"{path}.{name}" if path else name
        self._parameter(path, linear, "weight", (rows, cols))
        if linear._parameters.get("bias", 0) is None:  # 0: a bias that is no parameter
            return False
        self._parameter(path, linear, "bias", (rows,))
        return True

    def _parameter(self, path: str, owner: Any, name: str, shape: tuple[int, ...]) -> None:
        tensor = owner._parameters.get(name)
        if type(tensor) is nn.Parameter and tensor.dtype is self.dtype and tensor.shape == shape:
            if tensor.device != self.device:
                raise UnsupportedWeights(f"{path} is on {tensor.device}, the embedding on {self.device}")
            if not tensor.is_contiguous():
                raise UnsupportedWeights(f"{path} is not contiguous")
            return
        held = getattr(owner, name)
        if type(held) is nn.Parameter and held.dtype is self.dtype:
            raise UnsupportedWeights(
                f"the {name} of {path} is {list(held.shape)}, where the sizes of the model make it {list(shape)}"
            )
        kind, dtype = type(held).__name__, getattr(held, "dtype", None)
        raise UnsupportedWeights(f"{path} holds a {kind} of {dtype}, not a parameter of {self.dtype}")

    def _is(self, path: str, module: Any, role: str) -> None:
        kind = type(module)
        if kind.__module__ != self.code or kind.__name__ != self.family.prefix + role:
            raise UnsupportedWeights(
                f"{path} is a {kind.__name__} of {kind.__module__}, not a {self.family.prefix}{role}"
            )

    def _number(self, path: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UnsupportedWeights(f"{path} is a {type(value).__name__}, not a number")
        return float(value)

    def _functions(self) -> None:
        code = vars(sys.modules[self.code])
        for name in FUNCTIONS:
            if name in code and not code[name].__module__.startswith("transformers."):
                raise UnsupportedWeights(f"{name} of {self.code} was replaced, which the kernels would pass by")
        if not attention_of_transformers():
            raise UnsupportedWeights("an attention of transformers was replaced, which the kernels would pass by")
