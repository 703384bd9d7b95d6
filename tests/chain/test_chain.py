"""Chain: a batch of questions through agents that think and agents that write, against the two calls it is made of."""

import warnings

import latentmas.chain.planner
import latentmas.chain.setup
import pytest
import torch
from example_chains import (
    AGENTS,
    CHAINS,
    FIRST,
    JUDGER,
    MIXED,
    QUESTIONS,
    READERS,
    SWITCH,
    TEMPLATE,
    assert_same_memory,
    endless,
    prompts,
    texts_of,
)
from latentmas.chain.agent import Agent
from latentmas.chain.chain import Chain
from latentmas.chain.prompts import padded, turn_ids
from latentmas.chain_files.reader import METHODS, latent_agents, serial
from tiny_models import PlainLoop, feed_back, tiny_model
from tokenizers_offline import character_tokenizer

from latentmas_kernels import build_aligner, generate, latent_generate

pytestmark = pytest.mark.usefixtures("keys_are_moved_by_torch")


@pytest.mark.parametrize("template", [TEMPLATE, None], ids=["chat", "plain"])
@pytest.mark.parametrize("aligner", ["ridge", "soft"])
@pytest.mark.parametrize("chain", CHAINS)
def test_each_question_gets_the_answer_it_gets_alone(model, chain, aligner, template):
    """And the same turns: prompts, latent steps and texts."""
    chain = Chain(model, character_tokenizer(template), CHAINS[chain], aligner=aligner)
    batch = chain.run(QUESTIONS).answers
    assert batch == [chain.run([question]).answers[0] for question in QUESTIONS]
    texts = {tuple(turn.text for turn in answer.turns) for answer in batch}
    assert len(texts) == len(QUESTIONS), "answers that are all alike show nothing"


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
    texts = tokenizer.batch_decode(said.sequences[:, ids.shape[1] :], skip_special_tokens=True)
    assert texts_of(result) == [text.strip() for text in texts]
    assert_same_memory(result.memory, said.past_key_values)


def test_memory_is_allocated_once_and_extended_in_place(model, tokenizer, calls):
    """One cache goes from agent to agent; the longest row fills it if its text is never stopped."""
    result = Chain(model, tokenizer, AGENTS, aligner="ridge").run(QUESTIONS)
    assert len(calls) == len(AGENTS)
    assert all(out.past_key_values is result.memory for _, _, out in calls)
    need = max(sum(map(len, prompts(tokenizer, AGENTS, question))) for question in QUESTIONS) + 4 + 3 + 9
    assert result.memory.capacity == need - 1, "the last new token is not fed in"
    assert int(result.memory.lengths.max()) == need - 1


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


def test_answers_end_at_the_end_token(model, tokenizer, calls):
    """What comes behind a row's end of sequence is neither in its answer nor counted; the end itself is counted."""
    chain = Chain(model, tokenizer, AGENTS, aligner="ridge")
    chain.run(QUESTIONS)
    free = calls[-1][2].sequences[:, -9:].tolist()
    end = free[0][4]
    model.generation_config.eos_token_id = end
    result = chain.run(QUESTIONS)
    kept = [ids[: ids.index(end) + 1] if end in ids else ids for ids in free]
    shown = [ids[:-1] if ids[-1] == end else ids for ids in kept]
    assert texts_of(result) == [tokenizer.decode(ids).strip() for ids in shown]
    assert [answer.turns[-1].new_tokens for answer in result.answers] == [len(ids) for ids in kept]
    assert result.agents[-1].new_tokens == sum(map(len, kept)) < 4 * 9
    reasons = ["stop" if ids[-1] == end else "length" for ids in kept]
    assert [answer.finish_reason for answer in result.answers] == reasons
    assert set(reasons) == {"stop", "length"}


def test_a_chain_of_one_only_answers(model, tokenizer):
    result = Chain(model, tokenizer, AGENTS[-1:]).run(QUESTIONS)
    ids, mask = padded([turn_ids(tokenizer, f"Answer: {question}", first=True) for question in QUESTIONS], "cpu")
    said = generate(model, ids, mask, max_new_tokens=9).sequences[:, ids.shape[1] :]
    assert texts_of(result) == [text.strip() for text in tokenizer.batch_decode(said, skip_special_tokens=True)]
    assert [metrics.agent for metrics in result.agents] == ["judger"]


def test_without_a_thinker_there_is_no_aligner(model, tokenizer, monkeypatch):
    """It is not even built: that may mean a solve, or text that the model writes."""
    monkeypatch.setattr("latentmas.chain.chain.build_aligner", lambda *_: pytest.fail("built"))
    chain = Chain(model, tokenizer, READERS, aligner="soft")
    assert chain.aligner is None
    assert chain.run(QUESTIONS[:1]).aligner is None


