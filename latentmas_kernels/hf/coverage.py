"""Decide which calls of transformers' `generate()` run on our engines; the others run in transformers' own loop."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    EosTokenCriteria,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from latentmas_kernels.cache.from_hf import PLAIN_LAYERS
from latentmas_kernels.cache.latent_cache import LatentCache
from latentmas_kernels.cache.padded_cache import PaddedCache, real_columns
from latentmas_kernels.engines import SamplingParams
from latentmas_kernels.models.architecture import Architecture, cache_argument

# The name of the cache's argument in generate() and its loops.
CACHE = cache_argument(GenerationMixin.prepare_inputs_for_generation)
# Inputs that transformers passes to every decoding loop. `use_cache` and `logits_to_keep` do not change the tokens; `tokenizer`
# is for stop_strings, which are criteria by then.
KNOWN_INPUTS = {
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", CACHE, "use_cache", "logits_to_keep",
    "tokenizer",
}  # fmt: skip
NEVER = float("-inf")
# Processors that the engines' own loops have, in the order in which transformers applies them.
ORDER: tuple[type, ...] = (
    RepetitionPenaltyLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
)
WARPERS = {TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper}


def unsupported_reason(
    model: Any, generation_config: GenerationConfig, synced_gpus: bool, inputs: dict[str, Any]
) -> str | None:
    """Return why a call of transformers' decoding loop is left to transformers, as a clause; None where it is not.

    Args:
        inputs: of the model's forward, as the loop got them, input_ids included.
    """
    if synced_gpus:
        return "its GPUs have to stay in step (synced_gpus)"
    if generation_config.is_assistant:
        return "it drafts for another model (assisted decoding)"
    if generation_config.output_attentions or generation_config.output_hidden_states:
        return "attentions or hidden states of every step were asked for"
    if _records(generation_config) and _has_padded_head(model):
        return "scores of tokens that have no input embedding were asked for (its lm_head has more rows)"
    if generation_config.prefill_chunk_size is not None:
        return "prefill_chunk_size was asked for"
    # A model on "meta" was offloaded, which no engine covers: autocast, unknown there, is nothing to ask for.
    if model.device.type != "meta" and torch.is_autocast_enabled(model.device.type):
        return "autocast is on"
    if getattr(type(model), "_original", type(model))._sample is not GenerationMixin._sample:
        return "its decoding loop is one of its own (_sample)"
    prepares = model.prepare_inputs_for_generation
    if "prepare_inputs_for_generation" in vars(model) or not prepares.__module__.startswith("transformers."):
        return "its inputs are prepared by a function of its own (prepare_inputs_for_generation)"
    other = sorted(name for name, value in inputs.items() if value is not None and name not in KNOWN_INPUTS)
    if other:
        return f"its forward gets {', '.join(other)}"
    past = inputs.get(CACHE)
    if past is not None and not isinstance(past, LatentCache):
        if not isinstance(past, PaddedCache) and not type(past).__module__.startswith("transformers."):
            return f"its cache is a {type(past).__name__}, which may do something of its own"
        strange = sorted({type(layer).__name__ for layer in past.layers if type(layer) not in PLAIN_LAYERS})
        if strange:
            return f"its cache has layers of type {', '.join(strange)}"
        if getattr(past, "offloading", False):
            return "its cache is offloaded"
    if inputs.get("position_ids") is None:
        return "its forward takes no position_ids"
    mask = inputs.get("attention_mask")
    if mask is not None and not bool(((mask == 0) | (mask == 1)).all()):
        return "attention_mask holds other values than 0 and 1"
    if cached_columns(inputs) is None:
        return "attention_mask and input_ids do not tell which tokens are new to the cache"
    if not _positions_are_counted(inputs):
        return "position_ids were given that do not count the tokens of attention_mask"
    return None


def what_its_cache_drops(model: Any, architecture: Architecture) -> str | None:
    """Return why the answer of transformers' own loop differs from the model's forward over the whole sequence, as a clause.

    The loop makes its cache of the configuration alone. Where that names windows that no layer has, the cache forgets positions
    which the layers attend to, and the answer depends on what was read in one piece.
    """
    if 0 not in architecture.slots:
        return "its layer of layer_idx 0 was taken out, by which transformers counts what its cache holds"
    try:
        layers: list[Any] = DynamicCache(config=model.config).layers
    except Exception as error:  # of a configuration that was edited by hand; the loop raises it too
        return f"transformers makes no cache of its configuration ({type(error).__name__})"
    for slot, window in zip(architecture.slots, architecture.windows, strict=True):
        kept = layers[slot].sliding_window if slot < len(layers) and layers[slot].is_sliding else None
        if kept is not None and (window is None or window > kept):
            seen = "all" if window is None else window
            return (
                f"the cache of its configuration keeps {kept} positions of layer {slot}, whose code attends to {seen}"
            )
    return None


def _records(config: GenerationConfig) -> bool:
    return bool(config.return_dict_in_generate and (config.output_scores or config.output_logits))


def _has_padded_head(model: Any) -> bool:
    lm_head = getattr(model.get_output_embeddings(), "weight", None)
    embedding = getattr(model.get_input_embeddings(), "weight", None)
    return lm_head is not None and embedding is not None and len(lm_head) > len(embedding)


def past_columns(past: Cache | None) -> int:
    """Return the columns of a cache, padding of a transformers cache included; of a LatentCache, those of its longest row."""
    if isinstance(past, LatentCache):
        return int(past.lengths.max())
    return int(past.get_seq_length()) if past is not None and past.layers else 0


def cached_columns(inputs: dict[str, Any]) -> int | None:
    """Return how many of the given columns are in the cache already; None where that is not known.

    transformers takes the whole conversation (the mask is as long as the ids; always so with embeddings), or the new tokens
    only (the mask is longer by the past). What goes behind a LatentCache is always new, whatever the mask covers; behind a
    PaddedCache with padding it is, unless the mask begins with that padding.
    """
    embeds, past = inputs.get("inputs_embeds"), inputs.get(CACHE)
    given = (inputs["input_ids"] if embeds is None else embeds).shape[1]
    held, seen = past_columns(past), _mask_columns(inputs)
    if isinstance(past, LatentCache):
        return 0 if seen in (given, held + given) else None
    if (
        isinstance(past, PaddedCache)
        and seen == given
        and (real := real_columns(past)) is not None
        and not bool(real.all())
    ):
        repeats = given > held and torch.equal(mask_of(inputs)[:, :held].to(real.device) != 0, real)
        return held if repeats else 0
    if seen == given > held:
        return held
    return 0 if seen == held + given and embeds is None else None


def mask_of(inputs: dict[str, Any]) -> Tensor:
    """Return the mask of the caller or of transformers, int64 [B, columns]; transformers drops one that is all ones."""
    mask = inputs.get("attention_mask")
    return inputs["input_ids"].new_ones(len(inputs["input_ids"]), _mask_columns(inputs)) if mask is None else mask


def _mask_columns(inputs: dict[str, Any]) -> int:
    """Return the mask's columns. Without it, those of the positions, which transformers makes from it."""
    mask = inputs.get("attention_mask")
    return int((inputs["position_ids"] if mask is None else mask).shape[1])


