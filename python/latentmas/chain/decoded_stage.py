"""A stage whose texts the chain's decoder writes."""

from collections.abc import Sequence

import torch

from latentmas.backends.base import Completion, GenerationRequest, TextBackend
from latentmas.chain.progress import Stopwatch
from latentmas.chain.stage_result import StageResult
from latentmas.chain.stage_run import StageRun, question_and_agent
from latentmas_kernels import LatentCache


class DecodedStage:
    """A run of one stage in which the decoder writes all texts at the same time, in three parts:

        begin()             the cache before the agents is made ready, by a `StageRun`
        requests()          go to the decoder, with that cache
        finish(completions) records the texts; where later stages go on from the cache, the `StageRun` runs the agents, and
                            reads the texts instead of writing them

    Attributes:
        stage: the `StageRun`, which has not begun.
        writers: indices of the agents that write.
    """

    def __init__(self, stage: StageRun, decoder: TextBackend) -> None:
        self.stage, self.decoder = stage, decoder
        self.writers = [number for number, agent in enumerate(stage.agents) if not agent.thinks]
        self._rows = [(q, number) for q in range(len(stage.prompts)) for number in self.writers]
        self._slot_inputs: list[list[int | torch.Tensor]] = []  # per question, read by the decoder in place of a cache
        self._completions: dict[tuple[int, int], Completion] = {}

    def run(self) -> StageResult:
        """Run the stage with texts of the decoder."""
        self.begin()
        report, stopwatch = self.stage.report_begin(self.writers), Stopwatch()
        completions = self.decoder.write(self.cache, self.requests(), report)
        self.stage.add_seconds(self.writers, decode=stopwatch.lap())
        return self.finish(completions)

    def begin(self) -> None:
        """Prepare the cache and the inputs that the decoder reads."""
        # The decoder reads all of a first stage itself; the cache is for later stages.
        self.stage.begin(needs_cache=self.stage.number > 0 or not self.stage.last)
        self._slot_inputs = [self._decoder_inputs(q) for q in range(len(self.stage.prompts))]

    @property
    def cache(self) -> LatentCache | None:
        """The cache that the agents go on from, a row for each question; None where there is nothing in it."""
        cache = self.stage.state.cache
        return cache if cache is not None and bool(cache.lengths.any()) else None

    def requests(self) -> list[GenerationRequest]:
        """Return a request for each question and writer, behind the cache as `begin` left it."""
        stage, has_cache, options = self.stage, self.cache is not None, self.stage.options
        return [
            GenerationRequest(
                stage.ids[q][number][stage.cached_len[q] :], stage.agents[number].max_new_tokens or 0, stage.end_ids,
                row=q if has_cache else None, slot_inputs=self._slot_inputs[q], temperature=options.temperature,
                top_p=options.top_p, seed=int(torch.randint(2**31, ())) if options.temperature else 0,
            )
            for q, number in self._rows
        ]  # fmt: skip

    def finish(self, completions: Sequence[Completion]) -> StageResult:
        """Record the texts, in the order of the requests, and end the stage."""
        self._completions = dict(zip(self._rows, completions, strict=True))
        if not self.stage.last:
            self.stage.execute(self._read_texts)
            return self.stage.result()
        for (q, number), completion in self._completions.items():
            metrics = self.stage.metrics[number]
            metrics.shared_tokens += len(self._slot_inputs[q]) - completion.computed_tokens
            metrics.prompt_tokens += completion.computed_tokens
            self.stage.record_text(q, number, completion)
        return self.stage.result()

    def _decoder_inputs(self, q: int) -> list[int | torch.Tensor]:
        """Return the inputs of a question's slots as the decoder takes them: latent steps as embeddings of its model."""
        if self.cache is None or self.decoder.kv_transfer != "embeds":
            return []
        return [slot if isinstance(slot, int) else slot[self.stage.context.name] for slot in self.stage.slot_inputs(q)]

    def _read_texts(self, cache: LatentCache, numbers: list[int], ids: list[list[int]]) -> None:
        """Read the agents' prompts and texts into the cache."""
        texts = []
        for r in range(len(ids)):
            q, number = question_and_agent(r, numbers)
            texts.append(self.stage.record_text(q, number, self._completions[q, number]))
        self.stage.extend(cache, ids, "prompt")
        if any(texts):
            self.stage.extend(cache, texts, "text")
