"""Plans: how long prompts, latent steps and texts become, and whether they fit the models, the budget and free memory."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence

from latentmas.chain.agent import Agent
from latentmas.chain.plan import SINK_SLOTS, Plan, StageTokens
from latentmas.chain.question_state import EMPTY_NOTE, TRUNCATED, Note, common_prefix_len
from latentmas.chain.setup import ChainSetup, Prompts, StagePrompts
from latentmas.chain.stages import Context
from latentmas_kernels.cache.free_memory import check_free_memory
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.models.architecture import Architecture

SHARE_FROM = 64
"""Tokens that reading a common beginning once must save. The pass of its own reads the weights once more: on SmolLM2-135M in
bfloat16 on two cores, 30 tokens saved took 29 ms instead of 33, 64 tokens 39 instead of 56, 90 tokens 40 instead of 66."""

RESPLIT = 4
"""Tokens by which a text may be longer when it is split anew, its ends stripped, than it was written."""


def plan_chain(setup: ChainSetup, questions: Sequence[str]) -> list[Plan]:
    """Return the plan of each context, with notes as long as they may become.

    Raises:
        LatentMASError: as `make_plan`.
    """
    written: list[Agent] = []
    plans = []
    for context in setup.contexts:
        notes = [Note(agent.name, TRUNCATED, agent.model) for agent in written]
        times = max(agent.placeholders.count("notes") for agent in context[0].agents)
        longest = times * sum(_longest_note(setup, agent, context[0].model) for agent in written)
        plans.append(make_plan(setup, context, [setup.prompts(context, q, notes) for q in questions], longest))
        written += [agent for stage in context for agent in stage.agents if not agent.thinks]
    return plans


def make_plan(setup: ChainSetup, context: Context, prompts: Sequence[Prompts], extra: int = 0) -> Plan:
    """Return the plan of a context.

    Args:
        prompts: of each question.
        extra: tokens that notes may add to the prompts of the first stage.

    Raises:
        LatentMASError: where the context does not fit the models' positions, the decoder or the budget.
    """
    # Once per model: it is read off the model anew each time, and takes longer than the rest of a plan.
    architectures = {name: setup.model_contexts[name].architecture for name in {stage.model for stage in context}}
    alone_with_decoder = len(context) == 1 and setup.decoder_of(context[0]) is not None
    stages = []
    for number, stage in enumerate(context):
        slot_bytes = 0 if alone_with_decoder else _slot_bytes(architectures[stage.model])
        of_stage = [of[number] for of in prompts]
        stages.append(_stage_tokens(context, number, slot_bytes, of_stage, 0 if number else extra))
    shared = 0
    if len(prompts) > 1:
        first = [ids for of in prompts for ids in of[0]]
        # Notes that are not known yet may be alike, too.
        shared = min(map(len, first)) - 1 + extra if extra else common_prefix_len(first)
        shared = shared if shared * (len(prompts) - 1) >= SHARE_FROM else 0
    plan = Plan(stages, shared, None if setup.budget is None else setup.budget.slots)
    if setup.budget is not None and setup.budget.bytes is not None:
        plan = _fit_budget(plan, setup.budget.bytes)
    _check_decoder_limit(setup, plan)
    _check_positions(architectures, plan)
    return plan


def check_plan_memory(setup: ChainSetup, plan: Plan) -> None:
    """Raise InsufficientMemoryError where the buffers of a context do not fit what is free."""
    device = setup.model_contexts[plan.stages[0].stage.model].architecture.device
    check_free_memory(plan.kv_bytes, device, f"a memory of {plan.questions} rows of {plan.most_slots} slots")


def _slot_bytes(a: Architecture) -> int:
    """Return the bytes of keys and values of one slot."""
    return 2 * a.layers * a.kv_heads * a.head_dim * a.dtype.itemsize


def _stage_tokens(context: Context, number: int, slot_bytes: int, prompts: StagePrompts, extra: int) -> StageTokens:
    stage, last = context[number], number + 1 == len(context)
    # Where notes are still to be written, nobody knows how far prompts begin alike: counted as if they did not at all, and
    # as if the shortest were common to all.
    common = [common_prefix_len(of) if stage.parallel and not extra else 0 for of in prompts]
    extra_common = [min(map(len, of)) + extra for of in prompts] if stage.parallel and extra else None
    return StageTokens(
        stage,
        slot_bytes,
        common,
        [[len(ids) - start + extra for ids in of] for of, start in zip(prompts, common, strict=True)],
        # The last token of a text is not fed in, but by the next turn, or before another agent's part is put behind it.
        [a.steps - (not a.thinks and (last or a is stage.agents[-1])) for a in stage.agents],
        carried=int(number > 0 and not context[number - 1].agents[-1].thinks),
        recomputes=number > 0 and stage.model != context[number - 1].model,
        extra_common=extra_common,
    )


def _longest_note(setup: ChainSetup, writer: Agent, reader: str | None) -> int:
    """Return the tokens that a text may have as a note to a model, beyond those of TRUNCATED."""
    if (writer.model, reader) in setup.vocab_mismatches:
        return setup.max_note_tokens
    tokenizer = setup.model_contexts[reader].tokenizer
    empty, mark = (len(tokenizer(text, add_special_tokens=False).input_ids) for text in (EMPTY_NOTE, TRUNCATED))
    return max(min(writer.steps, setup.max_note_tokens) + RESPLIT, empty - mark)


def _fit_budget(plan: Plan, most: int) -> Plan:
    """Return the plan with as many slots for each question as the bytes allow."""
    if plan.kv_bytes <= most:
        return plan
    questions = range(plan.questions)
    low = max(
        tokens.total(q) + SINK_SLOTS * (number > 0) for number, tokens in enumerate(plan.stages) for q in questions
    )
    high = plan.most_slots
    least = Plan(plan.stages, plan.shared, low)
    if least.kv_bytes > most:
        largest = max(plan.stages, key=lambda tokens: max(tokens.total(q) for q in questions)).stage.names
        raise LatentMASError(
            f"{len(questions)} questions take at least {least.kv_bytes / 2**20:,.1f} MB of keys and values (most of "
            f"it for {largest}), and the budget is {most / 2**20:,.1f} MB; raise it, take fewer questions at a time, or "
            "lower latent_steps and max_new_tokens"
        )
    more = bisect_right(range(low + 1, high), most, key=lambda slots: Plan(plan.stages, plan.shared, slots).kv_bytes)
    return Plan(plan.stages, plan.shared, low + more)


def _check_decoder_limit(setup: ChainSetup, plan: Plan) -> None:
    for tokens, slots in zip(plan.stages, plan.slots, strict=True):
        decoder = setup.decoder_of(tokens.stage)
        need = max(begin + tokens.longest_text(q) for q, begin in enumerate(slots.begin))
        if decoder is not None and need > decoder.max_model_len:
            raise LatentMASError(
                f"{tokens.stage.names} goes up to {need} tokens ({max(slots.begin)} of memory), and the decoder was started "
                f"for {decoder.max_model_len} (max_model_len); start it with more, shorten the question, or lower "
                "latent_steps and max_new_tokens"
            )


def _check_positions(architectures: Mapping[str | None, Architecture], plan: Plan) -> None:
    """Check the longest row of each model."""
    ends = [
        (end, prompt, tokens.stage)
        for tokens, slots in zip(plan.stages, plan.slots, strict=True)
        for end, prompt in zip(slots.end, slots.prompts, strict=True)
    ]
    for name in dict.fromkeys(stage.model for _, _, stage in ends):
        architecture, limit = architectures[name], architectures[name].max_positions
        end, prompt, stage = max((e for e in ends if e[2].model == name), key=lambda e: e[0])
        if limit is not None and end > limit:
            raise LatentMASError(
                f"the chain goes up to {end} positions ({prompt} of prompts, {end - prompt} of latent steps and new "
                f"tokens), but {architecture.name} was made for {limit}; shorten the question or lower latent_steps "
                "and max_new_tokens" + (", or max_note_tokens (--handover-tokens)" if stage.reads_notes else "")
            )