def _positions_are_counted(inputs: dict[str, Any]) -> bool:
    positions, mask = inputs["position_ids"], mask_of(inputs)
    counted = (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)
    return positions.shape[1] == counted.shape[1] and bool((positions == counted[: len(positions)]).all())


def to_sampling_params(
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    input_ids: Tensor,
    width: int,
) -> SamplingParams | None:
    """Return the call's parameters for an engine's own loop, or None where processors or criteria need one step at a time.

    Reads what transformers built, not the configuration: a processor that the caller passed may stand in for one of those.

    Args:
        width: of the logits.
    """
    kinds = [type(processor) for processor in processors]
    if not set(kinds) <= set(ORDER) or kinds != sorted(set(kinds), key=ORDER.index):
        return None
    if any(getattr(p, "min_tokens_to_keep", 1) != 1 or getattr(p, "filter_value", NEVER) != NEVER for p in processors):
        return None
    if any(type(criterion) not in (MaxLengthCriteria, EosTokenCriteria) for criterion in criteria):
        return None
    given: dict[type, Any] = {type(processor): processor for processor in processors}
    if not config.do_sample and set(kinds) & WARPERS:  # the caller's own: transformers makes them for sampling only
        return None
    columns = input_ids.shape[1]
    ends = sorted({int(t) for c in criteria if isinstance(c, EosTokenCriteria) for t in c.eos_token_id.flatten()})
    at_least = [given[kind] for kind in (MinLengthLogitsProcessor, MinNewTokensLengthLogitsProcessor) if kind in given]
    if any(sorted({int(token) for token in p.eos_token_id.flatten()}) != ends for p in at_least):
        return None
    penalty = given.get(RepetitionPenaltyLogitsProcessor)
    ignored = getattr(penalty, "prompt_ignore_length", None)
    if ignored is not None and int(torch.as_tensor(ignored).max()) > columns:
        return None  # with embeddings transformers leaves out as many new tokens as the prompt had padding

    def setting(kind: type, name: str, otherwise: float) -> Any:
        return getattr(given[kind], name) if kind in given else otherwise

    return SamplingParams(
        max_new_tokens=max_new_tokens_of(criteria, columns),
        min_new_tokens=max([0, *(_least_new_tokens(p, columns) for p in at_least)]),
        do_sample=bool(config.do_sample),
        temperature=setting(TemperatureLogitsWarper, "temperature", 1.0),
        top_k=setting(TopKLogitsWarper, "top_k", 0),
        top_p=setting(TopPLogitsWarper, "top_p", 1.0),
        eos_token_ids=ends,
        pad_token_id=0 if config._pad_token_tensor is None else int(config._pad_token_tensor),
        min_p=setting(MinPLogitsWarper, "min_p", 0.0),
        repetition_penalty=1.0 if penalty is None else penalty.penalty,
        penalty_mask=None if penalty is None else _penalised(penalty, input_ids, width),
    )


def _least_new_tokens(processor: Any, columns: int) -> int:
    if isinstance(processor, MinLengthLogitsProcessor):
        return processor.min_length - columns
    return processor.min_new_tokens - (columns - processor.prompt_length_to_skip)


def _penalised(penalty: RepetitionPenaltyLogitsProcessor, input_ids: Tensor, width: int) -> Tensor:
    """Return the tokens that the processor penalises, bool [B, width]: it leaves out padding, and an ignored prompt."""
    if input_ids.shape[1] == 0:
        return torch.zeros(len(input_ids), width, dtype=torch.bool, device=input_ids.device)
    ones = torch.ones(len(input_ids), width, device=input_ids.device)
    return penalty(input_ids, ones) != 1


def max_new_tokens_of(criteria: StoppingCriteriaList, columns: int) -> int:
    """Return the number of new tokens at which the first MaxLengthCriteria ends the call."""
    return max(1, int(min(c.max_length for c in criteria if type(c) is MaxLengthCriteria)) - columns)
