"""A run of a chain: a batch of questions goes from stage to stage."""

import time
from collections.abc import Sequence

from latentmas.backends.base import Completion, GenerationRequest
from latentmas.chain.decoded_stage import DecodedStage
from latentmas.chain.plan import Plan
from latentmas.chain.planner import check_plan_memory, make_plan
from latentmas.chain.progress import Stopwatch
from latentmas.chain.question_state import QuestionState
from latentmas.chain.results import AgentMetrics, AgentTrace, ChainResult
from latentmas.chain.setup import ChainSetup, Prompts, RunOptions
from latentmas.chain.stage_result import ContextState, StageResult
from latentmas.chain.stage_run import StageRun
from latentmas.chain.stages import Context
from latentmas_kernels import LatentCache


class Run:
    """The state of a run.

    Attributes:
        questions: with what the agents did for each of them.
        state: cache of the current context.
        metrics: of each agent that is done.
        traces: of each agent that took latent steps, where the run was asked for them.
        warnings: for the caller of the chain.
    """

    def __init__(self, setup: ChainSetup, questions: Sequence[str], options: RunOptions) -> None:
        self.setup, self.options = setup, options
        self.questions = [QuestionState(question) for question in questions]
        self.state = ContextState.empty(len(questions))
        self.metrics: list[AgentMetrics] = []
        self.traces: list[AgentTrace] = []
        self.warnings: list[str] = []
        self._began, self._stopwatch = time.perf_counter(), Stopwatch()

    def run_until_last(self) -> StageRun | DecodedStage:
        """Run all stages but the last; return that one, which has not begun."""
        for context in self.setup.contexts:
            self.state = ContextState.empty(len(self.questions))  # frees the cache before this context
            plan, prompts = self._plan(context)
            for number, stage in enumerate(context):
                if stage is self.setup.stages[-1]:
                    return self._stage_run(plan, number, prompts)
                self.record(self._stage_run(plan, number, prompts).run())
        raise AssertionError("a chain has a last stage")

    def record(self, result: StageResult) -> None:
        """Record a stage that has just ended. Seconds that are no agent's own are shared evenly by its agents."""
        self.state = result.state
        for question, outputs in zip(self.questions, result.outputs, strict=True):
            question.turns += [output.turn for output in outputs]
            question.notes += [output.note for output in outputs if output.note is not None]
        other = self._stopwatch.lap() - sum(metrics.seconds for metrics in result.metrics)
        for metrics in result.metrics:
            metrics.other_seconds = other / len(result.metrics)
        self.metrics += result.metrics
        self.traces += result.traces

    def result(self) -> ChainResult:
        """Return the result, once the last stage is recorded."""
        answers = [question.answer() for question in self.questions]
        seconds, aligner = time.perf_counter() - self._began, self.setup.model_contexts[None].aligner
        return ChainResult(answers, self.metrics, seconds, aligner, self.state.cache, self.traces)

    def _plan(self, context: Context) -> tuple[Plan, list[Prompts]]:
        """Return the plan of a context and its prompts, per question.

        Raises:
            LatentMASError: where the context does not fit.
        """
        prompts = []
        for q, state in enumerate(self.questions):
            notes, warned = self.setup.visible_notes(context[0], state.notes)
            for text in warned:
                self._warn(q, text)
            prompts.append(self.setup.prompts(context, state.question, notes))
        plan = make_plan(self.setup, context, prompts)
        check_plan_memory(self.setup, plan)
        return plan, prompts

    def _stage_run(self, plan: Plan, number: int, prompts: list[Prompts]) -> StageRun | DecodedStage:
        of_stage = [of[number] for of in prompts]
        stage = StageRun(self.setup, self.options, plan, number, of_stage, self.state, self._warn)
        decoder = self.setup.decoder_of(stage.stage)
        return stage if decoder is None else DecodedStage(stage, decoder)

    def _warn(self, q: int, text: str) -> None:
        self.warnings.append(f"{text} (question: {self.questions[q].question[:60]!r})")


class PendingAnswer:
    """A run whose last text is still to be written.

    Attributes:
        memory: cache that the text is written behind, a row for each question; None where there is nothing in it.
        requests: of each question.
    """

    def __init__(self, run: Run, last: DecodedStage) -> None:
        self._run, self._last = run, last
        self.memory: LatentCache | None = last.cache
        self.requests: list[GenerationRequest] = last.requests()

    def forget(self) -> None:
        """Free the cache, once the decoder has a copy."""
        self.memory = self._run.state.cache = None

    def finish(self, written: Sequence[Completion]) -> ChainResult:
        """Return the result of the run, given the completion of each request."""
        self._run.record(self._last.finish(written))
        return self._run.result()
