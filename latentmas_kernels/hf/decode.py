"""latent_decode: transformers' decoding loop for greedy search and sampling, on our engines, after latent steps if asked for.

transformers prepares the call: arguments, configuration, processors, criteria, the cache. What an engine cannot do runs in
transformers' own loop with the same arguments, with one warning.
"""

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode, MaxLengthCriteria

from latentmas_kernels.alignment import Aligner, build_aligner
from latentmas_kernels.cache.free_memory import InsufficientMemoryError
from latentmas_kernels.cache.from_hf import append_columns
from latentmas_kernels.cache.latent_cache import LatentCache
from latentmas_kernels.engines import EagerEngine, Engine, LatentParams, check_engine_options, fast_engine
from latentmas_kernels.engines.stepwise import DecodeResult, decode_stepwise
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.generation import decode_by_engine, prefill
from latentmas_kernels.hf.coverage import (
    CACHE,
    cached_columns,
    mask_of,
    max_new_tokens_of,
    past_columns,
    to_sampling_params,
    unsupported_reason,
    what_its_cache_drops,
)
from latentmas_kernels.inputs import Prompt, read_prompt
from latentmas_kernels.models.architecture import Architecture, UnsupportedModelError, in_short
from latentmas_kernels.models.finite import check_finite_states, check_finite_weights
from latentmas_kernels.warn_once import warn_once


@torch.no_grad()
def latent_decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: Any = None,
    *,
    latent_steps: int | None = None,
    aligner: str | Aligner = "auto",
    engine: str = "auto",
    weights: str = "model",
    **model_kwargs: Any,
) -> GenerateDecoderOnlyOutput | Tensor:
    """Run latent steps, then decode: `model.generate(..., custom_generate=latent_decode, latent_steps=10)`.

    transformers calls it with what it prepared, and gives a function neither the streamer (which has had the prompt) nor the
    tokenizer, which stop_strings need, nor an assistant model. Pass `functools.partial(latent_decode, streamer=streamer)`
    besides `streamer=streamer`, or use `accelerate(model)`, where all of them work or are refused.

    Args:
        latent_steps: latent steps between the prompt and the first new token (LatentMAS, arXiv 2511.20639, section 3); they
            take no place in the ids. None: as many as the generation_config has (`latent_steps`, an entry of your own), or 0.
        aligner, engine, weights: as in `latent_generate`. Without latent steps "auto" leaves a model that no fast engine
            covers to transformers' own loop.

    Returns:
        As transformers' loop: int64 [B, T + new], or with return_dict_in_generate a GenerateDecoderOnlyOutput.
        A transformers cache that was passed in is extended in place and returned, as there. A LatentCache is not changed:
        a longer one is returned, and so it is after latent steps without a cache.

    Raises:
        LatentMASError: where latent steps were asked for and cannot be taken, and for a beam search; and what `latent_generate`
            raises.
    """
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise LatentMASError(
            f"got options of {mode.value.replace('_', ' ')}; latent_decode is greedy or samples: leave those options out, or "
            "custom_generate and latent_steps"
        )
    loop = functools.partial(
        type(model)._sample,
        model,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus,
        streamer,
    )
    return decode(
        model, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, model_kwargs,
        loop=loop, latent_steps=latent_steps, aligner=aligner, engine=engine, weights=weights,
    )  # fmt: skip


def decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool,
    streamer: Any,
    model_kwargs: dict[str, Any],
    *,
    loop: Callable[..., Any],
    latent_steps: int | None,
    aligner: str | Aligner,
    engine: str,
    weights: str,
) -> GenerateDecoderOnlyOutput | Tensor:
    """Run `latent_decode`, or `loop` of transformers, called with the model_kwargs, for what no engine covers."""
    latent_steps = steps_of(latent_steps, generation_config)
    check_engine_options(engine, weights)
    inputs = {"input_ids": input_ids, **model_kwargs}
    # transformers' loop cannot do these.
    needed = latent_steps > 0 or isinstance(inputs.get(CACHE), LatentCache)
    chosen = _unsupported_reason(model, generation_config, synced_gpus, inputs) or _engine(
        engine, model, weights, needed=needed
    )
    if isinstance(chosen, str):
        reason = chosen
    else:
        call = _Call(model, chosen, inputs, generation_config, latent_steps, streamer)
        ready = call.prepare(stopping_criteria, aligner)
        if isinstance(ready, _Ready):
            return call.run(ready, logits_processor, stopping_criteria)
        reason = ready
    if latent_steps:
        raise LatentMASError(f"latent_steps={latent_steps} cannot be taken in this call, since {reason}")
    if needed:
        raise LatentMASError(
            f"a LatentCache cannot be gone on from in this call, since {reason}; give transformers its to_hf() with "
            "attention_mask() instead"
        )
    if engine not in ("auto", "eager"):
        raise LatentMASError(f"engine={engine!r} does not cover this call, since {reason}. Use engine='auto'")
    warn_once(f"{type(model).__name__}: generate() runs in transformers' own loop, since {reason}")
    return loop(**model_kwargs)


