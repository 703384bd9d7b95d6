"""Chain: a batch of questions through agents over one memory, against the two calls that it is made of."""

import pytest
import torch
from conftest import VOCAB, PlainLoop, feed_back, tiny_model
from latentmas import chain as chain_module
from latentmas.agents import Agent, sequential
from latentmas.chain import Chain
from latentmas.prompts import padded, turn_ids
from tokenizers_offline import character_tokenizer

from latentmas_kernels import build_aligner, generate, latent_generate

TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '|' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
AGENTS = [
    Agent("planner", "Plan: {question}", latent_steps=4),
    Agent("critic", "{question} Criticise.", latent_steps=3),
    Agent("judger", "Answer: {question}", max_new_tokens=9),
]
QUESTIONS = ["Why?", "What is 12 times 7, and why is it so?", "Name a colour.", "x"]


@pytest.fixture
def model():
    """One that never stops, so that lengths are known."""
    endless = tiny_model("llama", max_position_embeddings=4096)
    endless.generation_config.eos_token_id = None
    return endless


@pytest.fixture
def tokenizer():
    tokenizer = character_tokenizer(TEMPLATE)
    assert len(tokenizer) <= VOCAB
    return tokenizer


@pytest.fixture
def calls(monkeypatch):
    """What the chain called, in order: (ids without padding, keyword arguments, result)."""
    seen = []

    def listen(name, function):
        def call(model, ids, mask, **options):
            out = function(model, ids, mask, **options)
            rows = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
            seen.append((rows, options, out))
            return out

        monkeypatch.setattr(chain_module, name, call)

    listen("latent_generate", latent_generate)
    listen("generate", generate)
    return seen


def prompts(tokenizer, agents, question):
    return [
        turn_ids(tokenizer, agent.prompt.replace("{question}", question), first=n == 0)
        for n, agent in enumerate(agents)
    ]


@pytest.mark.parametrize("aligner", ["ridge", "soft"])
@pytest.mark.parametrize("template", [TEMPLATE, None], ids=["chat", "plain"])
def test_each_question_gets_the_answer_it_gets_alone(model, aligner, template):
    chain = Chain(model, character_tokenizer(template), AGENTS, aligner=aligner)
    batch = chain.run(QUESTIONS).answers
    assert batch == [chain.run([question]).answers[0] for question in QUESTIONS]
    assert len(set(batch)) == len(QUESTIONS), "answers that are all alike show nothing"


@pytest.mark.parametrize("aligner", ["ridge", "identity", "soft"])
def test_chain_is_the_two_calls_in_a_row(model, tokenizer, aligner):
    """Answers and the memory left behind are those of latent_generate() and generate() called by hand."""
    result = Chain(model, tokenizer, AGENTS, aligner=aligner).run(QUESTIONS)
    rows = [prompts(tokenizer, AGENTS, question) for question in QUESTIONS]
    memory = None
    for turn, agent in enumerate(AGENTS[:-1]):
        ids, mask = padded([row[turn] for row in rows], "cpu")
        memory = latent_generate(
            model, ids, mask, latent_steps=agent.latent_steps, past_key_values=memory, aligner=aligner
        ).past_key_values
    ids, mask = padded([row[-1] for row in rows], "cpu")
    said = generate(model, ids, mask, past_key_values=memory, max_new_tokens=9)
    texts = [
        text.strip() for text in tokenizer.batch_decode(said.sequences[:, ids.shape[1] :], skip_special_tokens=True)
    ]
    assert result.answers == texts
    assert torch.equal(result.memory.lengths, said.past_key_values.lengths)
    for row, length in enumerate(result.memory.lengths.tolist()):
        assert torch.equal(result.memory.keys[:, row, :, :length], said.past_key_values.keys[:, row, :, :length])
        assert torch.equal(result.memory.values[:, row, :, :length], said.past_key_values.values[:, row, :, :length])


def test_memory_is_allocated_once_and_extended_in_place(model, tokenizer, calls):
    """One cache goes from agent to agent, as large as the longest row needs."""
    result = Chain(model, tokenizer, AGENTS, aligner="ridge").run(QUESTIONS)
    assert len(calls) == len(AGENTS)
    assert all(out.past_key_values is result.memory for _, _, out in calls)
    need = max(sum(map(len, prompts(tokenizer, AGENTS, question))) for question in QUESTIONS) + 4 + 3 + 9
    assert result.memory.capacity == need
    assert int(result.memory.lengths.max()) == need - 1, "all but the last new token, which is not fed in"


