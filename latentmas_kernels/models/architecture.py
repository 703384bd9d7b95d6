"""Architecture: shapes and limits of a Hugging Face decoder. Models that cannot run are refused with a reason."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.models.layout import NoLayoutError, find_layout

SUPPORTED = "supported are decoder-only causal LMs of transformers with full or sliding-window attention"
# GPT-Neo's local layers count their window in columns, whatever mask they get: ragged rows would see other positions.
LAYER_TYPES = {"full_attention", "sliding_attention", "global"}
# The name of a forward's cache argument: transformers from 5.24 on; earlier versions, and repositories written for them.
CACHE_ARGUMENTS = ("cache", "past_key_values")
ATTENTIONS = {"sdpa", "eager"}  # the implementations that take the explicit mask which ragged rows need


class UnsupportedModelError(LatentMASError):
    """The model cannot run here; the message says what was got, what is supported and what to do."""


class KVShape(NamedTuple):
    """Shape and dtype of the keys and values of one slot, over all layers."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.layers} layers, {self.kv_heads} KV heads of {self.head_dim}, {self.dtype}"


@dataclass(frozen=True)
class Architecture:
    """Shapes and limits of one decoder.

    Attributes:
        name: class of the model, for messages.
        layers, kv_heads, head_dim: shape of the KV cache.
        slots: per layer, in the order in which they run, its place in the KV cache; a layer that was removed leaves a gap.
        hidden_size, vocab_size: width of the hidden states; rows of the input embedding.
        max_positions: positions that the model was made for (max_position_embeddings); None without a limit.
        windows: per layer, in the order in which they run, how many positions a query sees, itself included; None is all.
        dtype, device: of the hidden states and the KV cache.
    """

    name: str
    layers: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_positions: int | None
    windows: tuple[int | None, ...]
    slots: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, model: Any) -> "Architecture":
        """Return the architecture of a model, or raise UnsupportedModelError. This does not modify the model.

        Reads no weights. What the layers attend to and keep is found by a trial, once per state of the model's settings.
        """
        try:
            return cls._read(model)
        except UnsupportedModelError:
            raise
        except Exception as error:  # a configuration may be of any shape: fields that are missing, or differ by layer
            raise UnsupportedModelError(
                f"the configuration of {type(model).__name__} could not be read ({in_short(error)}); {SUPPORTED}"
            ) from error

    @classmethod
    def _read(cls, model: Any) -> "Architecture":
        name = type(model).__name__
        config = getattr(model, "config", None)
        if config is None or not hasattr(model, "get_input_embeddings"):
            raise UnsupportedModelError(f"got a {name}, which is no transformers model; {SUPPORTED}")
        if getattr(config, "is_encoder_decoder", False):
            raise UnsupportedModelError(f"{name} is an encoder-decoder model; {SUPPORTED}")
        if config.get_text_config(decoder=True) is not config:
            raise UnsupportedModelError(f"{name} is multimodal; {SUPPORTED}. Load its text model by itself.")
        if not _is_causal(model):
            raise UnsupportedModelError(
                f"{name} ({config.model_type}) attends in both directions; {SUPPORTED}. Where its weights were trained as a "
                "decoder's, load it with is_decoder=True in its configuration."
            )
        kinds = [
            getattr(config, name, None) for name in ("layer_types", "attention_layers")
        ]  # the latter are GPT-Neo's
        unknown = sorted({kind for each in kinds if isinstance(each, (list, tuple)) for kind in each} - LAYER_TYPES)
        if unknown:
            raise UnsupportedModelError(f"{name} has layers of type {', '.join(unknown)}; {SUPPORTED}")
        if getattr(model, "_is_stateful", False):
            raise UnsupportedModelError(f"{name} keeps a recurrent state instead of keys and values; {SUPPORTED}")
        if getattr(config, "kv_lora_rank", None) or getattr(config, "num_kv_shared_layers", None):
            raise UnsupportedModelError(f"{name} compresses or shares its KV cache between layers; {SUPPORTED}")
        if _output_embeddings(model) is None:
            raise UnsupportedModelError(
                f"{name} has no output embeddings (get_output_embeddings() gives None); {SUPPORTED}. "
                "Load it with AutoModelForCausalLM."
            )
        decoder_takes = inspect.signature(decoder_of(model).forward).parameters
        missing = {"position_ids", "inputs_embeds", "attention_mask"} - set(decoder_takes)
        if not any(argument in decoder_takes for argument in CACHE_ARGUMENTS):
            missing.add(" or ".join(CACHE_ARGUMENTS))
        if "logits_to_keep" not in inspect.signature(model.forward).parameters:
            missing.add("logits_to_keep")
        if missing:
            raise UnsupportedModelError(f"{name} does not take {', '.join(sorted(missing))} in forward(); {SUPPORTED}")
        attention = getattr(config, "_attn_implementation", "eager")
        if attention not in ATTENTIONS:
            raise UnsupportedModelError(
                f"{name} runs attention as {attention!r}, which cannot mask ragged rows; supported are "
                f"{sorted(ATTENTIONS)}: load it with attn_implementation='sdpa'"
            )
        if model.training:
            raise UnsupportedModelError(f"{name} is in training mode, where dropout is random; call model.eval() first")

        embedding, decoder = model.get_input_embeddings(), decoder_of(model)
        if embedding.weight.is_meta and any(hasattr(module, "_hf_hook") for module in model.modules()):
            raise UnsupportedModelError(
                f"{name} has its embeddings offloaded to the CPU or the disk, where nothing can be read of them between two "
                "forwards; supported are models of which other parts are: a device_map can keep the embeddings on a device"
            )
        try:
            layout = find_layout(decoder, config, embedding.weight.device, cache_argument(decoder.forward))
        except NoLayoutError as reason:
            raise UnsupportedModelError(f"{name} cannot be followed: {reason}; {SUPPORTED}") from reason
        shapes = sorted(set(layout.shapes))
        if len(shapes) > 1:
            each = ", ".join(f"{heads} heads of width {width}" for heads, width in shapes)
            raise UnsupportedModelError(f"{name} keeps keys and values of different shapes ({each}); {SUPPORTED}")
        return cls(
            name=name,
            layers=max(layout.slots) + 1,
            kv_heads=shapes[0][0],
            head_dim=shapes[0][1],
            hidden_size=config.hidden_size,
            vocab_size=embedding.weight.shape[0],
            max_positions=getattr(config, "max_position_embeddings", None),
            windows=layout.windows,
            slots=layout.slots,
            dtype=model.dtype,
            device=embedding.weight.device,
        )

    @property
    def kv_shape(self) -> KVShape:
        return KVShape(self.layers, self.kv_heads, self.head_dim, self.dtype)

    @property
    def gaps(self) -> tuple[int, ...]:
        """Places of the KV cache in which no layer runs."""
        return tuple(sorted(set(range(self.layers)) - set(self.slots)))

    @property
    def layer_types(self) -> tuple[str, ...]:
        """Each layer's kind of attention, by its name in transformers."""
        return tuple("full_attention" if window is None else "sliding_attention" for window in self.windows)