def steps_of(latent_steps: int | None, generation_config: GenerationConfig) -> int:
    """Return the latent steps that a call asks for, by argument or in its configuration."""
    asked = getattr(generation_config, "latent_steps", 0) if latent_steps is None else latent_steps
    if isinstance(asked, bool) or not hasattr(asked, "__index__") or operator.index(asked) < 0:
        raise LatentMASError(f"latent_steps must be an integer of 0 or more; got {asked!r}")
    return operator.index(asked)


def _unsupported_reason(model: Any, config: GenerationConfig, synced_gpus: bool, inputs: dict[str, Any]) -> str | None:
    """Return `unsupported_reason`; an error on the way is a reason too."""
    try:
        return unsupported_reason(model, config, synced_gpus, inputs)
    except Exception as error:
        return f"looking at its inputs ended in {in_short(error)}"


def _engine(engine: str, model: Any, weights: str, *, needed: bool) -> Engine | str:
    """Return the engine, or why transformers' own loop runs instead: it is as fast as the eager engine."""
    try:
        architecture = Architecture.of(model)
        # Positions that its cache drops change the answer of transformers' own loop; latent steps have no such loop.
        dropped = None if needed else what_its_cache_drops(model, architecture)
    except UnsupportedModelError as error:
        return str(error)
    if dropped is not None:
        return dropped
    fast = "engine='eager' was asked for"
    if engine != "eager":
        chosen = fast_engine(engine, model, architecture, weights=weights)
        if not isinstance(chosen, str):
            return chosen
        fast = chosen
    if engine == "eager" or (needed and engine == "auto" and weights == "model"):
        if engine == "auto":
            warn_once(f"{architecture.name} runs on the eager engine, since {fast}")
        return EagerEngine(model, architecture)
    return fast


@dataclass
class _Ready:
    """The prepared inputs of a call.

    Attributes:
        prompt, columns: the new tokens; the mask [B, T] of their columns.
        cache, held: the cache that they are appended to, and its slots [B] in use before.
        max_new_tokens: limit per row.
        outgoing: the transformers cache to return: the caller's, or the one that transformers made for this call.
        aligner: of the latent steps, None without them.
    """

    prompt: Prompt
    columns: Tensor
    cache: LatentCache
    held: Tensor
    max_new_tokens: int
    outgoing: Cache | None
    aligner: Aligner | None


