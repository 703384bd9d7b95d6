"""latent_decode: transformers' decoding loop for greedy search and sampling, on our engines, after latent steps if asked for.

transformers does what comes before: arguments, configuration, processors, criteria, the cache. What an engine cannot do goes
on to transformers' own loop with the same arguments, with one warning.
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
from latentmas_kernels.architecture import Architecture, UnsupportedModelError, check_finite_weights
from latentmas_kernels.cache import LatentCache, NoRoomError
from latentmas_kernels.cache_from_hf import append_columns
from latentmas_kernels.engines import EagerEngine, Engine, Speaker, Thinking, check_engine_options, fast_engine
from latentmas_kernels.engines.once import warn_once
from latentmas_kernels.engines.stepwise import Spoken, speak_stepwise
from latentmas_kernels.generation import check_finite_states
from latentmas_kernels.hf.coverage import (
    CACHE,
    known_columns,
    mask_of,
    most_new_tokens,
    own_loop,
    past_columns,
    why_not,
)
from latentmas_kernels.prompt import Prompt, read_prompt


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
    """For `model.generate(..., custom_generate=latent_decode, latent_steps=10)`: think, then decode, on a fast engine.

    transformers calls it with what it prepared, and hands a function neither the streamer (which has had the prompt) nor the
    tokenizer, which stop_strings need, nor an assistant model. Pass `functools.partial(latent_decode, streamer=streamer)`
    besides `streamer=streamer`, or use `accelerate(model)`, where all of them work or are refused.

    Args:
        latent_steps: latent steps between the prompt and the first new token (LatentMAS, arXiv 2511.20639, section 3); they
            take no place in the ids. None: as many as the generation_config says (`latent_steps`, an entry of your own), or 0.
        aligner, engine, weights: as in `latent_generate`. Without latent steps "auto" leaves a model that no fast engine
            covers to transformers' own loop.

    Returns:
        What transformers' loop returns: int64 [B, T + new], or with return_dict_in_generate a GenerateDecoderOnlyOutput.
        A transformers cache that was passed in is extended in place and returned, as there. A LatentCache is not changed:
        a longer one is returned, and so it is after latent steps without a cache.

    Raises:
        ValueError: where latent steps were asked for and cannot be taken, and for a beam search; and what `latent_generate`
            raises.
    """
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
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
    """`latent_decode`, given the loop of transformers (it gets the model_kwargs) that runs what no engine covers."""
    latent_steps = steps_of(latent_steps, generation_config)
    check_engine_options(engine, weights)
    inputs = {"input_ids": input_ids, **model_kwargs}
    # transformers' loop cannot do these.
    needed = latent_steps > 0 or isinstance(inputs.get(CACHE), LatentCache)
    try:
        reason = why_not(model, generation_config, synced_gpus, inputs)
        if reason is None:
            architecture = Architecture.of(model)
            runner = _engine(engine, model, architecture, weights, needed=needed)
            if not isinstance(runner, str):
                call = _Call(model, architecture, runner, inputs, generation_config, latent_steps, streamer)
                return call.run(logits_processor, stopping_criteria, aligner)
            reason = runner
    except (UnsupportedModelError, NoRoomError) as error:  # both come before any work
        reason = str(error)
    if latent_steps:
        raise ValueError(f"latent_steps={latent_steps} cannot be taken in this call, since {reason}")
    if needed:
        raise ValueError(
            f"a LatentCache cannot be gone on from in this call, since {reason}; give transformers its to_hf() with "
            "attention_mask() instead"
        )
    if engine not in ("auto", "eager"):
        raise ValueError(f"engine={engine!r} does not cover this call, since {reason}. Use engine='auto'")
    warn_once(f"{type(model).__name__}: generate() runs in transformers' own loop, since {reason}")
    return loop(**model_kwargs)


def steps_of(latent_steps: int | None, generation_config: GenerationConfig) -> int:
    """Latent steps that a call asks for, by argument or in its configuration."""
    asked = getattr(generation_config, "latent_steps", 0) if latent_steps is None else latent_steps
    if isinstance(asked, bool) or not hasattr(asked, "__index__") or operator.index(asked) < 0:
        raise ValueError(f"latent_steps must be an integer of 0 or more; got {asked!r}")
    return operator.index(asked)


def _engine(engine: str, model: Any, architecture: Architecture, weights: str, *, needed: bool) -> Engine | str:
    """The engine, or why transformers' own loop is as good: it is the eager engine's equal."""
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
class _Call:
    """One call of the loop, on an engine that covers it."""

    model: Any
    architecture: Architecture
    runner: Engine
    inputs: dict[str, Any]
    config: GenerationConfig
    latent_steps: int
    streamer: Any

    def run(
        self, processors: LogitsProcessorList, criteria: StoppingCriteriaList, aligner: str | Aligner
    ) -> GenerateDecoderOnlyOutput | Tensor:
        check_finite_weights(self.model)
        if self.latent_steps:
            if isinstance(aligner, str):
                aligner = build_aligner(self.model, aligner)
            aligner.check_fits(self.architecture)
        input_ids, target = self.inputs["input_ids"], self.inputs.get(CACHE)
        returned = bool(self.config.return_dict_in_generate)
        most = most_new_tokens(criteria, input_ids.shape[1])
        prompt, columns, past = self._read_prompt()
        held = torch.zeros_like(prompt.counts) if past is None else past.lengths
        capacity = int((held + prompt.counts).max()) + self.latent_steps + most - 1
        cache = LatentCache.for_model(self.architecture, len(held), capacity) if past is None else past.take(capacity)
        # The transformers cache that goes out: the caller's, or the one that transformers made for this call.
        outgoing: Cache | None = None
        if target is not None and not isinstance(target, LatentCache):
            is_callers = getattr(target, "_is_user_defined", False)
            outgoing = target if is_callers or (returned and not self.latent_steps) else None
        with cache.transaction():
            logits = self._read_and_think(cache, prompt, aligner)
            start = cache.lengths
            # Such a cache has padding behind ended rows, which transformers feeds: it is made the same.
            spoken = self._speak(cache, logits, processors, criteria, most, feed_ended=outgoing is not None)
            if bool((cache.lengths > start).any()):
                cache.add_segment("text", start)
        if self.streamer is not None:
            self.streamer.end()
        if outgoing is not None:
            append_columns(cache, outgoing, held, columns)
        if not returned:
            return spoken.sequences
        if outgoing is None and (self.latent_steps or isinstance(target, LatentCache)):
            outgoing = cache
        return GenerateDecoderOnlyOutput(
            sequences=spoken.sequences,  # type: ignore[arg-type]
            scores=spoken.scores,  # type: ignore[arg-type]
            logits=spoken.logits,  # type: ignore[arg-type]
            **{CACHE: outgoing},  # type: ignore[arg-type]
        )

    def _read_prompt(self) -> tuple[Prompt, Tensor, LatentCache | None]:
        """The new tokens; the mask [B, T] of their columns; and what they go on from."""
        known = known_columns(self.inputs)
        assert known is not None
        ids, embeds, mask = self.inputs["input_ids"], self.inputs.get("inputs_embeds"), mask_of(self.inputs)
        target = self.inputs.get(CACHE)
        past = target if isinstance(target, LatentCache) or past_columns(target) else None
        if embeds is None:
            ids = ids[:, known:].to(self.architecture.device)
        else:
            ids, embeds = None, embeds[:, known:].detach().to(self.architecture.device)
        prompt, own = read_prompt(self.architecture, ids, mask, embeds, past)
        given = ids if embeds is None else embeds
        return prompt, mask[:, -given.shape[1] :].cpu() != 0, own

    def _read_and_think(self, cache: LatentCache, prompt: Prompt, aligner: str | Aligner) -> Tensor:
        """Logits [B, V] behind the prompt and the latent steps."""
        runner, steps, start = self.runner, self.latent_steps, cache.lengths
        seed = runner.extend(cache, prompt, logits=not steps or aligner.needs_logits)  # type: ignore[union-attr]
        cache.add_segment("prompt", start)
        check_finite_states(seed, "prompt")
        if not steps:
            return seed
        start = cache.lengths
        thinking = Thinking(torch.full_like(start, steps))
        latents = runner.think(cache, seed, aligner, thinking, None).latents  # type: ignore[arg-type]
        # An engine's thinking ends with a hidden state. The last step once more, by the way that gives logits, as each model
        # makes them (some scale or cap them behind the lm_head).
        cache.crop(-1)
        last = Prompt(torch.ones_like(start), inputs_embeds=latents[:, -1:])
        logits = runner.extend(cache, last, logits=True)
        cache.add_segment("latent", start)
        check_finite_states(logits, "latent steps")
        return logits

    def _speak(
        self,
        cache: LatentCache,
        logits: Tensor,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        most: int,
        *,
        feed_ended: bool,
    ) -> Spoken:
        """Decode. With feed_ended the cache gets as many positions in each row, padding behind the end of a row."""
        input_ids, config, runner, streamer = self.inputs["input_ids"], self.config, self.runner, self.streamer
        record = bool(config.return_dict_in_generate)
        recorded = record and bool(config.output_scores or config.output_logits)
        own = None if recorded else own_loop(processors, criteria, config, input_ids, logits.shape[1])
        if (
            own is None
            or not isinstance(runner, Speaker)
            or not runner.can_speak(own, len(logits), streaming=streamer is not None)
        ):
            return speak_stepwise(
                runner, cache, input_ids, logits, processors,
                StoppingCriteriaList([c for c in criteria if type(c) is not MaxLengthCriteria]),
                max_new_tokens=most, do_sample=bool(config.do_sample),
                padding=None if config._pad_token_tensor is None else int(config._pad_token_tensor), streamer=streamer,
                record_scores=record and bool(config.output_scores), record_logits=record and bool(config.output_logits),
                feed_ended=feed_ended or recorded,
            )  # fmt: skip
        tokens = runner.speak(cache, logits, own, None if streamer is None else streamer.put)
        new, total = own.lengths(tokens), tokens.shape[1]
        sequences = torch.cat([input_ids, tokens.to(input_ids.device)], dim=1)
        for criterion in criteria:
            if isinstance(criterion, MaxLengthCriteria):  # says so where the text went beyond the model's positions
                criterion(sequences[:, :-1], None)
        missing = total - new
        if feed_ended and bool(missing.any()):  # an ended row's last token and the padding behind it, at its right end
            ended = tokens[:, -1 - int(missing.max()) : -1]
            runner.extend(cache, Prompt(missing, ended), logits=False)
        return Spoken(sequences, new, new < total, None, None)
