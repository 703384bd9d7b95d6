"""Latent steps and decoding by one `Engine.extend` per step, where an engine has no loop of its own for what is asked."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList, StoppingCriteriaList

from latentmas_kernels.alignment import Aligner
from latentmas_kernels.cache.latent_cache import LatentCache
from latentmas_kernels.engines.base import Engine, LatentParams, LatentResult, OnStep, SupportsExtendBoth, converged
from latentmas_kernels.engines.torch_threads import one_torch_thread
from latentmas_kernels.inputs import Prompt


def latent_stepwise(
    engine: SupportsExtendBoth,
    cache: LatentCache,
    seed: Tensor,
    aligner: Aligner,
    latent_params: LatentParams,
    on_step: OnStep | None,
) -> LatentResult:
    """Run latent steps by `engine.extend`, or `engine.extend_both` where a step's logits and states are both needed."""
    batch, longest = len(seed), latent_params.longest
    dtype, device, width = engine.architecture.dtype, seed.device, engine.architecture.hidden_size
    latents = torch.zeros(batch, longest, width, dtype=dtype, device=device)
    states = torch.zeros_like(latents) if latent_params.record else None
    last_hidden = torch.zeros(batch, width, dtype=dtype, device=device)
    active, taken = torch.ones(batch, dtype=torch.bool), torch.zeros(batch, dtype=torch.int64)
    for step in range(longest):
        if on_step is not None:
            on_step(step)
        latents[:, step] = aligner(seed).masked_fill(~active.to(device)[:, None], 0)
        going = active & (latent_params.steps > step + 1) & ~converged(latents, step, latent_params.stop_cosine)
        prompt = Prompt(active.long(), inputs_embeds=latents[:, step : step + 1])
        if not aligner.needs_logits or not bool(going.any()):
            seed = hidden = engine.extend(cache, prompt, logits=False)
        elif states is not None or not torch.equal(going, active):
            hidden, seed = engine.extend_both(cache, prompt)
        else:
            hidden, seed = last_hidden, engine.extend(cache, prompt, logits=True)
        if states is not None:
            states[:, step] = hidden.masked_fill(~active.to(device)[:, None], 0)
        last_hidden = torch.where((active & ~going).to(device)[:, None], hidden, last_hidden)
        taken += active
        active = going
        if not bool(active.any()):
            break
    steps = int(taken.max())
    return LatentResult(latents[:, :steps], last_hidden, taken, None if states is None else states[:, :steps])


@dataclass(frozen=True)
class DecodeResult:
    """The decoded tokens of a batch.

    Attributes:
        sequences: int64 [B, T + n], the given sequences and the new tokens; behind a row's end the padding token.
        new_tokens: int64 [B] on the CPU, how many are a row's own.
        stopped: bool [B] on the CPU, whether a criterion ended the row.
        scores, logits: float32 [B, V] per new token, with and without the processors; None where not recorded.
    """

    sequences: Tensor
    new_tokens: Tensor
    stopped: Tensor
    scores: tuple[Tensor, ...] | None
    logits: tuple[Tensor, ...] | None


def decode_stepwise(
    engine: Engine,
    cache: LatentCache,
    sequences: Tensor,
    logits: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    *,
    max_new_tokens: int,
    do_sample: bool,
    pad_token_id: int | None,
    streamer: Any = None,
    record_scores: bool = False,
    record_logits: bool = False,
    feed_ended: bool = False,
) -> DecodeResult:
    """Decode text in the order of transformers' own loop, so that its processors and criteria mean the same here.

    Args:
        sequences: int64 [B, T], what processors and criteria see before the first new token.
        logits: [B, V], of each row's last position.
        pad_token_id: behind a row's end. Needed where a criterion has an `eos_token_id`; as in transformers, rows that other
            criteria stopped go on with the batch.
        streamer: gets `put(tokens [B])` for each step.
        feed_ended: feed the padding of ended rows as well, as transformers does: what is recorded and cached for them is
            then the same.
    """
    batch, device = len(sequences), sequences.device
    running = active = torch.ones(batch, dtype=torch.bool, device=device)
    counts = torch.zeros(batch, dtype=torch.int64, device=device)
    ends_rows = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
    scores: tuple[Tensor, ...] | None = () if record_scores else None
    raw: tuple[Tensor, ...] | None = () if record_logits else None
    # A processor that runs a model of its own (guidance) is better off with torch's threads.
    attributes = [value for processor in processors for value in getattr(processor, "__dict__", {}).values()]
    runs_model = any(isinstance(value, nn.Module) for value in attributes)
    with one_torch_thread() if engine.uses_thread_pool and not runs_model else nullcontext():
        for step in range(max_new_tokens):
            logits = logits.float()
            processed = processors(sequences, logits)  # type: ignore[arg-type]
            scores = None if scores is None else (*scores, processed)
            raw = None if raw is None else (*raw, logits)
            tokens = torch.multinomial(processed.softmax(-1), 1)[:, 0] if do_sample else processed.argmax(-1)
            if ends_rows:
                assert pad_token_id is not None
                tokens = torch.where(active, tokens, pad_token_id)
            counts += active
            sequences = torch.cat([sequences, tokens[:, None]], dim=1)
            if criteria:
                running = running & ~criteria(sequences, scores)
            if streamer is not None:
                streamer.put(tokens.cpu())
            if step + 1 == max_new_tokens or not running.any():
                break
            if ends_rows:
                active = running
            fed = torch.ones_like(active) if feed_ended else active
            logits = engine.extend(cache, Prompt(fed.long().cpu(), tokens[:, None]), logits=True)
    return DecodeResult(sequences, counts.cpu(), ~running.cpu(), scores, raw)
