"""A run of a chain: agents side by side, common beginnings read once, memories cut and kept within a budget."""

import itertools
import time
from contextlib import suppress

import latentmas.chain.planner
import pytest
import torch
from buffers import count_buffers
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from latentmas import Agent, Budget, Chain, MemoryPolicy
from latentmas.chain.plan import SINK_SLOTS
from latentmas.chain.prompts import turn_ids
from latentmas.chain_files.reader import METHODS
from tiny_models import VOCAB, tiny_model
from tokenizers_offline import character_tokenizer

from latentmas_kernels import LatentCache, generate, latent_generate
from latentmas_kernels.engines import EagerEngine, NativeEngine
from latentmas_kernels.models.architecture import Architecture

TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '|' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
QUESTIONS = [
    "Why is the sky blue, and not green or red?",
    "What is 12 times 7, and why is it so?",
    "Name a colour.",
    "x",
]
pytestmark = pytest.mark.usefixtures("keys_are_moved_by_torch")
MATH = Agent("math", "Q: {question} As a mathematician.", latent_steps=4)
CODE = Agent("code", "Q: {question} As a programmer, say how.", latent_steps=2)
WORDS = Agent("words", "Q: {question} Write.", max_new_tokens=5)
JUDGER = Agent("judger", "Answer: {question}", max_new_tokens=6)
PER_SLOT = 2 * 3 * 2 * 16 * 4  # keys and values, layers, heads, width, bytes


def endless(name="llama", **overrides):
    model = tiny_model(name, **{"max_position_embeddings": 4096, **overrides})
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def model():
    return endless()


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer(TEMPLATE)


@pytest.fixture
def buffers(monkeypatch):
    return count_buffers(monkeypatch)


def texts(result):
    return [answer.text for answer in result.answers]


def ids_of(tokenizer, agent, question, *, first):
    return torch.tensor([turn_ids(tokenizer, agent.text(question), first=first)])


def double_moved(keys, shifts, inv_freq):
    """Keys [layers, heads, n, hd] moved by shifts [n], in float64."""
    low, high = keys.double().chunk(2, dim=-1)
    angle = shifts.double()[:, None] * inv_freq.double()
    return torch.cat([low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()], dim=-1)