def decoder_of(model: Any) -> Any:
    """Return the module whose last_hidden_state is the state after the final norm: the model without its lm_head."""
    decoder = model.get_decoder()
    if decoder is model:
        raise UnsupportedModelError(f"{type(model).__name__} has no decoder of its own below the lm_head; {SUPPORTED}")
    return decoder


def cache_argument(forward: Callable[..., Any]) -> str:
    """Return the name under which a forward takes its cache, read off its signature."""
    taken = inspect.signature(forward).parameters
    return next((argument for argument in CACHE_ARGUMENTS if argument in taken), CACHE_ARGUMENTS[-1])


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """Return logits [..., V] of states [..., D] after the final norm, scaled and capped as in the model's own forward.

    V counts the tokens that have an input embedding; a padded lm_head has more rows.
    """
    logits = model.get_output_embeddings()(hidden)[..., : model.get_input_embeddings().weight.shape[0]]
    config = model.config
    if getattr(config, "logits_scaling", None):  # Granite divides, HyperCLOVA X multiplies
        logits = (
            logits * config.logits_scaling if config.model_type == "hyperclovax" else logits / config.logits_scaling
        )
    if getattr(config, "logit_scale", None):  # Cohere
        logits = logits * config.logit_scale
    if getattr(config, "final_logit_softcapping", None):  # Gemma 2 and 3
        logits = (logits / config.final_logit_softcapping).tanh() * config.final_logit_softcapping
    return logits


def in_short(error: Exception) -> str:
    """Return the type and the first line of an error, as part of another message."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first[:200]}" if first else type(error).__name__


def _output_embeddings(model: Any) -> nn.Module | None:
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _is_causal(model: Any) -> bool:
    """Return whether a model attends causally: AutoModelForCausalLM also loads encoders (BERT), with a warning and no mask."""
    of_attention = next((m.is_causal for m in model.modules() if hasattr(m, "is_causal")), None)
    return getattr(model.config, "is_decoder", True) is not False if of_attention is None else bool(of_attention)
