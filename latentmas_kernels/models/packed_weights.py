"""The weights of a Llama-like decoder as the fast engines read them: live views of the model's own modules.

Queries, keys and values are one matrix, and so are gate and up: one launch each reads them. There is no second copy.
Where they do not lie one behind the other yet, they are moved there, and the model's parameters become views of the merged
tensor; save_pretrained, state_dict, loading and tying work as before. Tools that go by storage do not (safetensors'
save_model and huggingface_hub's save_torch_model refuse, accelerate's drops what shares one): `unpack_weights` gives every
parameter its own again.

Nothing of this is kept between calls: `pack_weights` looks at the modules each time, numbers included: transformers reads eps
off each norm and the scale off each attention, not off the configuration. `.to()`, `.bfloat16()`, `deepcopy`, a LoRA, quantised
layers or an edited number change what it finds, and `Weights.key` tells whether what was made of it before still holds.
"""

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from latentmas_kernels.models.architecture import Architecture
from latentmas_kernels.models.packable import UnsupportedWeights, check_packable

MERGED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_merging = threading.Lock()  # two threads that merge at once would each make a copy


@dataclass(frozen=True)
class Layer:
    """One decoder layer. Products are [out, in] as in `torch.nn.Linear`; what the model does not have is None.

    Attributes:
        input_norm, mlp_norm: [D], weights of the norms before attention and before the MLP.
        qkv, qkv_bias: [(Hq + 2 Hkv) hd, D], queries first, then keys, then values.
        query_norm, key_norm: [hd], weights of the norms per head (Qwen3).
        output, output_bias: [D, Hq hd].
        gate_up, gate_up_bias: [2 I, D], the gate first.
        down, down_bias: [D, I].
        window: positions that a query sees, its own included; None is all.
        slot: its place in the KV cache.
    """

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None
    output: Tensor
    output_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    window: int | None
    slot: int


@dataclass(frozen=True)
class Weights:
    """A decoder and its lm_head.

    Attributes:
        layers: in order.
        embedding, lm_head: [V, D]; the same memory where they are tied. lm_head_bias: [V] or None. Rows of the lm_head that
            have no embedding are left out.
        final_norm: [D].
        eps: of all norms.
        inv_freq: float32 [hd / 2]; attention_scaling: factor on cosine and sine.
        scale: of the attention scores.
        query_heads, kv_heads, head_dim, intermediate: sizes.
        key: all that a step reads: of tensors the address and dtype, of RoPE's frequencies and everything else the value.
    """

    layers: tuple[Layer, ...]
    embedding: Tensor
    lm_head: Tensor
    lm_head_bias: Tensor | None
    final_norm: Tensor
    eps: float
    inv_freq: Tensor
    attention_scaling: float
    scale: float
    query_heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    key: tuple

    @property
    def decoder_bytes(self) -> int:
        """What a latent step reads of the weights: all but the embedding and the lm_head."""
        tensors = [t for layer in self.layers for t in vars(layer).values() if isinstance(t, Tensor)]
        return sum(t.nbytes for t in [*tensors, self.final_norm])


def unsupported_reason(model: Any, architecture: Architecture) -> str | None:
    """Why `pack_weights` would refuse the model, as a clause; None where it would not. Moves nothing."""
    try:
        check_packable(model, architecture)
    except UnsupportedWeights as reason:
        return str(reason)
    return None