# ---- side by side --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["eager", "native"])
@pytest.mark.parametrize("before", [False, True], ids=["first", "behind a planner"])
@pytest.mark.parametrize("name", ["llama", "qwen3-mixed"])
def test_merged_memory_is_that_of_each_agent_alone_moved_in_float64(tokenizer, engine, before, name):
    """Each agent by itself from the same memory; its part of the keys moved behind the parts before it."""
    model = endless(name)
    planner = Agent("planner", "Plan. {question}", latent_steps=3)
    agents = [*([planner] if before else []), [MATH, CODE, WORDS], JUDGER]
    result = Chain(model, tokenizer, agents, aligner="ridge", engine=engine).run(QUESTIONS)
    inv_freq = model.model.rotary_emb.inv_freq
    for row, question in enumerate(QUESTIONS):
        memory = None
        if before:
            memory = latent_generate(
                model, ids_of(tokenizer, planner, question, first=True), latent_steps=3, aligner="ridge", engine="eager"
            ).past_key_values
        whole = [ids_of(tokenizer, agent, question, first=not before)[0] for agent in (MATH, CODE, WORDS)]
        common = next(n for n in range(1000) if len({int(ids[n]) for ids in whole}) > 1)
        base = common + (int(memory.lengths[0]) if before else 0)
        keys, values, at = [], [], base
        for agent, ids in zip((MATH, CODE, WORDS), whole, strict=True):
            if agent.thinks:
                alone = latent_generate(
                    model,
                    ids[None],
                    latent_steps=agent.latent_steps,
                    past_key_values=memory,
                    aligner="ridge",
                    engine="eager",
                ).past_key_values
            else:
                said = generate(model, ids[None], past_key_values=memory, max_new_tokens=5, engine="eager")
                alone = said.past_key_values
            length = int(alone.lengths[0])
            if not keys:
                keys.append(alone.keys[:, 0, :, :base].double())
                values.append(alone.values[:, 0, :, :base])
            keys.append(
                double_moved(alone.keys[:, 0, :, base:length], torch.full((length - base,), at - base), inv_freq)
            )
            values.append(alone.values[:, 0, :, base:length])
            at += length - base
        got = result.memory
        torch.testing.assert_close(got.keys[:, row, :, :at].double(), torch.cat(keys, 2), rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(got.values[:, row, :, :at], torch.cat(values, 2), rtol=2e-5, atol=2e-5)
        assert got.positions[row, : int(got.lengths[row])].tolist() == list(range(int(got.lengths[row])))


def test_a_text_that_others_follow_is_in_the_memory_to_its_last_token(model, tokenizer):
    """The last one of a group leaves its last token to the next turn, as a writer alone does."""
    first, second = WORDS, Agent("more", "Q: {question} Write more.", max_new_tokens=7)
    result = Chain(model, tokenizer, [[first, second], JUDGER], engine="eager").run(["Why?"])
    segments = {s.name: s.stop[0] - s.start[0] for s in result.memory.segments}
    assert segments["words:text"] == 5
    assert segments["more:text"] == 6
    assert result.answers[0].turns[2].prompt_tokens == len(ids_of(tokenizer, JUDGER, "Why?", first=False)[0]) + 1


@pytest.mark.parametrize("engine", ["eager", "native"])
@pytest.mark.parametrize("method", ["hierarchical", "debate", "mix"])
def test_a_question_in_a_batch_is_the_question_alone(model, tokenizer, method, engine):
    chain = Chain(model, tokenizer, METHODS[method](3, 6), aligner="ridge", engine=engine)
    together = chain.run(QUESTIONS)
    for row, question in enumerate(QUESTIONS):
        alone = chain.run([question])
        assert texts(alone) == [together.answers[row].text]
        assert alone.answers[0].turns == together.answers[row].turns
        assert alone.memory.segments == together.memory.select([row]).segments


def test_agents_side_by_side_do_not_see_each_other(model, tokenizer):
    """Another prompt of one changes nothing of the other's part but its place."""
    other = Agent("math", "Q: {question} As a poet and a dreamer, quite otherwise.", latent_steps=7)
    parts = []
    for math in (MATH, other):
        memory = Chain(model, tokenizer, [[math, CODE], JUDGER], aligner="ridge").run(["Why?"]).memory
        start, stop = (int(s[0]) for s in next((s.start, s.stop) for s in memory.segments if s.name == "code:latent"))
        parts.append(memory.values[:, 0, :, start:stop])
    torch.testing.assert_close(parts[0], parts[1], rtol=0, atol=1e-6)
    one_after_the_other = Chain(model, tokenizer, [other, CODE, JUDGER], aligner="ridge").run(["Why?"]).memory
    start, stop = (
        int(s[0]) for s in next((s.start, s.stop) for s in one_after_the_other.segments if s.name == "code:latent")
    )
    assert (one_after_the_other.values[:, 0, :, start:stop] - parts[0]).abs().max() > 1e-3


def test_side_by_side_is_one_call_of_the_engine_per_step(model, tokenizer, monkeypatch):
    """As many forwards as the agent with the most steps takes, whatever the number of agents and questions."""
    seen = []
    extend = EagerEngine.extend

    def counted(engine, cache, prompt, *, logits):
        seen.append((prompt.counts.tolist(), prompt.inputs_embeds is not None))
        return extend(engine, cache, prompt, logits=logits)

    monkeypatch.setattr(EagerEngine, "extend", counted)
    Chain(model, tokenizer, [[MATH, CODE], JUDGER], aligner="ridge", engine="eager").run(QUESTIONS)
    thought = [counts for counts, latent in seen if latent]
    assert thought == [[1] * 8, [1] * 8, [1, 0] * 4, [1, 0] * 4]


def test_agents_of_a_group_share_what_they_read(model, tokenizer):
    result = Chain(model, tokenizer, [[MATH, CODE], JUDGER], aligner="ridge").run(QUESTIONS)
    math, code, judger = result.agents
    common = [len("<user>Q: ") + len(q) + len(" As a ") for q in QUESTIONS]
    assert code.shared_tokens == sum(common)
    assert code.prompt_tokens + code.shared_tokens == sum(a.turns[1].prompt_tokens for a in result.answers)
    assert math.prompt_tokens == sum(a.turns[0].prompt_tokens for a in result.answers)
    assert (math.shared_tokens, judger.shared_tokens) == (0, 0)
    assert [s.name for s in result.memory.segments][:5] == [
        "math + code:prompt", "math:prompt", "math:latent", "code:prompt", "code:latent"
    ]  # fmt: skip


# ---- common beginnings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["eager", "native"])
@pytest.mark.parametrize("agents", [[MATH, JUDGER], [[MATH, CODE], JUDGER]], ids=["row", "group"])
def test_what_all_questions_have_in_common_is_read_once(model, tokenizer, monkeypatch, engine, agents):
    """300 tokens for 8 questions, counted at the engine; the outputs are those of the run that shares nothing."""
    long = "Read this with care. " * 15
    assert len(long) > 300
    agents = [
        [Agent(a.name, long + a.prompt, latent_steps=a.latent_steps) for a in entry]
        if isinstance(entry, list)
        else Agent(entry.name, long + entry.prompt, entry.latent_steps, entry.max_new_tokens)
        for entry in agents[:1]
    ] + agents[1:]
    questions = [f"{n} is the number; what is it?" for n in range(8)]
    kind = EagerEngine if engine == "eager" else NativeEngine
    read = []
    for name in ("extend",):
        extend = getattr(kind, name)

        def counted(self, cache, prompt, *, logits, extend=extend):
            if prompt.input_ids is not None and prompt.columns > 1:
                read.append(int(prompt.counts.sum()))
            return extend(self, cache, prompt, logits=logits)

        monkeypatch.setattr(kind, name, counted)
    chain = Chain(model, tokenizer, agents, aligner="ridge", engine=engine)
    shared, count = chain.run(questions), sum(read)
    read.clear()
    monkeypatch.setattr(latentmas.chain.planner, "SHARE_FROM", 10**9)
    unshared, whole = chain.run(questions), sum(read)
    beginning = len("<user>") + len(long) + len("Q: ")
    assert whole - count == 7 * beginning
    assert shared.agents[0].shared_tokens == 7 * beginning
    assert texts(shared) == texts(unshared)
    assert [a.turns for a in shared.answers] == [a.turns for a in unshared.answers]
    assert shared.memory.segments == unshared.memory.segments
    for row, length in enumerate(shared.memory.lengths.tolist()):
        got = shared.memory.select([row]).keys[:, 0, :, :length]
        torch.testing.assert_close(got, unshared.memory.keys[:, row, :, :length], rtol=1e-5, atol=1e-5)
    if not isinstance(agents[0], list):
        assert int(shared.memory.prefix_len.min()) == 0
        assert int(shared.memory.prefix_len.max()) == beginning // 64 * 64, "and held once"


# ---- what is handed on ---------------------------------------------------------------------------------------------

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
    result = Chain(model, tokenizer, agents, aligner="ridge", engine=engine).run(QUESTIONS)
    before = Chain(model, tokenizer, [*agents[:2], JUDGER], aligner="ridge", engine=engine).run(QUESTIONS).memory
    for row, question in enumerate(QUESTIONS):
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
            tokenizer.decode(said.sequences[0, ids.shape[1] :], skip_special_tokens=True).strip() == texts(result)[row]
        )


