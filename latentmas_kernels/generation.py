"""latent_generate() and generate(): the two calls that an agent chain is made of."""

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    Cache,
    EosTokenCriteria,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from latentmas_kernels.alignment import Aligner, build_aligner
from latentmas_kernels.cache.latent_cache import LatentCache
from latentmas_kernels.engines import Engine, LatentParams, LatentResult, SamplingParams, SupportsDecode, open_engine
from latentmas_kernels.engines.stepwise import DecodeResult, decode_stepwise
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.inputs import Prompt, end_tokens, needed_capacity, padded_ids, read_prompt, steps_per_row
from latentmas_kernels.models.architecture import Architecture, logits_of
from latentmas_kernels.models.finite import check_finite_states, check_finite_weights
from latentmas_kernels.outputs import GenerateOutput, LatentOutput, Metrics


class _Clock:
    """Seconds since the last lap, after the device has done all work issued so far."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.last = device, time.perf_counter()

    def lap(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        return seconds


@torch.no_grad()
def latent_generate(
    model: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    inputs_embeds: Tensor | None = None,
    latent_steps: int | Sequence[int] = 10,
    settle: float | None = None,
    past_key_values: Cache | None = None,
    aligner: str | Aligner = "auto",
    engine: str = "auto",
    weights: str = "model",
    max_cache_len: int | None = None,
    on_step: Callable[[int], None] | None = None,
    output_states: bool = False,
    cross: Sequence[Aligner] = (),
) -> LatentOutput:
    """Prefill a prompt and run `latent_steps` latent steps (LatentMAS, arXiv 2511.20639, section 3).

    Each step maps the last hidden state to an input embedding (`build_aligner`) and feeds it in at the next position.
    All latents are fed, so a row's cache grows by its prompt and the steps that it takes.

    Args:
        model: a decoder-only causal LM of transformers, in eval mode.
        input_ids: int [B, T] on the model's device. Rows may be padded left or right.
        attention_mask: [B, T], or [B, past + T]; 0 marks padding. None: no padding.
        inputs_embeds: [B, T, D] in the model's dtype, instead of input_ids.
        latent_steps: 0 or more; 0 only prefills. A sequence gives each row a number of its own, 1 or more.
        settle: a row also ends with the first step, its second at the earliest, whose embedding has at least this cosine (-1
            to 1) to that of the step before. None is off. Rows end by themselves and leave the others alone.
        past_key_values: cache to extend. It is not changed (a fork is extended), unless it was `donate()`d.
        aligner: "auto", "ridge", "identity", "soft", or an Aligner of `build_aligner`.
        engine: "auto", "eager", "native" (CPU) or "cuda".
        weights: "model", or "int8": the weights of all linear layers rounded by row, symmetric, to a copy that is made once
            and kept with the model. Half the bytes of bfloat16 to read, and other numbers; on the native engine only.
        max_cache_len: slots per row to allocate, for later calls to extend in place; what this call needs when None.
        on_step: called with 0, 1, ... as the host issues each latent step, to show progress. A device may still be
            working on steps before it: the call does not wait.
        output_states: keep the state behind each step; without it, none is collected.
        cross: aligners to other models of the same tokenizer (`build_aligner(model, target_model=...)`), of the same sort as
            `aligner` (all "soft" or none). Each maps the same states to embeddings that its target model can be fed.

    Returns:
        LatentOutput.

    Raises:
        LatentMASError: where the model, an argument or the space does not fit, before any work is done; and where a hidden
            state comes out as NaN or Inf.
    """
    architecture = Architecture.of(model)
    clock = _Clock(architecture.device)
    runner = open_engine(engine, model, architecture, weights=weights)
    if settle is not None and (isinstance(settle, bool) or not -1 <= settle <= 1):
        raise LatentMASError(f"settle is a cosine, from -1 to 1, or None; got {settle}")
    prompt, past = read_prompt(architecture, input_ids, attention_mask, inputs_embeds, past_key_values)
    steps = steps_per_row(latent_steps, len(prompt.counts))
    capacity = needed_capacity(architecture, prompt, past, steps, "latent steps", max_cache_len)
    check_finite_weights(model)
    if isinstance(aligner, str):
        aligner = build_aligner(model, aligner)
    if not isinstance(aligner, Aligner):
        raise LatentMASError(f"aligner must be a name or an Aligner; got {type(aligner).__name__}")
    aligner.check_fits(architecture)
    _check_target_aligners(cross, aligner, architecture)
    cache = _cache(architecture, prompt, past, capacity)
    metrics = Metrics(runner.name, aligner.kind, setup_seconds=clock.lap())

    any_steps = int(steps.max()) > 0
    with cache.transaction():
        seed = prefill(runner, cache, prompt, logits=aligner.needs_logits and any_steps)
        metrics.prefill_tokens, metrics.prefill_seconds = int(prompt.counts.sum()), clock.lap()

        if any_steps:
            start = cache.lengths
            latent_params = LatentParams(steps, settle, record=output_states or bool(cross))
            result = runner.run_latent(cache, seed, aligner, latent_params, on_step)
            cache.add_segment("latent", start)
        else:
            nothing = seed.new_empty(len(seed), 0, architecture.hidden_size)
            result = LatentResult(nothing, seed, steps, nothing)
        check_finite_states(result.last_hidden, "latent steps", result.states)
        target_embeddings = [_target_embeddings(model, target_aligner, seed, result) for target_aligner in cross]
        metrics.latent_tokens, metrics.latent_seconds = int(result.steps.sum()), clock.lap()
    metrics.kv_bytes = cache.kv_bytes
    states = result.states if output_states else None
    return LatentOutput(
        cache, result.latents, result.last_hidden, metrics, result.steps.tolist(), states, target_embeddings
    )


@torch.no_grad()
def generate(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    past_key_values: Cache | None = None,
    max_new_tokens: int = 256,
    min_new_tokens: int = 0,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = 50,
    top_p: float = 1.0,
    eos_token_id: int | Sequence[int] | None | Literal["auto"] = "auto",
    pad_token_id: int | None = None,
    streamer: Any = None,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    engine: str = "auto",
    weights: str = "model",
) -> GenerateOutput:
    """Decode text behind a cache. The parameters mean what they mean in transformers' `generate()`.

    Args:
        model, input_ids, attention_mask, past_key_values, engine, weights: as in `latent_generate`. input_ids are the new
            tokens.
        max_new_tokens, min_new_tokens: limits per row; min_new_tokens keeps the end-of-sequence tokens away.
        do_sample: sample instead of taking the most likely token. The eager engine draws from torch's global generator,
            one draw per token; the native and CUDA engines draw a seed from it, once per call, for a generator of their
            own. Either way `torch.manual_seed` repeats a call on the same engine.
        temperature, top_k, top_p: shape the distribution that is sampled; top_k of None or 0 is off.
        eos_token_id: ends a row; "auto" takes the model's generation_config, None never stops.
        pad_token_id: fills behind ended rows; None takes the model's, or its end-of-sequence token.
        streamer: gets `put(ids)` for the prompt and then each step's tokens [B], and `end()`.
        logits_processor, stopping_criteria: called with the sequences so far, prompt included (not the past);
            criteria get None for the scores, as in transformers where none are kept.

    Returns:
        GenerateOutput.

    Raises:
        LatentMASError: as `latent_generate`.
    """
    architecture = Architecture.of(model)
    clock = _Clock(architecture.device)
    runner = open_engine(engine, model, architecture, weights=weights)
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise LatentMASError(f"max_new_tokens must be an integer of 1 or more; got {max_new_tokens!r}")
    if not 0 <= min_new_tokens <= max_new_tokens:
        raise LatentMASError(
            f"min_new_tokens must be between 0 and max_new_tokens={max_new_tokens}; got {min_new_tokens}"
        )
    prompt, past = read_prompt(architecture, input_ids, attention_mask, None, past_key_values)
    assert prompt.input_ids is not None
    # The last new token is not fed in, so it needs no slot.
    more = torch.full_like(prompt.counts, max_new_tokens - 1)
    capacity = needed_capacity(architecture, prompt, past, more, "new tokens but the last", None)
    check_finite_weights(model)
    ends = end_tokens(model, eos_token_id)
    if pad_token_id is None:
        pad_token_id = model.generation_config.pad_token_id
    if pad_token_id is None:
        pad_token_id = ends[0] if ends else 0
    sampling_params = SamplingParams(
        max_new_tokens, min_new_tokens, do_sample, temperature, top_k or 0, top_p, ends, pad_token_id
    )
    processors = _processors(prompt, sampling_params, logits_processor)  # they also check temperature, top_k and top_p
    cache = _cache(architecture, prompt, past, capacity)
    metrics = Metrics(runner.name, setup_seconds=clock.lap())

    sequences = padded_ids(prompt, pad_token_id)
    with cache.transaction():
        if streamer is not None:
            streamer.put(sequences.cpu())
        logits = prefill(runner, cache, prompt, logits=True)
        metrics.prefill_tokens, metrics.prefill_seconds = int(prompt.counts.sum()), clock.lap()
        start = cache.lengths
        result = None
        if not (logits_processor or stopping_criteria):
            result = decode_by_engine(runner, cache, sequences, logits, sampling_params, streamer)
        if result is None:
            criteria = StoppingCriteriaList([EosTokenCriteria(ends)] if ends else [])
            criteria.extend(stopping_criteria or [])
            result = decode_stepwise(
                runner, cache, sequences, logits, processors, criteria,
                max_new_tokens=max_new_tokens, do_sample=do_sample, pad_token_id=pad_token_id, streamer=streamer,
            )  # fmt: skip
        if bool((cache.lengths > start).any()):
            cache.add_segment("text", start)
        metrics.decode_tokens, metrics.decode_seconds = int(result.new_tokens.sum()), clock.lap()
    if streamer is not None:
        streamer.end()
    metrics.kv_bytes = cache.kv_bytes
    reasons: list[Literal["stop", "length"]] = ["stop" if stopped else "length" for stopped in result.stopped.tolist()]
    return GenerateOutput(result.sequences, cache, metrics, result.new_tokens.tolist(), reasons)


def prefill(engine: Engine, cache: LatentCache, prompt: Prompt, *, logits: bool) -> Tensor:
    """Run the prompt behind the cache as a segment "prompt". This modifies the cache.

    Returns:
        As `Engine.extend`: [B, V] logits or [B, D] states of each row's last position.

    Raises:
        LatentMASError: where they hold NaN or Inf.
    """
    start = cache.lengths
    result = engine.extend(cache, prompt, logits=logits)
    cache.add_segment("prompt", start)
    check_finite_states(result, "prompt")
    return result


def decode_by_engine(
    engine: Engine,
    cache: LatentCache,
    sequences: Tensor,
    logits: Tensor,
    sampling_params: SamplingParams,
    streamer: Any,
) -> DecodeResult | None:
    """Decode text in the engine's own loop; None where it has none for these parameters. This modifies the cache.

    Args:
        sequences: int64 [B, T], to which the new tokens are appended in the result.
        logits: [B, V], of each row's last position.
        streamer: gets `put(tokens [B])` for each step; None without one.
    """
    if not isinstance(engine, SupportsDecode):
        return None
    if not engine.can_decode(sampling_params, len(logits), streaming=streamer is not None):
        return None
    tokens = engine.decode(cache, logits, sampling_params, None if streamer is None else streamer.put)
    return DecodeResult(
        torch.cat([sequences, tokens.to(sequences.device)], dim=1),
        sampling_params.lengths(tokens),
        sampling_params.stopped(tokens),
        None,
        None,
    )


def _check_target_aligners(cross: Sequence[Aligner], aligner: Aligner, architecture: Architecture) -> None:
    """Raise LatentMASError for aligners that cannot read the states which this call's aligner reads."""
    for other in cross:
        if not isinstance(other, Aligner) or other.needs_logits != aligner.needs_logits:
            got = other.kind if isinstance(other, Aligner) else type(other).__name__
            raise LatentMASError(
                f"cross takes aligners that read what the own one reads, all 'soft' or none; got {got!r} beside "
                f"{aligner.kind!r}"
            )
        if other.weight is not None and other.weight.shape[1] != architecture.hidden_size:
            raise LatentMASError(
                f"an aligner of cross maps to and from {list(other.weight.shape)}; {architecture.name} has states of width "
                f"{architecture.hidden_size}: build it with build_aligner(model, target_model=...)"
            )


