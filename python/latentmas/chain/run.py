"""One run of a chain: a batch of questions goes from stage to stage."""

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from latentmas.chain.decoded_stage import DecodedStage
from latentmas.chain.progress import Laps, Progress
from latentmas.chain.question_state import Row
from latentmas.chain.results import AgentMetrics, AgentTrace, ChainResult
from latentmas.chain.stage_run import StageRun
from latentmas.chain.stages import Context
from latentmas_kernels import LatentCache

if TYPE_CHECKING:
    from latentmas.chain.chain import Chain


class Run:
    """The state of a run.

    Attributes:
        rows: the questions.
        memory: of the stretch at work, a row for each question; None where none has begun.
        metrics: of each agent that is done.
        traces: of each agent that has thought, where they were asked for.
        warnings: for the caller of the chain.
    """

    def __init__(
        self,
        chain: "Chain",
        questions: list[str],
        *,
        temperature: float,
        top_p: float,
        on_progress: Callable[[Progress], None] | None,
        trace: int | None,
    ) -> None:
        self.chain, self.on_progress, self.trace = chain, on_progress, trace
        self.temperature, self.top_p = temperature, top_p
        self.rows = [Row(question) for question in questions]
        self.memory: LatentCache | None = None
        self.metrics: list[AgentMetrics] = []
        self.traces: list[AgentTrace] = []
        self.warnings: list[str] = []
        self._began, self._laps = time.perf_counter(), Laps()

    def to_last(self) -> StageRun:
        """Run all stages but the last one."""
        for stretch in self.chain.contexts:
            for stage in self._stages_of(stretch):
                if stage.is_final:
                    return stage
                stage.run()
                self.take_down(stage)
        raise AssertionError("a chain has a last stage")

    def result(self) -> ChainResult:
        """Once the last stage has been taken down."""
        return ChainResult(
            [row.answer() for row in self.rows],
            self.metrics,
            time.perf_counter() - self._began,
            self.chain.aligner,
            self.memory,
            self.traces,
        )

    def take_down(self, stage: StageRun) -> None:
        """Add up what the agents of a stage took, once it has ended. What is no agent's own, they share evenly."""
        self.memory = stage.memory
        self.traces += stage.traces
        seconds, count = self._laps(), len(stage.agents)
        kv_bytes = sum(cache.kv_bytes for cache in stage.caches)
        other = (seconds - sum(sum(tally.seconds) for tally in stage.tallies) - stage.prefill_seconds) / count
        for agent, tally in zip(stage.agents, stage.tallies, strict=True):
            prefill, latent, decode = tally.seconds
            self.metrics.append(
                AgentMetrics(
                    agent.name,
                    prompt_tokens=tally.computed,
                    shared_tokens=tally.read - tally.computed,
                    latent_steps=tally.latent_steps,
                    new_tokens=tally.new_tokens,
                    steps=tally.steps,
                    prefill_seconds=prefill + stage.prefill_seconds / count,
                    latent_seconds=latent,
                    decode_seconds=decode,
                    other_seconds=other,
                    kv_bytes=kv_bytes,
                )
            )

    def _stages_of(self, stages: Context) -> Iterator[StageRun]:
        """Stages that share a memory; each begins when the one before it has been taken down."""
        self.memory = None  # what the stretch before left is free before there is more
        for row in self.rows:
            row.pending, row.fed = [], []
        prompts = []
        for row in self.rows:
            notes, said = self.chain.readable(stages[0], row.notes)
            self.warnings += [f"{text} (question: {row.question[:60]!r})" for text in said]
            prompts.append(self.chain.prompts(stages, row.question, notes))
        plan = self.chain.lay_out(stages, prompts)
        self.chain.check_free_memory(plan)
        for number in range(len(stages)):
            mine = [row[number] for row in prompts]
            decoder = self.chain.decoder_of(stages[number])
            if decoder is None:
                yield StageRun(self, plan, number, mine)
            else:
                yield DecodedStage(self, plan, number, mine, decoder)
