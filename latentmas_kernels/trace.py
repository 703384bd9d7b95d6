"""Trace of latent steps: the tokens that the lm_head reads from each state, and the token nearest to each embedding."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from latentmas_kernels.engines.base import cosine as cosine_of
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.models.architecture import Architecture, logits_of
from latentmas_kernels.outputs import LatentOutput

STEPS = 32  # steps whose logits are in memory at a time: 20 MB of float32 for 150k tokens
VOCABULARY_ROWS = 2048  # embeddings converted at a time: 32 MB of float32 at a width of 4096
TINY = 1e-12  # keeps the cosine to a row of zeros (a padding token) at 0


@dataclass(frozen=True, eq=False)
class LatentTrace:
    """Latent steps, one by one. All tensors are on the CPU; n is the longest row's number of steps.

    Behind a row's end tokens and nearest are -1, numbers NaN, and finite is True.

    Attributes:
        steps: per row, how many steps it took.
        tokens: int64 [B, n, k], the most likely tokens of the step's state by the lm_head, the first one first; -1 where the
            state or its logits hold NaN or Inf.
        probabilities: float32 [B, n, k], of these tokens among the whole vocabulary; NaN where there are no tokens.
        norms: float32 [B, n], of the state behind the step; NaN where it holds NaN or Inf.
        nearest: int64 [B, n], the token whose input embedding has the largest cosine to the embedding that the step was fed;
            -1 where that holds NaN or Inf.
        distances: float32 [B, n], 1 - that cosine.
        cosines: float32 [B, n], of the embedding fed to that of the step before, as `settle` sees it; NaN for the first step.
        finite: bool [B, n], whether the state and the embedding are free of NaN and Inf.
    """

    steps: list[int]
    tokens: Tensor
    probabilities: Tensor
    norms: Tensor
    nearest: Tensor
    distances: Tensor
    cosines: Tensor
    finite: Tensor


@torch.no_grad()
def trace_of(model: Any, output: LatentOutput, *, top_k: int = 5) -> LatentTrace:
    """Return the trace of latent steps. Nothing runs but the lm_head and the input embedding.

    Works on the model's device in pieces, so that neither the logits of all steps nor a float32 copy of the whole embedding
    are in memory at once, and reads back once.

    Args:
        model: the model that ran the steps.
        output: of `latent_generate(..., output_states=True)`.
        top_k: tokens to keep per step, from 1 to the size of the vocabulary.

    Returns:
        LatentTrace.

    Raises:
        LatentMASError: where the states were not kept, are another model's, or top_k is out of range.
    """
    architecture = Architecture.of(model)
    vocabulary = min(architecture.vocab_size, model.get_output_embeddings().weight.shape[0])
    if output.states is None:
        raise LatentMASError("the states behind the steps were not kept; pass output_states=True to latent_generate()")
    if output.states.shape[-1] != architecture.hidden_size:
        raise LatentMASError(
            f"the states have a width of {output.states.shape[-1]}, but {architecture.name} has {architecture.hidden_size}: "
            "pass the model that ran the steps"
        )
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= vocabulary:
        raise LatentMASError(
            f"top_k must be an integer from 1 to {vocabulary}, the size of the vocabulary; got {top_k!r}"
        )

    batch, longest = output.states.shape[:2]
    number = torch.arange(longest).repeat(batch)
    own = number < torch.tensor(output.latent_steps).repeat_interleave(longest)  # steps that rows took, row by row
    where = own.nonzero().flatten().to(output.states.device)
    states, fed = output.states.flatten(0, 1)[where], output.latents.flatten(0, 1)[where]
    finite_state, finite_fed = states.isfinite().all(-1), fed.isfinite().all(-1)

    tokens, probabilities = _top_tokens(model, states, top_k)
    tokens = tokens.masked_fill(~probabilities.isfinite().all(-1, keepdim=True), -1)
    norms = torch.linalg.vector_norm(states, dim=-1, dtype=torch.float32).masked_fill(~finite_state, torch.nan)
    nearest, cosine = _nearest(model.get_input_embeddings(), fed)
    # Rounding takes cosines to 1.0000001.
    distances = (1 - cosine).clamp_min(0).masked_fill(~finite_fed, torch.nan)
    cosines = norms.new_full(norms.shape, torch.nan)
    for part in _parts(len(fed) - 1):  # a row's steps lie side by side; those before a first step are taken out below
        cosines[1:][part] = cosine_of(fed[1:][part], fed[:-1][part])
    cosines.masked_fill_((number[own] == 0).to(cosines.device), torch.nan)

    # One read back: the bits of all results, as int32.
    whole = [tokens, nearest[:, None], (finite_state & finite_fed)[:, None]]
    real = [probabilities, norms[:, None], distances[:, None], cosines[:, None]]
    bits = torch.cat([part.int() for part in whole] + [part.view(torch.int32) for part in real], dim=-1).cpu()
    tokens, nearest, finite, *numbers = bits.split([part.shape[-1] for part in whole + real], dim=-1)
    probabilities, norms, distances, cosines = (part.contiguous().view(torch.float32) for part in numbers)

    def padded(values: Tensor, behind: float) -> Tensor:
        """Return the steps' values as [B, n, ...]."""
        rows = values.new_full((batch * longest, values.shape[-1]), behind)
        rows[own] = values
        return rows.unflatten(0, (batch, longest))

    return LatentTrace(
        list(output.latent_steps),
        padded(tokens.long(), -1),
        padded(probabilities, torch.nan),
        padded(norms, torch.nan)[..., 0],
        padded(nearest.long(), -1)[..., 0],
        padded(distances, torch.nan)[..., 0],
        padded(cosines, torch.nan)[..., 0],
        padded(finite.bool(), True)[..., 0],
    )


def _parts(steps: int) -> Iterator[slice]:
    return (slice(start, min(start + STEPS, steps)) for start in range(0, steps, STEPS))


def _top_tokens(model: Any, states: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the most likely tokens of states [N, D] and their probabilities, int64 and float32 [N, k]."""
    tokens = torch.empty(len(states), top_k, dtype=torch.int64, device=states.device)
    probabilities = torch.empty(len(states), top_k, dtype=torch.float32, device=states.device)
    for part in _parts(len(states)):
        top = torch.softmax(logits_of(model, states[part]), -1, dtype=torch.float32).topk(top_k, dim=-1)
        tokens[part], probabilities[part] = top.indices, top.values
    return tokens, probabilities


def _nearest(embedding: nn.Embedding, fed: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens whose input embeddings are nearest to those fed [N, D], int64 [N], and the cosines, float32 [N].

    A cosine of NaN is not larger than any: an embedding that holds NaN or Inf is nearest to nothing, -1.
    """
    best = torch.full((len(fed),), -torch.inf, device=fed.device)
    nearest = torch.full((len(fed),), -1, device=fed.device)
    vocabulary = embedding.weight.shape[0] if len(fed) else 0
    for start in range(0, vocabulary, VOCABULARY_ROWS):
        ids = torch.arange(start, min(start + VOCABULARY_ROWS, vocabulary), device=embedding.weight.device)
        rows = embedding(ids).float()
        norms = rows.norm(dim=-1, keepdim=True).clamp_min(TINY)
        for part in _parts(len(fed)):
            units = nn.functional.normalize(fed[part].float(), dim=-1, eps=TINY)
            cosine, index = (rows @ units.T / norms).max(dim=0)
            closer = cosine > best[part]
            best[part] = torch.where(closer, cosine, best[part])
            nearest[part] = torch.where(closer, index + start, nearest[part])
    return nearest, best