# ---- the budget ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [Budget(slots=130), Budget(bytes=4 * 140 * PER_SLOT)], ids=["slots", "bytes"])
def test_twenty_agents_stay_within_a_budget(model, tokenizer, buffers, budget):
    agents = [Agent(f"agent {n}", "More on: {question}", latent_steps=5) for n in range(19)] + [JUDGER]
    chain = Chain(model, tokenizer, agents, aligner="ridge", budget=budget)
    need = chain.kv_bytes(QUESTIONS)
    sizes = []
    result = chain.run(QUESTIONS, on_progress=lambda progress: sizes.append(buffers[0]))
    most = budget.bytes or budget.slots * 4 * PER_SLOT
    assert 0 < buffers[0] <= most
    assert buffers[0] == need
    assert max(sizes) == buffers[0], "it was there from the first agent on"
    assert int(result.memory.lengths.max()) <= (budget.slots or 140)
    free = Chain(model, tokenizer, agents, aligner="ridge")
    assert free.kv_bytes(QUESTIONS) > 4 * most
    assert result.memory.segments[0].name == "agent 0:prompt", "the first slot stays"
    assert result.memory.segments[0].stop == (SINK_SLOTS,) * 4


def test_without_a_budget_the_need_is_told_before(model, tokenizer, buffers):
    agents = [Agent(f"agent {n}", "More on: {question}", latent_steps=5) for n in range(19)] + [JUDGER]
    chain = Chain(model, tokenizer, agents, aligner="ridge")
    need = chain.kv_bytes(QUESTIONS)
    assert buffers[0] == 0, "and nothing was made for it"
    chain.run(QUESTIONS)
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
            call(QUESTIONS)