@dataclass
class _Call:
    """One call of the loop, on an engine that covers it."""

    model: Any
    runner: Engine
    inputs: dict[str, Any]
    config: GenerationConfig
    latent_steps: int
    streamer: Any

    def prepare(self, criteria: StoppingCriteriaList, aligner: str | Aligner) -> _Ready | str:
        """Check the inputs and allocate the cache; or return, as a clause, why transformers has to run the call.

        Raises:
            LatentMASError: for inputs of the caller (ids, masks, an aligner), and for weights of NaN or Inf.
        """
        try:
            return self._prepare(criteria, aligner)
        except (UnsupportedModelError, InsufficientMemoryError) as error:
            return str(error)
        except ValueError:
            raise
        except Exception as error:
            return f"setting up the call ended in {in_short(error)}"

    def _prepare(self, criteria: StoppingCriteriaList, aligner: str | Aligner) -> _Ready:
        check_finite_weights(self.model)
        architecture, latent_aligner = self.runner.architecture, None
        if self.latent_steps:
            latent_aligner = build_aligner(self.model, aligner) if isinstance(aligner, str) else aligner
            latent_aligner.check_fits(architecture)
        input_ids, target = self.inputs["input_ids"], self.inputs.get(CACHE)
        max_new_tokens = max_new_tokens_of(criteria, input_ids.shape[1])
        prompt, columns, past = self._read_prompt()
        held = torch.zeros_like(prompt.counts) if past is None else past.lengths
        capacity = int((held + prompt.counts).max()) + self.latent_steps + max_new_tokens - 1
        outgoing: Cache | None = None
        if target is not None and not isinstance(target, LatentCache):
            is_callers = getattr(target, "_is_user_defined", False)
            outgoing = target if is_callers or (self.config.return_dict_in_generate and not self.latent_steps) else None
        cache = LatentCache.for_model(architecture, len(held), capacity) if past is None else past.acquire(capacity)
        return _Ready(prompt, columns, cache, held, max_new_tokens, outgoing, latent_aligner)

    def run(
        self, ready: _Ready, processors: LogitsProcessorList, criteria: StoppingCriteriaList
    ) -> GenerateDecoderOnlyOutput | Tensor:
        prompt, cache, held, outgoing = ready.prompt, ready.cache, ready.held, ready.outgoing
        with cache.transaction():
            logits = self._prefill_and_run_latent(cache, prompt, ready.aligner)
            start = cache.lengths
            # transformers feeds the padding behind ended rows, and its cache holds it.
            result = self._decode(
                cache, logits, processors, criteria, ready.max_new_tokens, feed_ended=outgoing is not None
            )
            if bool((cache.lengths > start).any()):
                cache.add_segment("text", start)
        if self.streamer is not None:
            self.streamer.end()
        if outgoing is not None:
            append_columns(cache, outgoing, held, ready.columns)
        if not self.config.return_dict_in_generate:
            return result.sequences
        if outgoing is None and (self.latent_steps or isinstance(self.inputs.get(CACHE), LatentCache)):
            outgoing = cache
        return GenerateDecoderOnlyOutput(
            sequences=result.sequences,  # type: ignore[arg-type]
            scores=result.scores,  # type: ignore[arg-type]
            logits=result.logits,  # type: ignore[arg-type]
            **{CACHE: outgoing},  # type: ignore[arg-type]
        )

    def _read_prompt(self) -> tuple[Prompt, Tensor, LatentCache | None]:
        """Return the new tokens, the mask [B, T] of their columns, and the past."""
        known = cached_columns(self.inputs)
        assert known is not None
        ids, embeds, mask = self.inputs["input_ids"], self.inputs.get("inputs_embeds"), mask_of(self.inputs)
        target = self.inputs.get(CACHE)
        past = target if isinstance(target, LatentCache) or past_columns(target) else None
        device = self.runner.architecture.device
        if embeds is None:
            ids = ids[:, known:].to(device)
        else:
            ids, embeds = None, embeds[:, known:].detach().to(device)
        prompt, past = read_prompt(self.runner.architecture, ids, mask, embeds, past)
        given = ids if embeds is None else embeds
        return prompt, mask[:, -given.shape[1] :].cpu() != 0, past

    def _prefill_and_run_latent(self, cache: LatentCache, prompt: Prompt, aligner: Aligner | None) -> Tensor:
        """Append the prompt and the latent steps; return the logits [B, V] of each row's last position."""
        runner = self.runner
        seed = prefill(runner, cache, prompt, logits=aligner is None or aligner.needs_logits)
        if aligner is None:
            return seed
        start = cache.lengths
        latent_params = LatentParams(torch.full_like(start, self.latent_steps))
        latents = runner.run_latent(cache, seed, aligner, latent_params, None).latents
        # An engine's latent steps end with a hidden state. The last step runs once more, by `extend`, for logits as each model
        # makes them (some scale or cap them behind the lm_head).
        cache.crop(-1)
        last = Prompt(torch.ones_like(start), inputs_embeds=latents[:, -1:])
        logits = runner.extend(cache, last, logits=True)
        cache.add_segment("latent", start)
        check_finite_states(logits, "latent steps")
        return logits

    def _decode(
        self,
        cache: LatentCache,
        logits: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        max_new_tokens: int,
        *,
        feed_ended: bool,
    ) -> DecodeResult:
        """Decode text behind the cache. With feed_ended all rows get as many positions, padding behind the end of a row."""
        input_ids, config, runner, streamer = self.inputs["input_ids"], self.config, self.runner, self.streamer
        record = bool(config.return_dict_in_generate)
        recorded = record and bool(config.output_scores or config.output_logits)
        sampling_params, result = None, None
        if not recorded:
            sampling_params = to_sampling_params(processors, criteria, config, input_ids, logits.shape[1])
        if sampling_params is not None:
            result = decode_by_engine(runner, cache, input_ids, logits, sampling_params, streamer)
        if result is None:
            return decode_stepwise(
                runner, cache, input_ids, logits, processors,
                StoppingCriteriaList([c for c in criteria if type(c) is not MaxLengthCriteria]),
                max_new_tokens=max_new_tokens, do_sample=bool(config.do_sample),
                pad_token_id=None if config._pad_token_tensor is None else int(config._pad_token_tensor), streamer=streamer,
                record_scores=record and bool(config.output_scores), record_logits=record and bool(config.output_logits),
                feed_ended=feed_ended or recorded,
            )  # fmt: skip
        for criterion in criteria:
            if isinstance(criterion, MaxLengthCriteria):  # warns where the text went beyond the model's positions
                criterion(result.sequences[:, :-1], None)
        tokens = result.sequences[:, input_ids.shape[1] :]
        missing = tokens.shape[1] - result.new_tokens
        if feed_ended and bool(missing.any()):  # an ended row's last token and the padding behind it, at its right end
            ended = tokens[:, -1 - int(missing.max()) : -1].to(logits.device)
            runner.extend(cache, Prompt(missing, ended), logits=False)
        return result