def test_segments_carry_names_and_kinds_in_order(model, tokenizer):
    agents = [AGENTS[0], Agent("reader", "Read: {question}", latent_steps=0), *AGENTS[1:]]
    memory = Chain(model, tokenizer, agents, aligner="ridge").run(QUESTIONS).memory
    assert [(segment.agent, segment.kind) for segment in memory.segments] == [
        ("planner", "prompt"), ("planner", "latent"), ("reader", "prompt"), ("critic", "prompt"), ("critic", "latent"),
        ("judger", "prompt"), ("judger", "text"),
    ]  # fmt: skip
    assert memory.segments[0].start == (0,) * len(QUESTIONS)
    for before, after in zip(memory.segments, memory.segments[1:], strict=False):
        assert before.stop == after.start
    assert list(memory.segments[-1].stop) == memory.lengths.tolist()


def test_turns_report_what_was_done(model, tokenizer):
    """Counts are summed over the questions, without padding; agents are told of as they begin."""
    began = []
    result = Chain(model, tokenizer, AGENTS, aligner="ridge").run(
        QUESTIONS, on_turn=lambda agent: began.append(agent.name)
    )
    rows = [prompts(tokenizer, AGENTS, question) for question in QUESTIONS]
    assert began == [turn.agent for turn in result.turns] == ["planner", "critic", "judger"]
    assert [turn.prompt_tokens for turn in result.turns] == [sum(len(row[n]) for row in rows) for n in range(3)]
    assert [turn.latent_steps for turn in result.turns] == [4 * 4, 4 * 3, 0]
    assert [turn.new_tokens for turn in result.turns] == [0, 0, 4 * 9]
    assert all(turn.seconds > 0 for turn in result.turns)


def test_answers_end_at_the_end_token(model, tokenizer):
    """What comes behind a row's end of sequence is neither in its answer nor counted."""
    chain = Chain(model, tokenizer, AGENTS, aligner="ridge")
    free = chain.run(QUESTIONS)
    texts = [tokenizer(answer, add_special_tokens=False).input_ids for answer in free.answers]
    end = texts[0][4]
    model.generation_config.eos_token_id = end
    result = chain.run(QUESTIONS)
    assert result.turns[-1].new_tokens < free.turns[-1].new_tokens
    for got, ids in zip(result.answers, texts, strict=True):
        kept = ids[: ids.index(end) + 1] if end in ids else ids
        assert got == tokenizer.decode(kept).strip()


def test_a_chain_of_one_only_answers(model, tokenizer):
    result = Chain(model, tokenizer, AGENTS[-1:], aligner="ridge").run(QUESTIONS)
    ids, mask = padded([turn_ids(tokenizer, f"Answer: {question}", first=True) for question in QUESTIONS], "cpu")
    said = generate(model, ids, mask, max_new_tokens=9).sequences[:, ids.shape[1] :]
    assert result.answers == [text.strip() for text in tokenizer.batch_decode(said, skip_special_tokens=True)]
    assert [turn.agent for turn in result.turns] == ["judger"]


def test_default_agents_run(model, tokenizer):
    """Planner, critic and refiner think the given steps, the judger writes up to the given length."""
    result = Chain(model, tokenizer, sequential(latent_steps=2, max_new_tokens=5), aligner="ridge").run(["How many?"])
    assert [(turn.agent, turn.latent_steps, turn.new_tokens) for turn in result.turns] == [
        ("planner", 2, 0), ("critic", 2, 0), ("refiner", 2, 0), ("judger", 0, 5),
    ]  # fmt: skip


def test_sampling_follows_the_seed(model, tokenizer):
    chain = Chain(model, tokenizer, AGENTS, aligner="ridge")

    def sample(seed):
        torch.manual_seed(seed)
        return chain.run(QUESTIONS, temperature=1.5).answers

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert chain.run(QUESTIONS).answers == chain.run(QUESTIONS).answers, "greedy"


def test_an_aligner_may_be_given_ready_made(model, tokenizer):
    soft = build_aligner(model, "soft")
    result = Chain(model, tokenizer, AGENTS, aligner=soft).run(QUESTIONS)
    assert result.aligner is soft
    assert result.answers == Chain(model, tokenizer, AGENTS, aligner="soft").run(QUESTIONS).answers


@pytest.mark.parametrize("question", ["{x}", "{", "}{0}", "Is {question} a question?", "{question!r:>10}"])
def test_braces_reach_the_model_as_they_are(model, tokenizer, calls, question):
    """Neither the question's braces nor those of an agent's prompt are taken for places to fill in."""
    agents = [Agent("planner", "Use {json: 1} for {question}.", latent_steps=1), AGENTS[-1]]
    Chain(model, tokenizer, agents, aligner="ridge").run([question])
    assert tokenizer.decode(calls[0][0][0]) == f"<user>Use {{json: 1}} for {question}.|<assistant>"
    assert tokenizer.decode(calls[1][0][0]) == f"|<user>Answer: {question}|<assistant>"