# ---- any chain -----------------------------------------------------------------------------------------------------

MODEL = endless()
STOPS = endless()
STOPS.generation_config.eos_token_id = list(range(0, VOCAB, 5))
NESTED = ["What is 12 times 7?", "What is 12 times 7? And 8 times 9?", "What", "What is it, and why is it so? Say it."]
LONG = "Read all of this with care, and more than once, before you say anything about it. "
PROMPTS = ["Q: {question} Go on.", "Q: {question} Say!", "Go.", "{question}", LONG + "{question}"]
HANDED = st.builds(
    MemoryPolicy, st.sampled_from(["all", "all", "last"]), st.sampled_from(["all", "all", "latent"]),
    st.none() | st.integers(1, 60),
)  # fmt: skip


@st.composite
def chains(draw):
    """Agents in any arrangement that makes a chain, with hand-overs of any kind."""
    entries, number = [], 0
    last_thinks, written = False, False
    for _ in range(draw(st.integers(1, 3))):
        reads = written and not last_thinks and draw(st.booleans())
        memory = draw(HANDED)
        members = []
        for _ in range(draw(st.integers(1, 3))):
            number += 1
            prompt = draw(
                st.sampled_from(
                    ["Q: {question} Go on.", "Q: {question} Say!", "Go.", "{question}", LONG + "{question}"]
                )
            )
            if reads:
                prompt = draw(
                    st.sampled_from(["{notes} " + prompt, prompt + "{notes}", "{notes}" + prompt + "{notes}"])
                )
            thinks = draw(st.booleans())
            options = (
                {"latent_steps": draw(st.integers(0, 4))} if thinks else {"max_new_tokens": draw(st.integers(1, 4))}
            )
            settle = draw(st.sampled_from([None, -1.0, 0.5])) if thinks else None
            members.append(Agent(f"a{number}", prompt, **options, memory=memory, settle=settle))
        last_thinks = any(a.thinks for a in members)
        written = written or any(not a.thinks for a in members)
        entries.append(members if len(members) > 1 else members[0])
    judger = Agent("judger", "Answer: {question}", max_new_tokens=3, memory=draw(HANDED))
    return [*entries, judger]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_chain_takes_what_it_said_and_answers_each_question_as_alone(data):
    """KV buffers never take more than was told, or than the budget; rows of a batch are what they are alone."""
    model = data.draw(st.sampled_from([MODEL, STOPS]))
    tokenizer = character_tokenizer(data.draw(st.sampled_from([TEMPLATE, None])))
    agents = data.draw(chains())
    questions = data.draw(st.sampled_from([QUESTIONS, NESTED]))[: data.draw(st.integers(1, 4))]
    slots = data.draw(st.none() | st.integers(250, 600))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latentmas.chain.planner, "SHARE_FROM", data.draw(st.sampled_from([1, 10**9])))
        held = count_buffers(patch)
        budget = None if slots is None else Budget(slots=slots)
        chain = Chain(model, tokenizer, agents, aligner="ridge", budget=budget)
        try:
            need = chain.kv_bytes(questions)
        except ValueError as refused:  # before any work
            event("refused")
            assert held[0] == 0
            assert f"the budget leaves {slots}" in str(refused)  # noqa: PT017
            return
        result = chain.run(questions)
        assert held[0] <= need
        for row, question in enumerate(questions):
            alone = chain.run([question]).answers[0]
            assert alone.text == result.answers[row].text
            assert alone.turns == result.answers[row].turns
        tight = Budget(bytes=int(need * 0.8))
        bounded = Chain(model, tokenizer, agents, aligner="ridge", budget=tight)
        held[0] = 0
        del result
        with suppress(ValueError):  # it says that this is too little, before any work
            bounded.kv_bytes(questions)
            bounded.run(questions)
        assert held[0] <= tight.bytes