@torch.no_grad()
def pack_weights(model: Any, architecture: Architecture) -> Weights:
    """Read a model, merging what is not merged yet.

    The peak of memory is that of one layer's products above the model. The parameters stay the same objects; their
    storage changes where it is merged.

    Raises:
        UnsupportedWeights: for a model that the fast engines do not cover.
    """
    modules = check_packable(model, architecture)
    decoder = model.model
    layers = []
    for module, window, slot in zip(modules, architecture.windows, architecture.slots, strict=True):
        attention, mlp = module.self_attn, module.mlp
        with _merging:
            qkv, qkv_bias = _merged(attention.q_proj, attention.k_proj, attention.v_proj)
            gate_up, gate_up_bias = _merged(mlp.gate_proj, mlp.up_proj)
        normed = hasattr(attention, "q_norm")
        layers.append(
            Layer(
                input_norm=module.input_layernorm.weight.detach(),
                qkv=qkv,
                qkv_bias=qkv_bias,
                query_norm=attention.q_norm.weight.detach() if normed else None,
                key_norm=attention.k_norm.weight.detach() if normed else None,
                output=attention.o_proj.weight.detach(),
                output_bias=_bias(attention.o_proj),
                mlp_norm=module.post_attention_layernorm.weight.detach(),
                gate_up=gate_up,
                gate_up_bias=gate_up_bias,
                down=mlp.down_proj.weight.detach(),
                down_bias=_bias(mlp.down_proj),
                window=window,
                slot=slot,
            )
        )
    first, rotary, lm_head = modules[0].self_attn, decoder.rotary_emb, model.lm_head
    embedding, bias = decoder.embed_tokens.weight.detach(), _bias(lm_head)
    rows = len(embedding)  # a larger lm_head is padded: a token without an embedding could not be fed in
    tensors = {
        "embedding": embedding,
        "lm_head": lm_head.weight.detach()[:rows],
        "lm_head_bias": None if bias is None else bias[:rows],
        "final_norm": decoder.norm.weight.detach(),
    }
    numbers = {
        "eps": float(decoder.norm.variance_epsilon),
        "attention_scaling": float(rotary.attention_scaling),
        "scale": float(first.scaling),
        "query_heads": first.q_proj.weight.shape[0] // architecture.head_dim,
        "kv_heads": architecture.kv_heads,
        "head_dim": architecture.head_dim,
        "intermediate": layers[0].down.shape[1],
    }
    inv_freq = rotary.inv_freq.float()
    read = [value for part in [*map(vars, layers), tensors, numbers] for value in part.values()]
    # Of inv_freq the values: float() copies where the model was cast.
    key = (*((v.data_ptr(), v.shape, v.dtype) if isinstance(v, Tensor) else v for v in read), *inv_freq.tolist())
    return Weights(layers=tuple(layers), inv_freq=inv_freq, key=key, **tensors, **numbers)


@torch.no_grad()
def unpack_weights(model: Any) -> None:
    """Give every parameter that is a view of a merged tensor a storage of its own again."""
    with _merging, torch.inference_mode(False):
        for path, parameter in model.named_parameters():
            is_view = parameter.untyped_storage().nbytes() > parameter.nbytes
            if is_view and path.rpartition(".")[0].endswith(MERGED):
                parameter.data = parameter.data.clone()


def _bias(linear: nn.Linear) -> Tensor | None:
    return None if linear.bias is None else linear.bias.detach()


def _merged(*linears: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """The products as one matrix (and one bias), the modules' own parameters being views of it."""
    biases = [linear.bias for linear in linears if linear.bias is not None]
    return _joined([linear.weight for linear in linears]), _joined(biases) if biases else None


def _joined(parameters: Sequence[Tensor]) -> Tensor:
    first = parameters[0]
    rows = sum(len(p) for p in parameters)
    expected = first.data_ptr()
    storage = first.untyped_storage().data_ptr()
    for parameter in parameters:
        if parameter.data_ptr() != expected or parameter.untyped_storage().data_ptr() != storage:
            break
        expected += parameter.nbytes
    else:
        return first.detach().as_strided((rows, *first.shape[1:]), first.stride())
    with torch.inference_mode(False):  # what is made in inference mode could not be trained afterwards
        merged = torch.cat([p.data for p in parameters])
        start = 0
        for parameter in parameters:
            parameter.data = merged[start : start + len(parameter)]
            start += len(parameter)
    if merged.device.type == "cpu":
        _trim_heap()
    return merged


def _trim_heap() -> None:
    """Return freed memory to the system, where the C library can (glibc). The gaps that merging leaves are 64 bytes too small
    for the same products of the next layer: at 135M they were 8 to 22 MB in the end, of 269 MB of weights."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
