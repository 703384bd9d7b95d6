"""The weights of a Llama-like decoder as the fast engines read them: live views of the model's own modules.

Queries, keys and values are one matrix, and so are gate and up: one launch each reads them. There is no second copy.
Where they are not adjacent in one storage yet, they are moved there, and the model's parameters become views of the merged
tensor; save_pretrained, state_dict, loading and tying work as before. Tools that go by storage do not (safetensors'
save_model and huggingface_hub's save_torch_model refuse, accelerate's save_model drops parameters that share one):
`unpack_weights` gives every parameter a storage of its own again.

No weight is kept between calls, so that memory which a model gave up (by `.to()`, say) is free. What is kept is a key: all that
`pack_weights` and a step read of the live modules, numbers included, since transformers reads eps off each norm and the scale
off each attention, not off the configuration. `.to()`, `.bfloat16()`, `deepcopy`, a LoRA, quantized layers or an edited number
change it, and while it is equal, the addresses and numbers that were packed before are still valid and nothing is packed or
checked again: 0.6 ms instead of 2.4 ms for a model of 28 layers.
"""

import ctypes
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn

from latentmas_kernels.models.architecture import Architecture
from latentmas_kernels.models.families import FAMILIES
from latentmas_kernels.models.module_settings import reread, state_of
from latentmas_kernels.models.packable import UnsupportedWeights, attention_of_transformers, check_packable