def _target_embeddings(model: Any, target_aligner: Aligner, seed: Tensor, result: LatentResult) -> Tensor:
    """Return the target's embeddings of the states that the latents were made of, [B, n, D of the target]."""
    assert result.states is not None
    batch, steps = result.latents.shape[:2]
    if steps == 0:
        return result.latents.new_empty(batch, 0, target_aligner.width or result.latents.shape[2])
    before = result.states[:, : steps - 1]
    if target_aligner.needs_logits:  # step by step: logits of all steps at once may be larger than the model
        later = (target_aligner(logits_of(model, state).float()) for state in before.unbind(1))
        embeddings = torch.stack([target_aligner(seed.float()), *later], dim=1)
    else:
        seeds = torch.cat([seed[:, None], before], dim=1)
        embeddings = target_aligner(seeds.flatten(0, 1)).unflatten(0, (batch, steps))
    behind = torch.arange(steps) >= result.steps[:, None]
    return embeddings.masked_fill(behind[:, :, None].to(embeddings.device), 0)


def _cache(architecture: Architecture, prompt: Prompt, past: LatentCache | None, capacity: int) -> LatentCache:
    return LatentCache.for_model(architecture, len(prompt.counts), capacity) if past is None else past.acquire(capacity)


def check_sampling(temperature: float, top_p: float) -> None:
    """Raise LatentMASError for a temperature (0 is greedy) or a top_p with which no token can be drawn."""
    if not 0 <= temperature < float("inf"):
        raise LatentMASError(f"temperature must be 0 (greedy) or more; got {temperature}")
    if not 0 < top_p <= 1:
        raise LatentMASError(f"top_p must be more than 0 and at most 1 (off); got {top_p}")


def _processors(
    prompt: Prompt, sampling_params: SamplingParams, own: LogitsProcessorList | None
) -> LogitsProcessorList:
    """Return transformers' processors in transformers' order."""
    processors = LogitsProcessorList()
    if sampling_params.min_new_tokens and sampling_params.eos_token_ids:
        assert prompt.input_ids is not None
        device = str(prompt.input_ids.device)
        processors.append(
            MinNewTokensLengthLogitsProcessor(
                prompt.columns, sampling_params.min_new_tokens, sampling_params.eos_token_ids, device=device
            )
        )
    processors.extend(own or [])
    if sampling_params.do_sample:
        if sampling_params.temperature != 1.0:
            processors.append(TemperatureLogitsWarper(sampling_params.temperature))
        if sampling_params.top_k:
            processors.append(TopKLogitsWarper(sampling_params.top_k))
        if sampling_params.top_p < 1.0:
            processors.append(TopPLogitsWarper(sampling_params.top_p))
    return processors