@pytest.mark.parametrize("template", [TEMPLATE, None], ids=["chat", "plain"])
def test_tokenizer_needs_no_padding_token(model, template):
    without = character_tokenizer(template, pad=False)
    assert without.pad_token is None
    answers = Chain(model, without, AGENTS, aligner="ridge").run(QUESTIONS).answers
    assert answers == Chain(model, character_tokenizer(template), AGENTS, aligner="ridge").run(QUESTIONS).answers


# ---- what is refused -----------------------------------------------------------------------------------------------


def test_too_long_chain_is_refused_before_any_work(tokenizer):
    """The message names the positions needed and those there are; no token goes through the model."""
    model = tiny_model("llama", max_position_embeddings=120)
    chain = Chain(model, tokenizer, AGENTS, aligner="ridge")
    forwards, began = [], []
    model.get_decoder().register_forward_hook(lambda *args: forwards.append(args))
    need = sum(map(len, prompts(tokenizer, AGENTS, QUESTIONS[1]))) + 4 + 3 + 9
    assert need > 121
    with pytest.raises(
        ValueError, match=rf"up to {need} positions.* made for 120; shorten the question or lower latent_steps"
    ):
        chain.run(QUESTIONS, on_turn=began.append)
    assert forwards == began == []
    chain.run([QUESTIONS[0]])
    assert len(forwards) > 0, "the short one fits"


@pytest.mark.parametrize("questions", [[], [""], ["Why?", " \n\t"]])
def test_empty_question_is_refused(model, tokenizer, calls, questions):
    with pytest.raises(ValueError, match="every question needs some text"):
        Chain(model, tokenizer, AGENTS, aligner="ridge").run(questions)
    assert calls == []


def test_negative_temperature_is_refused(model, tokenizer, calls):
    with pytest.raises(ValueError, match=r"temperature must be 0 \(greedy\) or more; got -0\.5"):
        Chain(model, tokenizer, AGENTS, aligner="ridge").run(QUESTIONS, temperature=-0.5)
    assert calls == []


@pytest.mark.parametrize(
    "agents",
    [[], AGENTS[:2], [*AGENTS, AGENTS[0]], [AGENTS[2], AGENTS[0]], [AGENTS[2], AGENTS[2]]],
    ids=["none", "no judger", "thinker last", "judger first", "two judgers"],
)
def test_agents_out_of_order_are_refused(model, tokenizer, agents):
    with pytest.raises(ValueError, match=r"agents that think \(latent_steps\) followed by one that answers"):
        Chain(model, tokenizer, agents, aligner="ridge")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either latent_steps .* or max_new_tokens .*latent_steps=None, max_new_tokens=None"),
        ({"latent_steps": 3, "max_new_tokens": 5}, "either .*latent_steps=3, max_new_tokens=5"),
        ({"latent_steps": 0, "max_new_tokens": 0}, "either .*latent_steps=0, max_new_tokens=0"),
        ({"latent_steps": -1}, "latent_steps must be 0 or more; got -1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more; got 0"),
    ],
)
def test_agent_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=f"agent 'critic'.*{message}"):
        Agent("critic", "{question}", **options)


def test_one_string_is_not_taken_for_many_questions(model, tokenizer, calls):
    """A string is a sequence of strings; its letters are no questions."""
    with pytest.raises((ValueError, TypeError), match="list|sequence"):
        Chain(model, tokenizer, AGENTS, aligner="ridge").run("Why?")
    assert calls == []


# ---- the default model ---------------------------------------------------------------------------------------------


@pytest.mark.real_model
@torch.no_grad()
def test_default_model_equals_plain_loop(default_model, default_tokenizer, calls):
    """The whole chain of four on a real model says, token for token, what the plain loop says."""
    agents, question = sequential(latent_steps=4, max_new_tokens=12), "How many legs do two cats have?"
    result = Chain(default_model, default_tokenizer, agents, aligner="identity").run([question])
    alone = PlainLoop(default_model, feed_back(default_model, "identity"))
    turns = [torch.tensor([ids]) for ids in prompts(default_tokenizer, agents, question)]
    for ids in turns[:-1]:
        alone.think(ids, 4)
    want = alone.speak(turns[-1], 12)
    end = default_model.generation_config.eos_token_id
    want = want[: want.index(end) + 1] if end in want else want
    assert calls[-1][2].sequences[0, turns[-1].shape[1] :].tolist() == want
    assert result.answers == [default_tokenizer.decode(want, skip_special_tokens=True).strip()]
    assert [turn.prompt_tokens for turn in result.turns] == [ids.shape[1] for ids in turns]