@pytest.mark.parametrize("method", METHODS)
def test_methods_run_as_they_are(model, tokenizer, method):
    """Every agent thinks the given steps or writes up to the given length, and none of the prompts is odd."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = Chain(model, tokenizer, METHODS[method](2, 5), aligner="ridge").run(["How many?"])
    agents = serial(METHODS[method](2, 5))
    kinds = [(agent.name, agent.latent_steps or 0, agent.max_new_tokens or 0) for agent in agents]
    assert [(agent.agent, agent.latent_steps, agent.new_tokens) for agent in result.agents] == kinds


def test_sampling_follows_the_seed(model, tokenizer):
    chain = Chain(model, tokenizer, AGENTS, aligner="ridge")

    def sample(seed):
        torch.manual_seed(seed)
        return texts_of(chain.run(QUESTIONS, temperature=1.5))

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert texts_of(chain.run(QUESTIONS)) == texts_of(chain.run(QUESTIONS)), "greedy"


def test_sampling_goes_by_temperature_and_top_p_alone(model, tokenizer, calls):
    """No top-k of a library's making; at a top_p that holds one token, what is sampled is what greedy takes."""
    chain = Chain(model, tokenizer, MIXED, aligner="ridge")
    torch.manual_seed(0)
    narrow = chain.run(QUESTIONS, temperature=1.3, top_p=1e-6)
    for _, options, _ in (call for call in calls if "top_p" in call[1]):
        assert (options["do_sample"], options["temperature"], options["top_p"]) == (True, 1.3, 1e-6)
        assert options["top_k"] is None
    assert texts_of(narrow) == texts_of(chain.run(QUESTIONS))


def test_an_aligner_may_be_given_ready_made(model, tokenizer):
    soft = build_aligner(model, "soft")
    result = Chain(model, tokenizer, AGENTS, aligner=soft).run(QUESTIONS)
    assert result.aligner is soft
    assert result.answers == Chain(model, tokenizer, AGENTS, aligner="soft").run(QUESTIONS).answers


@pytest.mark.parametrize("question", ["{x}", "{", "}{0}", "Is {question} a question?", "{notes}", "{question!r:>10}"])
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


def test_system_message_and_thinking_switch_are_those_of_each_agent(model, calls):
    """A system message where the agent begins a memory, in front of the text elsewhere; the switch per turn."""
    tokenizer = character_tokenizer(TEMPLATE + SWITCH)
    agents = [
        Agent("planner", "Plan: {question}", latent_steps=1, system="Be brief.", enable_thinking=True),
        Agent("critic", "Criticise.", max_new_tokens=2, system="Be harsh."),
        Agent("judger", "{notes} Answer.", max_new_tokens=2, system="Be right.", enable_thinking=True),
    ]
    Chain(model, tokenizer, agents, aligner="ridge").run(["Why?"])
    first, second, third = (tokenizer.decode(rows[0]) for rows, _, _ in calls)
    assert first == "<system>Be brief.|<user>Plan: Why?|<assistant><think>"
    assert second == "|<user>Be harsh.\n\nCriticise.|<assistant>"
    assert third.startswith("<system>Be right.|<user>critic:\n")
    assert third.endswith(" Answer.|<assistant><think>")


@pytest.mark.parametrize("edit", ["layer", "window"])
def test_a_model_that_was_edited_between_two_runs_runs_as_it_is(monkeypatch, tokenizer, edit):
    """Also where the beginning that two questions have in common is read once."""
    monkeypatch.setattr(latentmas.chain.planner, "SHARE_FROM", 1)
    questions = ["How many are there in all, and why?", "How many are there in all, and who?"]

    def texts(chain):
        return [answer.text for answer in chain.run(questions).answers]

    model = tiny_model("mistral-window", max_position_embeddings=4096)
    model.generation_config.eos_token_id = None
    chain = Chain(model, tokenizer, AGENTS, aligner="identity")
    before = texts(chain)
    if edit == "layer":
        del model.model.layers[1]
        model.config.num_hidden_layers -= 1
    else:
        model.config.sliding_window = 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as that another engine runs it
        after = texts(chain)
    assert after != before
    assert after == texts(Chain(model, tokenizer, AGENTS, aligner="identity"))


