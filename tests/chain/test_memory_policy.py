"""Memory policies and budgets: what is cut out of a cache, and what its buffers may take."""

import pytest
import torch
from example_chains import JUDGER, PER_SLOT, SENTENCES, double_moved, ids_of, texts_of
from latentmas.chain.agent import Agent
from latentmas.chain.chain import Chain
from latentmas.chain.memory_policy import Budget, MemoryPolicy
from latentmas.chain.plan import SINK_SLOTS

from latentmas_kernels import LatentCache, generate
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.models.architecture import Architecture

pytestmark = pytest.mark.usefixtures("keys_are_moved_by_torch")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"agents": "first"}, "agents of a memory policy must be 'all' or 'last'; got 'first'"),
        ({"kinds": "text"}, "kinds of a memory policy must be 'all' or 'latent'; got 'text'"),
        ({"slots": 0}, "slots of a memory policy must be an integer of 1 or more; got 0"),
    ],
)
def test_a_memory_policy_that_is_none(fields, says):
    with pytest.raises(LatentMASError, match=f"^{says}$"):
        MemoryPolicy(**fields)


# ---- memory policies --------------------------------------------------------------------------------------------------

KEPT = {
    "last": (MemoryPolicy(agents="last"), {"critic"}, {"prompt", "latent"}),
    "latent": (MemoryPolicy(kinds="latent"), {"planner", "critic"}, {"latent"}),
    "latent of the last": (MemoryPolicy(agents="last", kinds="latent"), {"critic"}, {"latent"}),
}


@pytest.mark.parametrize("engine", ["eager", "native"])
@pytest.mark.parametrize("what", [*KEPT, 20])
def test_memory_is_cut_as_asked_for_and_moves_to_the_first_positions(model, tokenizer, what, engine):
    """Against the cut written out: the slots to keep, their keys moved in float64."""
    over, names, kinds = KEPT[what] if what in KEPT else (MemoryPolicy(slots=what), set(), set())
    agents = [
        Agent("planner", "Plan: {question}", latent_steps=4),
        Agent("critic", "{question} Criticise.", latent_steps=3),
        Agent("judger", "Answer: {question}", max_new_tokens=6, memory=over),
    ]
    result = Chain(model, tokenizer, agents, aligner="ridge", engine=engine).run(SENTENCES)
    before = Chain(model, tokenizer, [*agents[:2], JUDGER], aligner="ridge", engine=engine).run(SENTENCES).memory
    for row, question in enumerate(SENTENCES):
        end = next(s.stop[row] for s in before.segments if s.name == "critic:latent")
        if what in KEPT:
            slots = [0, *(
                slot for s in before.segments if s.agent in names and s.kind in kinds
                for slot in range(s.start[row], s.stop[row])
            )]  # fmt: skip
        else:
            slots = [0, *range(max(1, end - what + SINK_SLOTS), end)]
        moved = torch.arange(len(slots)) - torch.tensor(slots)
        keys = double_moved(before.keys[:, row][:, :, slots], moved, model.model.rotary_emb.inv_freq).float()
        torch.testing.assert_close(result.memory.keys[:, row, :, : len(slots)], keys, rtol=2e-5, atol=2e-5)
        memory = LatentCache.for_model(Architecture.of(model), 1, 400)
        memory.keys[:, 0, :, : len(slots)] = keys
        memory.values[:, 0, :, : len(slots)] = before.values[:, row][:, :, slots]
        memory.positions[0, : len(slots)] = torch.arange(len(slots))
        memory.lengths = memory.next_position = torch.tensor([len(slots)])
        ids = ids_of(tokenizer, agents[2], question, first=False)
        said = generate(model, ids, past_key_values=memory, max_new_tokens=6, engine="eager")
        assert (
            tokenizer.decode(said.sequences[0, ids.shape[1] :], skip_special_tokens=True).strip()
            == texts_of(result)[row]
        )


# ---- the budget -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [Budget(slots=130), Budget(bytes=4 * 140 * PER_SLOT)], ids=["slots", "bytes"])
def test_twenty_agents_stay_within_a_budget(model, tokenizer, buffers, budget):
    agents = [Agent(f"agent {n}", "More on: {question}", latent_steps=5) for n in range(19)] + [JUDGER]
    chain = Chain(model, tokenizer, agents, aligner="ridge", budget=budget)
    need = chain.kv_bytes(SENTENCES)
    sizes = []
    result = chain.run(SENTENCES, on_progress=lambda progress: sizes.append(buffers[0]))
    most = budget.bytes or budget.slots * 4 * PER_SLOT
    assert 0 < buffers[0] <= most
    assert buffers[0] == need
    assert max(sizes) == buffers[0], "it was there from the first agent on"
    assert int(result.memory.lengths.max()) <= (budget.slots or 140)
    free = Chain(model, tokenizer, agents, aligner="ridge")
    assert free.kv_bytes(SENTENCES) > 4 * most
    assert result.memory.segments[0].name == "agent 0:prompt", "the first slot stays"
    assert result.memory.segments[0].stop == (SINK_SLOTS,) * 4


def test_without_a_budget_the_need_is_told_before(model, tokenizer, buffers):
    agents = [Agent(f"agent {n}", "More on: {question}", latent_steps=5) for n in range(19)] + [JUDGER]
    chain = Chain(model, tokenizer, agents, aligner="ridge")
    need = chain.kv_bytes(SENTENCES)
    assert buffers[0] == 0, "and nothing was made for it"
    chain.run(SENTENCES)
    assert buffers[0] == need


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (
            Budget(slots=40),
            r"agent 0 takes \d+ slots \(\d+ of prompts, 5 of .*\), and the budget leaves 40 to a question",
        ),
        (Budget(bytes=10_000), r"4 questions take at least .* MB of keys and values .*and the budget is 0.0 MB"),
    ],
)
def test_a_budget_that_is_too_small_is_refused_before_any_work(model, tokenizer, budget, words, monkeypatch):
    agents = [Agent("agent 0", "More on: {question}", latent_steps=5), JUDGER]
    chain = Chain(model, tokenizer, agents, aligner="ridge", budget=budget)
    monkeypatch.setattr("latentmas.chain.stage_run.latent_generate", lambda *_, **__: pytest.fail("the model ran"))
    for call in (chain.run, chain.kv_bytes):
        with pytest.raises(ValueError, match=words):
            call(SENTENCES)


def test_a_budget_of_exactly_what_is_needed_cuts_nothing(model, tokenizer):
    agents = [Agent("p", "Plan: {question}", latent_steps=3), Agent("w", "{question} Say.", max_new_tokens=5), JUDGER]
    free = Chain(model, tokenizer, agents, aligner="ridge").run(["Why?"]).memory
    slots = int(free.lengths[0])
    tight = Chain(model, tokenizer, agents, aligner="ridge", budget=f"{slots} slots").run(["Why?"]).memory
    assert tight.lengths.tolist() == [slots]
    assert tight.segments == free.segments
    less = Chain(model, tokenizer, agents, aligner="ridge", budget=f"{slots - 1} slots").run(["Why?"]).memory
    assert less.lengths.tolist() == [slots - 1]
