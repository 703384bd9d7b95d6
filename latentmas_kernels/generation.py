"""latent_generate() and generate(): the two calls that an agent chain is made of."""

import operator
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
from latentmas_kernels.engines import LatentParams, LatentResult, SamplingParams, SupportsDecode, open_engine
from latentmas_kernels.engines.stepwise import decode_stepwise
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.inputs import Prompt, read_prompt
from latentmas_kernels.models.architecture import Architecture, logits_of
from latentmas_kernels.models.finite import check_finite_states, check_finite_weights


@dataclass
class Metrics:
    """What a call did and how long it took. Tokens are summed over rows, without padding; seconds are wall clock.

    Attributes:
        engine: the engine that ran.
        aligner: the kind of feedback, None for generate().
        prefill_tokens, latent_tokens, decode_tokens: positions of the prompt, latent steps, new tokens.
        setup_seconds: checks, aligner, the fork or allocation of the cache.
        prefill_seconds, latent_seconds, decode_seconds: the phases; the first new token is counted as decoding.
        kv_bytes: keys and values that the cache holds afterwards.
    """

    engine: str
    aligner: str | None = None
    prefill_tokens: int = 0
    latent_tokens: int = 0
    decode_tokens: int = 0
    setup_seconds: float = 0.0
    prefill_seconds: float = 0.0
    latent_seconds: float = 0.0
    decode_seconds: float = 0.0
    kv_bytes: int = 0


@dataclass
class LatentOutput:
    """Result of latent_generate().

    Attributes:
        past_key_values: memory with the prompt and the latent steps.
        latents: [B, n, D], the embeddings that were fed back, after W_a and the rescale; n is the longest row's number of
            steps, behind a row's end there are zeros.
        last_hidden: [B, D], the state after the final norm at each row's last position.
        metrics: counts and times.
        latent_steps: per row, how many steps it took.
        states: [B, n, D], the state after the final norm behind each step, or None where they were not asked for.
        crossed: what each aligner of `cross` made of the states that the latents were made of, [B, n, D of its target].
    """

    past_key_values: LatentCache
    latents: Tensor
    last_hidden: Tensor
    metrics: Metrics
    latent_steps: list[int]
    states: Tensor | None = None
    crossed: list[Tensor] = field(default_factory=list)


@dataclass
class GenerateOutput:
    """Result of generate().

    Attributes:
        sequences: int64 [B, T + new], the prompt left-padded, then the new tokens; behind a row's end the padding token.
        past_key_values: memory with the prompt and all new tokens but each row's last, which was not fed in.
        metrics: counts and times.
        new_tokens: per row, how many of the new tokens are its own, its end token included.
        finish_reasons: per row, "stop" (an end token or a stopping criterion) or "length".
    """

    sequences: Tensor
    past_key_values: LatentCache
    metrics: Metrics
    new_tokens: list[int]
    finish_reasons: list[Literal["stop", "length"]]


