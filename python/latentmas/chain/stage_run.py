"""One stage of a run: its agents extend the cache, one by itself or several in parallel."""

from collections.abc import Callable
from dataclasses import replace

import torch

from latentmas.backends.base import Completion
from latentmas.chain.model_context import SlotInput, recompute_cache
from latentmas.chain.plan import SINK_SLOTS, Plan, group_calls
from latentmas.chain.progress import Progress, ProgressReporter
from latentmas.chain.prompts import padded
from latentmas.chain.question_state import Note, truncate_note
from latentmas.chain.results import AgentMetrics, AgentTrace, AgentTurn
from latentmas.chain.setup import ChainSetup, RunOptions, StagePrompts
from latentmas.chain.stage_result import AgentOutput, ContextState, StageResult
from latentmas_kernels import LatentCache, generate, latent_generate
from latentmas_kernels.cache.segments import Kind, mask_of
from latentmas_kernels.hf.chat import without_end
from latentmas_kernels.trace import trace_of

WriteTexts = Callable[[LatentCache, list[int], list[list[int]]], None]
"""Has agents, by index, write: reads token ids per row into the cache and the texts behind them, and records the texts."""


class StageRun:
    """A run of one stage.

    Attributes:
        tokens: the stage's part of the plan.
        context: the model that the agents run on.
        last: whether no later stage goes on from the cache.
        prompts: token ids per question and agent, without the carried token.
        ids: token ids per question and agent, as the agent reads them.
        cached_len: per question, how many of `ids` are in the cache already.
        state: as the stage before left it, and then as this one does; the stage modifies it.
        outputs: per question, of the agents by index.
        metrics: per agent.
        warn: takes the index of a question and a warning about it at once, as the stage may fail later.
    """

    def __init__(
        self,
        setup: ChainSetup,
        options: RunOptions,
        plan: Plan,
        number: int,
        prompts: StagePrompts,
        state: ContextState,
        warn: Callable[[int, str], None],
    ) -> None:
        self.setup, self.options, self.plan, self.number = setup, options, plan, number
        self.prompts, self.state, self.warn = prompts, state, warn
        self.tokens = plan.stages[number]
        self.stage, self.agents = self.tokens.stage, self.tokens.stage.agents
        self.context = setup.model_contexts[self.stage.model]
        self.end_ids = self.context.end_ids  # once: the template is rendered for it
        self.last = number + 1 == len(plan.stages)
        self.ids: StagePrompts = []
        self.cached_len = [0] * len(prompts)
        self.outputs: list[dict[int, AgentOutput]] = [{} for _ in prompts]
        self.metrics = [AgentMetrics(agent.name) for agent in self.agents]
        self._traces: dict[int, AgentTrace] = {}
        self._kv_bytes = 0

    def run(self) -> StageResult:
        """Run the agents on the chain's own engine."""
        self.begin()
        self.execute(self._write)
        return self.result()

    @torch.no_grad()
    def begin(self, *, needs_cache: bool = True) -> None:
        """Prepare the cache that the agents extend, unless it is not needed here, and the token ids that they read."""
        if needs_cache:
            self.state.cache = self._begin_cache()
        self.ids = [
            [carried + ids for ids in prompts]
            for carried, prompts in zip(self.state.carried_token, self.prompts, strict=True)
        ]
        self.state.carried_token = [[] for _ in self.prompts]
        for number, metrics in enumerate(self.metrics):
            metrics.shared_tokens += sum(len(ids[number]) for ids in self.ids)

    @torch.no_grad()
    def execute(self, write: WriteTexts) -> None:
        """Let the agents extend the cache; those that write, by `write`."""
        if self.stage.parallel:
            self._run_parallel(write)
        else:
            assert self.state.cache is not None
            self._run_agents(self.state.cache, [0], write)
            self.state.cache.name_segments(self.agents[0].name)

    def result(self) -> StageResult:
        """Return the result, once the agents are done."""
        outputs = [[of[number] for number in range(len(self.agents))] for of in self.outputs]
        if self.setup.records_inputs:
            for q, of in enumerate(outputs):
                inputs = self.slot_inputs(q)
                for ids, output in zip(self.ids[q], of, strict=True):
                    inputs += [*ids[self.cached_len[q] :], *output.slot_inputs]
                self.state.slot_inputs[q] = inputs
        if self.state.cache is not None:
            self._kv_bytes = self.state.cache.kv_bytes
        for metrics in self.metrics:
            metrics.kv_bytes = self._kv_bytes
        traces = [trace for _, trace in sorted(self._traces.items())]
        return StageResult(self.state, outputs, self.metrics, traces)

    def slot_inputs(self, q: int) -> list[SlotInput]:
        """Return the inputs of a question's slots that are in the cache before the agents' own parts."""
        return [*self.state.slot_inputs[q], *self.ids[q][0][: self.cached_len[q]]]

    # ---- the cache as the stage begins -----------------------------------------------------------------------------

    def _begin_cache(self) -> LatentCache:
        """Return the cache that the agents extend, with room for what they add."""
        cache, self.state.cache = self.state.cache, None
        capacity = self.plan.capacity(self.number)
        if cache is None:
            return self._new_cache(capacity)
        self._cut(cache)
        if not self.tokens.recomputes:
            cache.rebase(self.context.model)
            return cache
        segments, slots = cache.segments, int(cache.lengths.sum())
        del cache  # the buffer of one model is freed before that of the other is allocated
        recomputed, seconds = recompute_cache(self.context, self.state.slot_inputs, capacity)
        recomputed.segments = segments
        self.add_seconds(prefill=seconds)
        self.metrics[0].prompt_tokens += slots
        return recomputed

    def _new_cache(self, capacity: int) -> LatentCache:
        """Return an empty cache, or one with the tokens that the prompts of all questions begin with."""
        architecture, shared = self.context.architecture, self.plan.shared
        if not shared:
            return LatentCache.for_model(architecture, len(self.prompts), capacity)
        ids = self.prompts[0][0][:shared]
        first = LatentCache.for_model(architecture, 1, shared)
        self.extend(first, [ids], "prompt")
        self._count_computed(0, shared)
        self.cached_len = [shared] * len(self.prompts)
        return first.fork_rows(len(self.prompts), capacity)

    def _cut(self, cache: LatentCache) -> None:
        """Cut out the slots that the agents do not get, and the oldest of those that the budget leaves no room for. This
        modifies the cache."""
        policy, batch, width = self.stage.memory_policy, len(self.prompts), int(cache.lengths.max())
        in_use = torch.arange(width) < cache.lengths[:, None]
        kept = in_use.clone()
        if policy.agents == "last":
            before = self.plan.stages[self.number - 1].stage
            names = {before.names, *(agent.name for agent in before.agents)}
            kept &= mask_of([s for s in cache.segments if s.agent in names], batch, width)
        if policy.kinds == "latent":
            kept &= mask_of([s for s in cache.segments if s.kind == "latent"], batch, width)
        kept[:, :SINK_SLOTS] = True
        for q, carried in enumerate(self.state.carried_token):
            most = width if policy.slots is None else policy.slots
            if self.plan.limit is not None:
                most = min(most, self.plan.limit - self.tokens.total(q) + self.tokens.carried - len(carried))
            kept[q, SINK_SLOTS:] &= kept[q, SINK_SLOTS:].flip(0).cumsum(0).flip(0) <= most - SINK_SLOTS
            # Inputs that are not recorded are an empty list, and a row may be shorter than the longest.
            inputs = zip(self.state.slot_inputs[q], kept[q].tolist(), strict=False)
            self.state.slot_inputs[q] = [slot for slot, keep in inputs if keep]
        if not torch.equal(kept, in_use):
            cache.keep(kept)

    # ---- parallel agents -------------------------------------------------------------------------------------------

    def _run_parallel(self, write: WriteTexts) -> None:
        """Let agents extend forks of the cache, and put what they add behind each other."""
        cache = self.state.cache
        assert cache is not None
        self._read_common(cache)
        cache.name_segments(self.stage.names)
        base = cache.lengths.clone()
        groups: dict[int, tuple[LatentCache, list[int]]] = {}
        for agents in group_calls(self.agents):
            group = cache.fork_rows(len(agents), self.plan.group_capacity(self.number, agents))
            self._run_agents(group, agents, write)
            self._kv_bytes += group.kv_bytes
            for place, number in enumerate(agents):
                groups[number] = group, list(range(place, group.batch_size, len(agents)))
        del cache
        self.state.cache = None  # freed before the merged one is allocated
        if self.last:
            return
        parts = [
            groups[number][0].part(groups[number][1], base if number else None, agent.name)
            for number, agent in enumerate(self.agents)
        ]
        capacity = self.plan.capacity(self.number, merged=True)
        self.state.cache = LatentCache.concat(parts, self.context.model, capacity=capacity)

    def _read_common(self, cache: LatentCache) -> None:
        """Read the tokens that the prompts of all agents begin with. This modifies the cache."""
        common = [
            ids[0][start : len(ids[0]) - len(prompts[0]) + length]
            for ids, prompts, length, start in zip(
                self.ids, self.prompts, self.tokens.common, self.cached_len, strict=True
            )
        ]
        if not any(common):
            return
        self.extend(cache, common, "prompt")
        self._count_computed(0, sum(map(len, common)))
        self.cached_len = [start + len(ids) for start, ids in zip(self.cached_len, common, strict=True)]

    # ---- latent steps and texts ------------------------------------------------------------------------------------

    def _run_agents(self, cache: LatentCache, numbers: list[int], write: WriteTexts) -> None:
        """Let agents, by index, extend a cache with a row for each question and each of them."""
        ids = [self.ids[q][number][start:] for q, start in enumerate(self.cached_len) for number in numbers]
        for place, number in enumerate(numbers):
            self._count_computed(number, sum(map(len, ids[place :: len(numbers)])))
        if self.agents[numbers[0]].thinks:
            self._run_latent(cache, numbers, ids)
        else:
            write(cache, numbers, ids)

    def _run_latent(self, cache: LatentCache, numbers: list[int], ids: list[list[int]]) -> None:
        context, top_k = self.context, self.options.trace
        assert context.aligner is not None
        report = self.report_begin(numbers)
        tokens, mask = padded(ids, context.architecture.device)
        steps = [self.agents[number].latent_steps or 0 for number in numbers]
        targets = dict(context.target_aligners)
        output = latent_generate(
            context.model, tokens, mask, latent_steps=steps * len(self.prompts) if len(set(steps)) > 1 else steps[0],
            settle=self.agents[numbers[0]].settle, past_key_values=cache.donate(), aligner=context.aligner,
            engine=context.engine, weights=context.weights, on_step=report.on_latent_step,
            output_states=top_k is not None, cross=list(targets.values()),
        )  # fmt: skip
        self.add_seconds(numbers, output.metrics.prefill_seconds, latent=output.metrics.latent_seconds)
        for place, number in enumerate(numbers):
            rows = slice(place, None, len(numbers))
            self.metrics[number].latent_steps += sum(output.latent_steps[rows])
            self.metrics[number].steps += max(output.latent_steps[rows])
            if top_k is not None and steps[place]:
                assert output.states is not None
                states, counts = output.states[rows], output.latent_steps[rows]
                own = replace(output, latents=output.latents[rows], states=states, latent_steps=counts)
                trace = trace_of(context.model, own, top_k=top_k)
                self._traces[number] = AgentTrace(self.agents[number].name, trace, context.tokenizer)
        for r, taken in enumerate(output.latent_steps):
            q, number = question_and_agent(r, numbers)
            turn = AgentTurn(self.agents[number].name, len(self.ids[q][number]), latent_steps=taken)
            self.outputs[q][number] = AgentOutput(turn)
            if self.setup.records_inputs:
                embeds = {context.name: output.latents, **dict(zip(targets, output.crossed, strict=True))}
                latents = [{name: rows[r, step] for name, rows in embeds.items()} for step in range(taken)]
                self.outputs[q][number].slot_inputs += latents

    def _write(self, cache: LatentCache, numbers: list[int], ids: list[list[int]]) -> None:
        """Write texts on the chain's own engine."""
        report = self.report_begin(numbers)
        tokens, mask = padded(ids, self.context.architecture.device)
        temperature, limit = self.options.temperature, self.agents[numbers[0]].max_new_tokens
        assert limit is not None
        output = generate(
            self.context.model, tokens, mask, past_key_values=cache.donate(), max_new_tokens=limit,
            do_sample=temperature > 0, temperature=temperature or 1.0, top_k=None, top_p=self.options.top_p,
            eos_token_id=self.end_ids, streamer=report, engine=self.context.engine, weights=self.context.weights,
        )  # fmt: skip
        self.add_seconds(numbers, output.metrics.prefill_seconds, decode=output.metrics.decode_seconds)
        missing = []
        for r, (new, reason) in enumerate(zip(output.new_tokens, output.finish_reasons, strict=True)):
            text = output.sequences[r, tokens.shape[1] : tokens.shape[1] + new].tolist()
            q, number = question_and_agent(r, numbers)
            kept = self.record_text(q, number, Completion(text, reason, len(ids[r])))
            missing.append(kept[max(new - 1, 0) :])  # generate() does not feed the last token in
        if any(missing):
            self.extend(cache, missing, "text")

    def record_text(self, q: int, number: int, text: Completion) -> list[int]:
        """Record what an agent wrote for a question.

        Returns:
            The tokens of the text that belong into the cache: all where another agent's part comes behind them; all but the
            last otherwise, which the next prompt brings where no end token closed the text.
        """
        agent, metrics, limit = self.agents[number], self.metrics[number], self.setup.max_note_tokens
        metrics.new_tokens += len(text.ids)
        metrics.steps = max(metrics.steps, len(text.ids))
        written = self.context.tokenizer.decode(without_end(text.ids, self.end_ids), skip_special_tokens=True).strip()
        note, count = written.rpartition("</think>")[2].strip(), None
        # What was written in few tokens is not counted again: another split of the same text is not worth a cut.
        if self.setup.has_reader(agent) and len(text.ids) > limit:
            note, count = truncate_note(note, self.context.tokenizer, limit)
        if count is not None:
            self.warn(
                q,
                f"{agent.name} wrote {count} tokens, of which the agents after it read the first {limit}; raise "
                "max_note_tokens (--handover-tokens) to hand on more",
            )
        turn = AgentTurn(
            agent.name, len(self.ids[q][number]), new_tokens=len(text.ids), text=written, finish_reason=text.finish_reason,
            truncated_to=None if count is None else limit,
        )  # fmt: skip
        final = number + 1 == len(self.agents)
        if final:
            self.state.carried_token[q] = text.ids[-1:] if text.finish_reason == "length" else []
        kept = text.ids if self.stage.parallel and not self.last and not final else text.ids[:-1]
        self.outputs[q][number] = AgentOutput(turn, Note(agent.name, note, agent.model), [*kept])
        return kept

    def extend(self, cache: LatentCache, ids: list[list[int]], kind: Kind) -> None:
        """Feed tokens into a cache, per row, on behalf of all agents. This modifies the cache."""
        self.add_seconds(prefill=self.context.extend(cache, ids, kind))

    def report_begin(self, numbers: list[int]) -> ProgressReporter:
        """Report that agents begin, and return the reporter of their steps."""
        members = self.setup.agents
        first, *others = (members.index(self.agents[number]) + 1 for number in numbers)
        agent, *beside = (self.agents[number] for number in numbers)
        progress = Progress(agent, first, len(members), 0, beside=tuple(beside), others=tuple(others))
        report = ProgressReporter(self.options.on_progress, progress)
        report(0)
        return report

    # ---- counting --------------------------------------------------------------------------------------------------

    def _count_computed(self, number: int, tokens: int) -> None:
        """Count tokens of an agent's prompts as computed for it; `begin` counted all of them as shared."""
        self.metrics[number].prompt_tokens += tokens
        self.metrics[number].shared_tokens -= tokens

    def add_seconds(
        self, numbers: list[int] | None = None, prefill: float = 0.0, latent: float = 0.0, decode: float = 0.0
    ) -> None:
        """Add seconds to agents by index, or to all, evenly."""
        agents = self.metrics if numbers is None else [self.metrics[number] for number in numbers]
        for metrics in agents:
            metrics.prefill_seconds += prefill / len(agents)
            metrics.latent_seconds += latent / len(agents)
            metrics.decode_seconds += decode / len(agents)


def question_and_agent(row: int, numbers: list[int]) -> tuple[int, int]:
    """Return the indices of a row's question and agent, in a cache with a row for each question and each of these agents."""
    return row // len(numbers), numbers[row % len(numbers)]