def test_a_question_that_begins_another_is_read_as_alone(model, tokenizer):
    """One has nothing to read for all agents, the others do; what all have in common was read before."""
    agents = [
        [
            Agent("pro", LONG + "{question} Argue for it.", latent_steps=3),
            Agent("con", LONG + "{question} See both.", latent_steps=2),
        ],
        JUDGER,
    ]
    chain = Chain(model, tokenizer, agents, aligner="ridge")
    result = chain.run(NESTED)
    for row, question in enumerate(NESTED):
        alone = chain.run([question])
        assert texts(alone) == [texts(result)[row]]
        assert alone.memory.lengths.tolist() == [int(result.memory.lengths[row])]
        assert alone.memory.segments == result.memory.select([row]).segments


def test_one_question_without_a_common_beginning_changes_nothing_for_the_others(model):
    plain = character_tokenizer(None)
    agents = [
        [Agent("a", "What {question}", latent_steps=2), Agent("b", "{question}, against", latent_steps=2)],
        JUDGER,
    ]
    questions = ["What is red, and what is blue", "Name a fruit"]
    chain = Chain(model, plain, agents, aligner="ridge")
    result = chain.run(questions)
    for row, question in enumerate(questions):
        assert chain.run([question]).memory.lengths.tolist() == [int(result.memory.lengths[row])]


def test_what_ends_early_leaves_more_of_others_behind_a_cut(tokenizer):
    """A text that ends at once: more thoughts are among the last slots, and are what is handed on next."""
    agents = [
        Agent("thinker", "Think: {question}", latent_steps=40),
        Agent("writer", "Write.", max_new_tokens=60),
        Agent("cutter", "Go on.", latent_steps=1, memory=MemoryPolicy(slots=100)),
        Agent("judger", "Answer: {question}", max_new_tokens=6, memory=MemoryPolicy(kinds="latent")),
    ]
    STOPS.generation_config.eos_token_id = list(range(VOCAB))
    try:
        chain = Chain(STOPS, tokenizer, agents, aligner="ridge")
        need = chain.kv_bytes(QUESTIONS)
        result = chain.run(QUESTIONS)
    finally:
        STOPS.generation_config.eos_token_id = list(range(0, VOCAB, 5))
    assert result.answers[0].turns[1].new_tokens == 1
    assert result.memory.buffer.nbytes <= need