# ---- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("questions", [[], [""], ["Why?", " \n\t"]])
def test_empty_question_is_refused(model, tokenizer, calls, questions):
    chain = Chain(model, tokenizer, AGENTS, aligner="ridge")
    with pytest.raises(ValueError, match="every question needs some text"):
        chain.run(questions)
    for question in questions[-1:]:
        with pytest.raises(ValueError, match="every question needs some text"):
            chain.check(question)
    assert calls == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -0.5}, r"temperature must be 0 \(greedy\) or more; got -0\.5"),
        ({"temperature": float("inf")}, "temperature must be .*; got inf"),
        ({"temperature": float("nan")}, "temperature must be .*; got nan"),
        ({"top_p": 0.0}, r"top_p must be more than 0 and at most 1 \(off\); got 0\.0"),
        ({"top_p": -0.1}, r"top_p must be .*; got -0\.1"),
        ({"top_p": 1.5}, r"top_p must be .*; got 1\.5"),
        ({"top_p": float("nan")}, "top_p must be .*; got nan"),
    ],
)
def test_bad_sampling_options_are_refused(model, tokenizer, calls, options, words):
    with pytest.raises(ValueError, match=words):
        Chain(model, tokenizer, AGENTS, aligner="ridge").run(QUESTIONS, **options)
    assert calls == []


@pytest.mark.parametrize("agents", [[FIRST, AGENTS[2]], [FIRST, *AGENTS], [AGENTS[0], FIRST, READERS[2]]])
def test_writers_may_come_anywhere(model, tokenizer, agents):
    result = Chain(model, tokenizer, agents, aligner="ridge").run(["Why?"])
    assert [turn.agent for turn in result.answers[0].turns] == [agent.name for agent in agents]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_note_tokens": 0}, "max_note_tokens must be 1 or more; got 0"),
        ({"engine": "warp"}, "engine='warp'; supported are 'auto', 'eager'"),
        ({"aligner": "magic"}, "aligner='magic'"),
    ],
)
def test_bad_options_are_refused_as_the_chain_is_made(model, tokenizer, options, words):
    with pytest.raises(ValueError, match=words):
        Chain(model, tokenizer, AGENTS, **options)


def test_one_string_is_not_taken_for_many_questions(model, tokenizer, calls):
    """A string is a sequence of strings; its letters are no questions."""
    with pytest.raises(ValueError, match="must be a list of strings; got one string: put it into a list"):
        Chain(model, tokenizer, AGENTS, aligner="ridge").run("Why?")
    assert calls == []


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Agent("a", "x", latent_steps=1.5), "latent_steps must be an integer of 0 or more; got 1.5"),
        (lambda: Agent("a", "x", latent_steps=1, memory="last"), r"memory must be a MemoryPolicy, .*; got 'last'"),
        (
            lambda: Chain(endless(), character_tokenizer(None), [JUDGER], budget=64),
            "budget must be a Budget, .*; got int",
        ),
        (lambda: Chain(endless(), character_tokenizer(None), [JUDGER], budget="64"), "got a budget of '64'"),
    ],
)
def test_values_of_other_types_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_half_a_character_in_a_question_is_named(model, tokenizer):
    chain = Chain(model, tokenizer, [JUDGER])
    with pytest.raises(ValueError, match=r"^question 2 holds '\\ud83d' at character 5, half a surrogate pair"):
        chain.run(["Why?", "Why \ud83d"])


@pytest.mark.parametrize("template", [TEMPLATE, None], ids=["chat", "plain"])
def test_thinking_that_cannot_be_switched_on_is_warned_of_once(model, template):
    """As the chain is made, however many of its agents ask for it; nothing is said where the template has the switch."""
    thinking = [
        Agent("scout", "Look: {question}", max_new_tokens=2, enable_thinking=True),
        Agent("judger", "Answer.", max_new_tokens=2, enable_thinking=True),
    ]
    with pytest.warns(
        UserWarning, match="has no thinking switch, so enable_thinking .--think. changes nothing"
    ) as caught:
        chain = Chain(model, character_tokenizer(template), thinking)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chain.run(QUESTIONS)
        Chain(model, character_tokenizer(template), AGENTS, aligner="ridge")
        Chain(model, character_tokenizer(TEMPLATE + SWITCH), thinking).run(QUESTIONS)


# ---- the default model ------------------------------------------------------------------------------------------------


@pytest.mark.real_model
@torch.no_grad()
def test_default_model_equals_plain_loop(default_model, default_tokenizer, calls):
    """The whole chain of four on a real model says, token for token, what the plain loop says."""
    agents, question = latent_agents(latent_steps=4, max_new_tokens=12), "How many legs do two cats have?"
    result = Chain(default_model, default_tokenizer, agents, aligner="identity").run([question])
    alone = PlainLoop(default_model, feed_back(default_model, "identity"))
    turns = [torch.tensor([ids]) for ids in prompts(default_tokenizer, agents, question)]
    for ids in turns[:-1]:
        alone.run_latent(ids, 4)
    want = alone.decode(turns[-1], 12)
    end = default_model.generation_config.eos_token_id
    want = want[: want.index(end) + 1] if end in want else want
    assert calls[-1][2].sequences[0, turns[-1].shape[1] :].tolist() == want
    assert texts_of(result) == [default_tokenizer.decode(want, skip_special_tokens=True).strip()]
    assert [turn.prompt_tokens for turn in result.answers[0].turns] == [ids.shape[1] for ids in turns]