class _Clock:
    """Seconds since the last lap, with the device's queue drained first."""

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
    """Read a prompt and think `latent_steps` steps in hidden states (LatentMAS, arXiv 2511.20639, section 3).

    Each step maps the last hidden state to an input embedding (`build_aligner`) and feeds it in at the next position.
    All latents are fed, so a row's memory grows by its prompt and the steps that it takes.

    Args:
        model: a decoder-only causal LM of transformers, in eval mode.
        input_ids: int [B, T] on the model's device. Rows may be padded left or right.
        attention_mask: [B, T], or [B, past + T]; 0 marks padding. None: no padding.
        inputs_embeds: [B, T, D] in the model's dtype, instead of input_ids.
        latent_steps: 0 or more; 0 only reads the prompt. A sequence gives each row a number of its own, 1 or more.
        settle: a row also ends with the first step, its second at the earliest, whose embedding has at least this cosine (-1
            to 1) to that of the step before. None is off. Rows end by themselves and leave the others alone.
        past_key_values: memory to go on from. It is not changed (a fork is extended), unless it was `donate()`d.
        aligner: "auto", "ridge", "identity", "soft", or what `build_aligner` gave.
        engine: "auto", "eager", "native" (CPU) or "cuda".
        weights: "model", or "int8": the products' weights rounded by row, symmetric, to a copy that is made once and kept
            with the model. Half the bytes of bfloat16 to read, and other numbers; on the native engine only.
        max_cache_len: slots per row to allocate, for later calls to extend in place; what this call needs when None.
        on_step: called with 0, 1, ... as the host issues each latent step, to show progress. A device may still be
            working on steps before it: the call does not wait.
        output_states: keep the state behind each step; without it, none is collected.
        cross: aligners to other models of the same tokenizer (`build_aligner(model, target_model=...)`), of the same sort as
            `aligner` (all "soft" or none). What they make of the same thoughts is what those models can be fed.

    Returns:
        LatentOutput.

    Raises:
        ValueError: where the model, an argument or the space does not fit, before any work is done; and where a hidden
            state comes out as NaN or Inf.
    """
    architecture = Architecture.of(model)
    clock = _Clock(architecture.device)
    runner = open_engine(engine, model, architecture, weights=weights)
    if settle is not None and (isinstance(settle, bool) or not -1 <= settle <= 1):
        raise LatentMASError(f"settle is a cosine, from -1 to 1, or None; got {settle}")
    prompt, past = read_prompt(architecture, input_ids, attention_mask, inputs_embeds, past_key_values)
    steps = _steps(latent_steps, len(prompt.counts))
    capacity = _capacity(architecture, prompt, past, steps, "latent steps", max_cache_len)
    check_finite_weights(model)
    if isinstance(aligner, str):
        aligner = build_aligner(model, aligner)
    if not isinstance(aligner, Aligner):
        raise LatentMASError(f"aligner must be a name or an Aligner; got {type(aligner).__name__}")
    aligner.check_fits(architecture)
    _check_cross(cross, aligner, architecture)
    think = int(steps.max()) > 0
    cache = _cache(architecture, prompt, past, capacity)
    metrics = Metrics(runner.name, aligner.kind, setup_seconds=clock.lap())

    with cache.transaction():
        start = cache.lengths
        seed = runner.extend(cache, prompt, logits=aligner.needs_logits and think)
        cache.add_segment("prompt", start)
        check_finite_states(seed, "prompt")
        metrics.prefill_tokens, metrics.prefill_seconds = int(prompt.counts.sum()), clock.lap()

        start = cache.lengths
        if think:
            thought = runner.run_latent(
                cache, seed, aligner, LatentParams(steps, settle, record=output_states or bool(cross)), on_step
            )
            cache.add_segment("latent", start)
        else:
            nothing = seed.new_empty(len(seed), 0, architecture.hidden_size)
            thought = LatentResult(nothing, seed, steps, nothing)
        check_finite_states(thought.last_hidden, "latent steps", thought.states)
        crossed = [_crossed(model, other, seed, thought) for other in cross]
        metrics.latent_tokens, metrics.latent_seconds = int(thought.steps.sum()), clock.lap()
    metrics.kv_bytes = cache.kv_bytes
    states = thought.states if output_states else None
    return LatentOutput(cache, thought.latents, thought.last_hidden, metrics, thought.steps.tolist(), states, crossed)


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
    """Decode text behind a memory. The parameters mean what they mean in transformers' `generate()`.

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
        ValueError: as `latent_generate`.
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
    capacity = _capacity(architecture, prompt, past, more, "new tokens but the last", None)
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

    sequences = _padded(prompt, pad_token_id)
    with cache.transaction():
        if streamer is not None:
            streamer.put(sequences.cpu())
        start = cache.lengths
        logits = runner.extend(cache, prompt, logits=True)
        cache.add_segment("prompt", start)
        check_finite_states(logits, "prompt")
        metrics.prefill_tokens, metrics.prefill_seconds = int(prompt.counts.sum()), clock.lap()
        start = cache.lengths
        alone = not (logits_processor or stopping_criteria)
        if (
            alone
            and isinstance(runner, SupportsDecode)
            and runner.can_decode(sampling_params, len(logits), streaming=streamer is not None)
        ):
            tokens = runner.decode(cache, logits, sampling_params, None if streamer is None else streamer.put)
            sequences = torch.cat([sequences, tokens], dim=1)
            new = sampling_params.lengths(tokens)
            stopped = torch.isin(tokens.cpu()[torch.arange(len(new)), new - 1], torch.tensor(ends, dtype=torch.int64))
        else:
            criteria = StoppingCriteriaList([EosTokenCriteria(ends)] if ends else [])
            criteria.extend(stopping_criteria or [])
            spoken = decode_stepwise(
                runner, cache, sequences, logits, processors, criteria,
                max_new_tokens=max_new_tokens, do_sample=do_sample, padding=pad_token_id, streamer=streamer,
            )  # fmt: skip
            sequences, new, stopped = spoken.sequences, spoken.new_tokens, spoken.stopped
        if bool((cache.lengths > start).any()):
            cache.add_segment("text", start)
        metrics.decode_tokens, metrics.decode_seconds = int(new.sum()), clock.lap()
    if streamer is not None:
        streamer.end()
    metrics.kv_bytes = cache.kv_bytes
    return GenerateOutput(
        sequences, cache, metrics, new.tolist(), ["stop" if done else "length" for done in stopped.tolist()]
    )


def _steps(latent_steps: int | Sequence[int], batch: int) -> Tensor:
    """int64 [B], each row's own number."""
    given = list(latent_steps) if isinstance(latent_steps, Sequence) else [latent_steps] * batch
    try:
        each = [-1 if isinstance(n, bool) else operator.index(n) for n in given]  # those of numpy as well
    except TypeError:
        each = []
    if len(each) != batch or min(each) < 0:
        raise LatentMASError(f"latent_steps must be an integer of 0 or more, or {batch} of them; got {latent_steps!r}")
    if 0 in each and any(each):
        raise LatentMASError(f"rows that think and rows that do not need calls of their own; got latent_steps={each}")
    return torch.tensor(each)