def test_a_budget_of_exactly_what_is_needed_cuts_nothing(model, tokenizer):
    agents = [Agent("p", "Plan: {question}", latent_steps=3), Agent("w", "{question} Say.", max_new_tokens=5), JUDGER]
    free = Chain(model, tokenizer, agents, aligner="ridge").run(["Why?"]).memory
    slots = int(free.lengths[0])
    tight = Chain(model, tokenizer, agents, aligner="ridge", budget=f"{slots} slots").run(["Why?"]).memory
    assert tight.lengths.tolist() == [slots]
    assert tight.segments == free.segments
    less = Chain(model, tokenizer, agents, aligner="ridge", budget=f"{slots - 1} slots").run(["Why?"]).memory
    assert less.lengths.tolist() == [slots - 1]


def test_agents_that_nothing_goes_on_from_need_positions_for_each_alone(tokenizer):
    group = [Agent(f"w{n}", "Q: {question} Say.", max_new_tokens=40) for n in range(4)]
    reader = Agent("judger", "{notes}", max_new_tokens=2)
    chain = Chain(endless(max_position_embeddings=128), tokenizer, [group, reader], max_note_tokens=5)
    chain.check("x")
    with pytest.warns(UserWarning, match=r"wrote \d+ tokens"):
        assert len(chain.run(["x"]).answers[0].turns) == 5


def test_notes_to_a_model_of_other_tokens_are_counted_and_cut_in_its_own(model, tokenizer):
    """A word of the writer is many letters to the reader."""
    words = character_tokenizer(TEMPLATE)
    words.add_tokens(["longlonglonglong"])
    writer = Agent("writer", "Say: {question}", max_new_tokens=6, model="words")
    reader = Agent("judger", "{notes} Answer.", max_new_tokens=2)
    talker = endless(vocab_size=VOCAB)
    long_word = words.convert_tokens_to_ids("longlonglonglong")
    talker.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCAB))
    with torch.no_grad():
        talker.lm_head.bias[long_word] = 1e4
    chain = Chain(model, tokenizer, [writer, reader], models={"words": (talker, words)}, max_note_tokens=20)
    need = chain.kv_bytes(["Why?"])
    with pytest.warns(UserWarning, match="what writer wrote is 96 tokens to judger, of which 20 are read"):
        result = chain.run(["Why?"])
    assert result.memory.buffer.nbytes <= need
    assert result.answers[0].turns[1].prompt_tokens < 96


@pytest.mark.parametrize("name", ["a + b"])
def test_no_agent_is_called_like_a_group(model, tokenizer, name):
    agents = [
        Agent(name, "x", latent_steps=1),
        [Agent("a", "x", latent_steps=1), Agent("b", "y", latent_steps=1)],
        JUDGER,
    ]
    with pytest.raises(ValueError, match=r"no agent may be called 'a \+ b'"):
        Chain(model, tokenizer, agents, aligner="ridge")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Agent("a", "x", latent_steps=1.5), "latent_steps must be an integer of 0 or more; got 1.5"),
        (lambda: Agent("a", "x", latent_steps=1, memory="last"), r"memory must be a MemoryPolicy, .*; got 'last'"),
        (lambda: Chain(MODEL, character_tokenizer(None), [JUDGER], budget=64), "budget must be a Budget, .*; got int"),
        (lambda: Chain(MODEL, character_tokenizer(None), [JUDGER], budget="64"), "got a budget of '64'"),
    ],
)
def test_values_of_other_types_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("prompts", [["Answer."], ["{{question}}"], ["Plan.", "{notes}"]])
def test_a_chain_in_which_nobody_gets_the_question_is_refused(prompts):
    agents = [Agent(f"agent{number}", prompt, max_new_tokens=2) for number, prompt in enumerate(prompts)]
    with pytest.raises(
        ValueError, match=r"nobody gets the question: no agent of 'agent0'.* has \{question\} in its prompt"
    ):
        Chain(MODEL, character_tokenizer(None), agents)
    Chain(MODEL, character_tokenizer(None), [Agent("first", "{question}", max_new_tokens=2), *agents])