MERGED = tuple(sorted({name for family in FAMILIES.values() for name in (*family.qkv, *family.gate_up)}))
_merging = threading.Lock()  # two threads that merge at once would each make a copy
# The `weights_key` of each model that was found to be covered.
_covered: "weakref.WeakKeyDictionary[Any, tuple]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Layer:
    """One decoder layer. Matrices are [out, in] as in `torch.nn.Linear`; those that the model does not have are None.

    Attributes:
        input_norm, mlp_norm: [D], weights of the norms before attention and before the MLP.
        qkv, qkv_bias: [(Hq + 2 Hkv) hd, D], queries first, then keys, then values.
        query_norm, key_norm: [hd], weights of the norms per head (Qwen3).
        output, output_bias: [D, Hq hd].
        gate_up, gate_up_bias: [2 I, D], the gate first.
        down, down_bias: [D, I].
        window: positions that a query sees, its own included; None is all.
        slot: the place of the layer in the KV cache.
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
        inv_freq: float32 [hd / 2], the model's own buffer, or a copy where that has another dtype: whoever keeps an address of
            it keeps the tensor, and follows the buffer. attention_scaling: factor on cosine and sine.
        scale: of the attention scores.
        query_heads, kv_heads, head_dim, intermediate: sizes.
        key: see `weights_key`.
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
        """Bytes of the weights that a latent step reads: all but the embedding and the lm_head."""
        tensors = [t for layer in self.layers for t in vars(layer).values() if isinstance(t, Tensor)]
        return sum(t.nbytes for t in [*tensors, self.final_norm])


def weights_key(model: Any, architecture: Architecture) -> tuple[tuple, list[UntypedStorage]]:
    """Return all that `pack_weights` and a step read of a model, to compare, and the storages of the addresses in it.

    Weights that are edited in place keep their key, since steps read them where they are. RoPE's frequencies, of which there
    may be copies, change it: by their values on the CPU, elsewhere by their version, since values would have to be waited for.
    An edit through `.data` counts no version.
    """
    state, family = state_of(model), FAMILIES.get(type(model).__name__)
    frequencies = [] if family is None else [_content(buffer) for buffer in state.buffers]
    return (architecture, family, attention_of_transformers(), *frequencies, *state.key), state.storages


def unsupported_reason(model: Any, architecture: Architecture) -> str | None:
    """Return why `pack_weights` would refuse the model, as a clause, or None. This does not modify the model."""
    key = weights_key(model, architecture)[0]
    if _covered.get(model) == key:
        return None
    try:
        check_packable(model, architecture)
    except UnsupportedWeights as reason:
        return str(reason)
    _covered[model] = key
    return None


@torch.no_grad()
def pack_weights(model: Any, architecture: Architecture) -> Weights:
    """Return the weights of a model. This modifies the model: parameters that are not merged yet get a new storage, and stay
    the same objects with the same values.

    The peak of memory is one layer's merged matrices above the model.

    Raises:
        UnsupportedWeights: for a model that the fast engines do not cover.
    """
    modules = check_packable(model, architecture)
    decoder, family = model.model, FAMILIES[type(model).__name__]
    layers = []
    for module, window, slot in zip(modules, architecture.windows, architecture.slots, strict=True):
        attention, mlp = getattr(module, family.attention), getattr(module, family.mlp)
        with _merging:
            qkv, qkv_bias = _merged(*(getattr(attention, name) for name in family.qkv))
            gate_up, gate_up_bias = _merged(*(getattr(mlp, name) for name in family.gate_up))
        head_norms = [getattr(attention, name).weight.detach() for name in family.head_norms or ()] or [None, None]
        output, down = getattr(attention, family.output), getattr(mlp, family.down)
        layers.append(
            Layer(
                input_norm=getattr(module, family.input_norm).weight.detach(),
                qkv=qkv,
                qkv_bias=qkv_bias,
                query_norm=head_norms[0],
                key_norm=head_norms[1],
                output=output.weight.detach(),
                output_bias=_bias(output),
                mlp_norm=getattr(module, family.mlp_norm).weight.detach(),
                gate_up=gate_up,
                gate_up_bias=gate_up_bias,
                down=down.weight.detach(),
                down_bias=_bias(down),
                window=window,
                slot=slot,
            )
        )
    first, rotary, lm_head = getattr(modules[0], family.attention), decoder.rotary_emb, model.lm_head
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
        "query_heads": getattr(first, family.qkv[0]).weight.shape[0] // architecture.head_dim,
        "kv_heads": architecture.kv_heads,
        "head_dim": architecture.head_dim,
        "intermediate": layers[0].down.shape[1],
    }
    reread(model)  # merging has moved weights
    key = _covered[model] = weights_key(model, architecture)[0]
    return Weights(layers=tuple(layers), inv_freq=rotary.inv_freq.float(), key=key, **tensors, **numbers)


@torch.no_grad()
def unpack_weights(model: Any) -> None:
    """Give every parameter that is a view of a merged tensor a storage of its own again. This modifies the model."""
    with _merging, torch.inference_mode(False):
        for path, parameter in model.named_parameters():
            is_view = parameter.untyped_storage().nbytes() > parameter.nbytes
            if is_view and path.rpartition(".")[0].endswith(MERGED):
                parameter.data = parameter.data.clone()


def _content(buffer: Tensor) -> Any:
    if buffer.device.type == "cpu":
        return tuple(buffer.flatten().tolist())
    return None if buffer.is_inference() else buffer._version


def _bias(linear: nn.Linear) -> Tensor | None:
    return None if linear.bias is None else linear.bias.detach()


def _merged(*linears: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Return linear layers as one matrix and one bias or None. This makes their parameters views of it."""
    biases = [linear.bias for linear in linears if linear.bias is not None]
    return _concat_views([linear.weight for linear in linears]), _concat_views(biases) if biases else None


def _concat_views(parameters: Sequence[Tensor]) -> Tensor:
    """Return parameters as one tensor, concatenated along the rows. This makes them views of it where they are not yet."""
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
    with torch.inference_mode(False):  # tensors made in inference mode could not be trained afterwards
        merged = torch.cat([p.data for p in parameters])
        start = 0
        for parameter in parameters:
            parameter.data = merged[start : start + len(parameter)]
            start += len(parameter)
    if merged.device.type == "cpu":
        _trim_heap()
    return merged


def _trim_heap() -> None:
    """Return freed memory to the system, where the C library can (glibc).

    The gaps that merging leaves are 64 bytes too small for the same matrices of the next layer: at 135M they added up to 8 to
    22 MB, of 269 MB of weights.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