def _check_cross(cross: Sequence[Aligner], aligner: Aligner, architecture: Architecture) -> None:
    """Raise ValueError for what cannot be made of this model's thoughts."""
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


def _crossed(model: Any, aligner: Aligner, seed: Tensor, thought: LatentResult) -> Tensor:
    """What the aligner makes of what the latents were made of, [B, n, D of its target]."""
    assert thought.states is not None
    batch, steps = thought.latents.shape[:2]
    if steps == 0:
        return thought.latents.new_empty(batch, 0, aligner.width or thought.latents.shape[2])
    before = thought.states[:, : steps - 1]
    if aligner.needs_logits:  # step by step: logits of all steps at once may be larger than the model
        later = (aligner(logits_of(model, state).float()) for state in before.unbind(1))
        embeddings = torch.stack([aligner(seed.float()), *later], dim=1)
    else:
        seeds = torch.cat([seed[:, None], before], dim=1)
        embeddings = aligner(seeds.flatten(0, 1)).unflatten(0, (batch, steps))
    behind = torch.arange(steps) >= thought.steps[:, None]
    return embeddings.masked_fill(behind[:, :, None].to(embeddings.device), 0)


def _capacity(
    architecture: Architecture,
    prompt: Prompt,
    past: LatentCache | None,
    more: Tensor,
    what: str,
    max_cache_len: int | None,
) -> int:
    """Slots per row to have, once all that the call will append is known to fit."""
    zeros = torch.zeros_like(prompt.counts)
    held, position = (zeros, zeros) if past is None else (past.lengths, past.next_position)
    slots = held + prompt.counts + more
    row = int(slots.argmax())
    need = int(slots[row])
    parts = f"past {int(held[row])} + prompt {int(prompt.counts[row])} + {what} {int(more[row])}"
    if max_cache_len is not None and need > max_cache_len:
        raise LatentMASError(
            f"row {row} needs {need} slots ({parts}), but max_cache_len is {max_cache_len}; "
            f"pass max_cache_len={need} or more, or shorten the prompt"
        )
    last = int((position + prompt.counts + more).max())
    if architecture.max_positions is not None and last > architecture.max_positions:
        raise LatentMASError(
            f"the call goes up to {last} positions ({parts}), but {architecture.name} was made for "
            f"{architecture.max_positions} (max_position_embeddings); shorten the prompt, or ask for fewer "
            f"{what.removesuffix(' but the last')}"
        )
    return need if max_cache_len is None else max_cache_len


def _cache(architecture: Architecture, prompt: Prompt, past: LatentCache | None, capacity: int) -> LatentCache:
    return LatentCache.for_model(architecture, len(prompt.counts), capacity) if past is None else past.acquire(capacity)


def check_sampling(temperature: float, top_p: float) -> None:
    """Raise ValueError for a temperature (0 is greedy) or a top_p with which no token can be drawn."""
    if not 0 <= temperature < float("inf"):
        raise LatentMASError(f"temperature must be 0 (greedy) or more; got {temperature}")
    if not 0 < top_p <= 1:
        raise LatentMASError(f"top_p must be more than 0 and at most 1 (off); got {top_p}")


def end_tokens(model: Any, eos_token_id: int | Sequence[int] | None | str) -> list[int]:
    if eos_token_id == "auto":
        eos_token_id = model.generation_config.eos_token_id
    if eos_token_id is None:
        return []
    return [eos_token_id] if isinstance(eos_token_id, int) else [int(token) for token in eos_token_id]


def _processors(
    prompt: Prompt, sampling_params: SamplingParams, own: LogitsProcessorList | None
) -> LogitsProcessorList:
    """transformers' processors in transformers' order."""
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


def _padded(prompt: Prompt, pad_token_id: int) -> Tensor:
    assert prompt.input_ids is not None
    padding = torch.arange(prompt.columns)[None, :] < prompt.columns - prompt.counts[:, None]
    return prompt.input_ids.long().masked_fill(padding.to(prompt.input_ids.device), pad_token_id)