def test_half_a_character_in_a_question_is_named(model, tokenizer):
    chain = Chain(model, tokenizer, [JUDGER])
    with pytest.raises(ValueError, match=r"^question 2 holds '\\ud83d' at character 5, half a surrogate pair"):
        chain.run(["Why?", "Why \ud83d"])


def test_agents_in_several_calls_have_seconds_and_numbers_of_their_own(model, tokenizer, monkeypatch):
    """A thinker beside a writer: its steps are not charged with the text, and each is told of by its number. On a clock that
    ticks when it is looked at, all seconds but the first and the last are somebody's."""
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    agents = [[MATH, WORDS, CODE], JUDGER]
    told = []
    chain = Chain(model, tokenizer, agents, aligner="ridge")
    result = chain.run(QUESTIONS, on_progress=lambda p: told.append((p.names, p.number, p.others)))
    math, words, code, _ = result.agents
    assert (math.decode_seconds, code.decode_seconds, words.latent_seconds) == (0, 0, 0)
    assert math.latent_seconds == code.latent_seconds > 0 < words.decode_seconds
    assert list(dict.fromkeys(told)) == [("math + code", 1, (3,)), ("words", 2, ()), ("judger", 4, ())]
    assert sum(agent.seconds for agent in result.agents) == pytest.approx(result.seconds - 2)


# ---- stopping early, looking inside --------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["eager", "native"])
def test_each_question_stops_thinking_by_itself(model, tokenizer, engine):
    """Between the least and the greatest cosine of a first run, some questions stop and others go on."""
    free = [Agent("planner", "Plan: {question}", latent_steps=6), JUDGER]
    traced = Chain(model, tokenizer, free, aligner="ridge", engine=engine).run(QUESTIONS, trace=1)
    cosines = traced.traces[0].trace.cosines[:, 1:]
    between = cosines.max(dim=1).values.sort().values
    settle = float(between[1] + between[2]) / 2
    agents = [Agent("planner", "Plan: {question}", latent_steps=6, settle=settle), JUDGER]
    result = Chain(model, tokenizer, agents, aligner="ridge", engine=engine).run(QUESTIONS)
    steps = [answer.turns[0].latent_steps for answer in result.answers]
    stops = [next((n + 2 for n, c in enumerate(row) if c >= settle), 6) for row in cosines.tolist()]
    assert steps == stops
    assert len(set(steps)) > 1
    assert result.agents[0].latent_steps == sum(steps)
    assert result.agents[0].steps == max(steps)
    for row, question in enumerate(QUESTIONS):
        alone = Chain(model, tokenizer, agents, aligner="ridge", engine=engine).run([question])
        assert alone.answers[0].text == result.answers[row].text


def test_traces_are_those_of_each_agent_and_only_where_asked_for(model, tokenizer):
    chain = Chain(model, tokenizer, [[MATH, WORDS, CODE], JUDGER], aligner="ridge")
    result, plain = chain.run(QUESTIONS, trace=3), chain.run(QUESTIONS)
    assert plain.traces == []
    assert texts(result) == texts(plain)
    assert [(t.agent, t.trace.steps) for t in result.traces] == [("math", [4] * 4), ("code", [2] * 4)]
    assert result.traces[0].trace.tokens.shape == (4, 4, 3)
    for row, question in enumerate(QUESTIONS):
        alone = Chain(model, tokenizer, [CODE, JUDGER], aligner="ridge").run([question], trace=3).traces[0].trace
        assert torch.equal(alone.tokens[0], result.traces[1].trace.tokens[row, :2])
        torch.testing.assert_close(alone.norms[0], result.traces[1].trace.norms[row, :2], rtol=1e-5, atol=1e-5)
