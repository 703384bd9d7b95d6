"""Chain: a batch of questions through agents that think and agents that write, against the two calls it is made of."""

import json
import time
import warnings
from bisect import bisect_left
from dataclasses import replace
from types import SimpleNamespace

import latentmas.chain.planner
import latentmas.chain.setup
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from latentmas.chain import stage_run as chain_module
from latentmas.chain.agent import Agent
from latentmas.chain.chain import Chain
from latentmas.chain.planner import RESPLIT
from latentmas.chain.prompts import padded, turn_ids
from latentmas.chain.results import AgentMetrics
from latentmas.chain_files.methods import METHODS, latent_agents
from latentmas.chain_files.reader import serial
from tiny_models import VOCAB, PlainLoop, feed_back, tiny_model
from tokenizers import models
from tokenizers_offline import CHARACTERS, SPECIAL, character_tokenizer, with_tokens
from transformers import LogitsProcessor, LogitsProcessorList

from latentmas_kernels import LatentCache, build_aligner, generate, generation, latent_generate
from latentmas_kernels.engines import EagerEngine

pytestmark = pytest.mark.usefixtures("keys_are_moved_by_torch")
TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '|' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
SWITCH = "{% if enable_thinking %}{{ '<think>' }}{% endif %}"
AGENTS = [
    Agent("planner", "Plan: {question}", latent_steps=4),
    Agent("critic", "{question} Criticise.", latent_steps=3),
    Agent("judger", "Answer: {question}", max_new_tokens=9),
]
# Each reads in a memory of its own what was written before it.
READERS = [
    Agent("scout", "Look: {question}", max_new_tokens=6),
    Agent("critic", "{question} Notes: {notes} Criticise.", max_new_tokens=5),
    Agent("judger", "{notes} Answer: {question}", max_new_tokens=9),
]
# Thoughts and texts take turns in one memory.
MIXED = [
    Agent("planner", "Plan: {question}", latent_steps=4),
    Agent("critic", "Criticise.", max_new_tokens=6),
    Agent("refiner", "Refine: {question}", latent_steps=3),
    Agent("judger", "Answer: {question}", max_new_tokens=9),
]
FIRST = replace(AGENTS[2], name="first")
CHAINS = {"alone": AGENTS[-1:], "thinkers": AGENTS, "readers": READERS, "mixed": MIXED}
QUESTIONS = ["Why?", "What is 12 times 7, and why is it so?", "Name a colour.", "x"]
PER_SLOT = 2 * 3 * 2 * 16 * 4  # keys and values, layers, heads, width, bytes


@pytest.fixture
def model():
    """One that never stops, so that lengths are known."""
    return endless(4096)


@pytest.fixture
def tokenizer():
    tokenizer = character_tokenizer(TEMPLATE)
    assert len(tokenizer) <= VOCAB
    return tokenizer


@pytest.fixture
def calls(monkeypatch):
    """What the chain called, in order: (ids without padding, keyword arguments, result). Nothing is read for several rows."""
    seen = []
    monkeypatch.setattr(latentmas.chain.planner, "SHARE_FROM", 10**9)

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


class Forced(LogitsProcessor):
    """Has each row say the given tokens, and then "x" for ever."""

    def __init__(self, rows):
        self.rows, self.step = rows, 0

    def __call__(self, ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        for row, tokens in enumerate(self.rows):
            forced[row, tokens[self.step] if self.step < len(tokens) else len(SPECIAL) + CHARACTERS.index("x")] = 0
        self.step += 1
        return forced


@pytest.fixture
def script(monkeypatch, model, tokenizer):
    """script([text of row 1, text of row 2], ...) has the writers say these texts, one list per writer; <eos> ends one."""

    def say(*texts):
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        coming, call = iter(texts), chain_module.generate

        def forced(model, ids, mask, **options):
            rows = [
                tokenizer(text, add_special_tokens=False).input_ids if isinstance(text, str) else text
                for text in next(coming)
            ]
            return call(model, ids, mask, **options, logits_processor=LogitsProcessorList([Forced(rows)]))

        monkeypatch.setattr(chain_module, "generate", forced)

    return say


def endless(positions):
    model = tiny_model("llama", max_position_embeddings=positions)
    model.generation_config.eos_token_id = None
    return model


def prompts(tokenizer, agents, question):
    """Of agents in one memory."""
    return [turn_ids(tokenizer, agent.text(question), first=turn == 0) for turn, agent in enumerate(agents)]


def by_hand(model, tokenizer, agents, questions):
    """The chain written out as calls that leave each other's memory alone: (ids per row, result) of each agent."""
    done, memory = [], None
    nothing = [[] for _ in questions]
    notes, pending = [[] for _ in questions], nothing
    for agent in agents:
        if agent.reads_notes:
            memory, pending = None, nothing
        rows = [
            last + turn_ids(tokenizer, agent.text(question, "\n\n".join(note)), first=memory is None)
            for question, note, last in zip(questions, notes, pending, strict=True)
        ]
        ids, mask = padded(rows, "cpu")
        if agent.latent_steps is not None:
            out = latent_generate(
                model, ids, mask, latent_steps=agent.latent_steps, past_key_values=memory, aligner="ridge"
            )
            pending = nothing
        else:
            out = generate(model, ids, mask, past_key_values=memory, max_new_tokens=agent.max_new_tokens)
            texts = written(out, ids.shape[1])
            pending = [
                text[-1:] if reason == "length" else [] for text, reason in zip(texts, out.finish_reasons, strict=True)
            ]
            for note, text in zip(notes, texts, strict=True):
                note.append(noted(agent, tokenizer.decode(text, skip_special_tokens=True).strip()))
        memory = out.past_key_values
        done.append((rows, out))
    return done


def noted(agent, text):
    return f"{agent.name}:\n{text or '(nothing)'}"


def written(out, columns):
    """Token ids that each row wrote behind a prompt of so many columns."""
    return [row[columns : columns + new].tolist() for row, new in zip(out.sequences, out.new_tokens, strict=True)]


def texts_of(result):
    return [answer.text for answer in result.answers]


def assert_same_memory(got, want):
    assert torch.equal(got.lengths, want.lengths)
    for row, length in enumerate(want.lengths.tolist()):
        assert torch.equal(got.keys[:, row, :, :length], want.keys[:, row, :, :length])
        assert torch.equal(got.values[:, row, :, :length], want.values[:, row, :, :length])


@pytest.mark.parametrize("template", [TEMPLATE, None], ids=["chat", "plain"])
@pytest.mark.parametrize("aligner", ["ridge", "soft"])
@pytest.mark.parametrize("chain", CHAINS)
def test_each_question_gets_the_answer_it_gets_alone(model, chain, aligner, template):
    """And the same turns: what was read, thought and written."""
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


# ---- agents that read notes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [TEMPLATE, None], ids=["chat", "plain"])
def test_readers_get_the_notes_and_nothing_else(model, template, calls):
    """Each is generate() on its prompt with the texts so far, in a fresh memory, although no text came to an end."""
    tokenizer = character_tokenizer(template)
    result = Chain(model, tokenizer, READERS).run(QUESTIONS)
    notes = [[] for _ in QUESTIONS]
    for number, (agent, (rows, _, out)) in enumerate(zip(READERS, calls, strict=True)):
        want = [
            turn_ids(tokenizer, agent.text(question, "\n\n".join(note)), first=True)
            for question, note in zip(QUESTIONS, notes, strict=True)
        ]
        assert rows == want
        ids, mask = padded(want, "cpu")
        said = written(generate(model, ids, mask, max_new_tokens=agent.max_new_tokens), ids.shape[1])
        texts = [tokenizer.decode(text, skip_special_tokens=True).strip() for text in said]
        assert [answer.turns[number].text for answer in result.answers] == texts
        assert out.past_key_values.lengths.tolist() == [len(row) + agent.max_new_tokens - 1 for row in want]
        assert out.past_key_values.capacity == int(out.past_key_values.lengths.max())
        assert {segment.agent for segment in out.past_key_values.segments} == {agent.name}
        for note, text in zip(notes, texts, strict=True):
            note.append(noted(agent, text))
    assert texts_of(result) == texts
    assert len({id(out.past_key_values) for _, _, out in calls}) == len(READERS)
    assert result.memory is calls[-1][2].past_key_values


def test_only_texts_are_notes_and_an_empty_one_says_so(model, tokenizer, calls, script):
    """A thinker leaves none; a writer in the middle of a memory does; a reader may think, and be gone on from."""
    script(["yes<eos>", "<eos>"], ["ab<eos>", "  c <eos>"], ["done<eos>", "end<eos>"])
    agents = [
        Agent("planner", "Plan.", latent_steps=1),
        Agent("critic", "Criticise.", max_new_tokens=9),
        Agent("doubter", "Doubt.", max_new_tokens=9),
        Agent("reader", "Read: {notes} Question: {question}", latent_steps=2),
        Agent("judger", "Answer.", max_new_tokens=9),
    ]
    result = Chain(model, tokenizer, agents, aligner="ridge").run(["Why?", "x"])
    assert [tokenizer.decode(row) for row in calls[3][0]] == [
        "<user>Read: critic:\nyes\n\ndoubter:\nab Question: Why?|<assistant>",
        "<user>Read: critic:\n(nothing)\n\ndoubter:\nc Question: x|<assistant>",
    ]
    assert calls[3][2].past_key_values is calls[4][2].past_key_values is result.memory
    assert calls[2][2].past_key_values is not result.memory
    assert texts_of(result) == ["done", "end"]


def test_notes_may_hold_any_braces(model, tokenizer, calls, script):
    script(["{question}{notes}{<eos>"], ["ab<eos>"])
    agents = [
        Agent("scout", "Look: {question}", max_new_tokens=30),
        Agent("judger", "{notes} {question}", max_new_tokens=9),
    ]
    Chain(model, tokenizer, agents).run(["Why?"])
    assert tokenizer.decode(calls[1][0][0]) == "<user>scout:\n{question}{notes}{ Why?|<assistant>"


def test_a_visible_chain_of_thought_is_no_part_of_notes_and_answer(model, tokenizer, calls, script):
    """Turns keep it. One that does not end is all there is."""
    said = ["<think>so so</think>\n yes<eos>", "a</think>b</think>c<eos>", "<think>hm<eos>", "a</think><eos>"]
    script(said, said)
    agents = [Agent("scout", "Look: {question}", max_new_tokens=40), Agent("judger", "{notes}", max_new_tokens=40)]
    result = Chain(model, tokenizer, agents).run(QUESTIONS)
    kept = ["yes", "c", "<think>hm", ""]
    assert texts_of(result) == kept
    notes = [f"<user>scout:\n{text or '(nothing)'}|<assistant>" for text in kept]
    assert [tokenizer.decode(row) for row in calls[1][0]] == notes
    whole = [text.removesuffix("<eos>") for text in said]
    for turn in range(2):
        assert [answer.turns[turn].text for answer in result.answers] == whole


# ---- texts that are too long to be handed on -----------------------------------------------------------------------


def test_long_texts_are_cut_by_tokens_and_it_is_said(model, tokenizer, calls, script):
    """One warning per agent and question, with both numbers; the last agent's text and short ones stay whole."""
    long, short, full = "abcdefghij", "abc<eos>", "abcdefg"
    script([long, short, full + "<eos>"], [short, long, long], [long, long, long])
    agents = [
        Agent("scout", "Look: {question}", max_new_tokens=10),
        Agent("critic", "{notes}", max_new_tokens=10),
        Agent("judger", "{notes}", max_new_tokens=10),
    ]
    questions = ["Why?", "What?", "w" * 100]
    with pytest.warns(UserWarning, match="max_note_tokens") as caught:
        result = Chain(model, tokenizer, agents, max_note_tokens=7).run(questions)
    says = "{} wrote 10 tokens, of which the agents after it read the first 7; raise max_note_tokens to hand on more"
    assert [str(warning.message) for warning in caught] == [
        f"{says.format('scout')} (question: 'Why?')",
        f"{says.format('critic')} (question: 'What?')",
        f"{says.format('critic')} (question: '{'w' * 60}')",
    ]
    assert {warning.filename for warning in caught} == {__file__}
    cut = "abcdefg [...]"
    assert [tokenizer.decode(row) for row in calls[1][0]] == [
        f"<user>scout:\n{text}|<assistant>" for text in (cut, "abc", full)
    ]
    assert [tokenizer.decode(row) for row in calls[2][0]] == [
        f"<user>scout:\n{first}\n\ncritic:\n{second}|<assistant>"
        for first, second in [(cut, "abc"), ("abc", cut), (full, cut)]
    ]
    handed = [[turn.truncated_to for turn in answer.turns] for answer in result.answers]
    assert handed == [[7, None, None], [None, 7, None], [None, 7, None]]
    assert result.answers[0].turns[0].text == long, "a turn keeps all of it"
    assert texts_of(result) == [long] * 3


def test_what_nobody_reads_as_notes_is_not_cut(model, tokenizer, script):
    """Agents in the same memory have the whole text there."""
    script(["abcdefghij"], ["abcdefghij"])
    agents = [Agent("scout", "Look: {question}", max_new_tokens=10), Agent("judger", "Answer.", max_new_tokens=10)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = Chain(model, tokenizer, agents, max_note_tokens=3).run(["Why?"])
    assert [turn.truncated_to for turn in result.answers[0].turns] == [None, None]


def test_only_what_is_handed_on_counts_against_the_limit(model, tokenizer, calls, script):
    """Neither a chain of thought that is taken off, nor another split of a text that was written in few tokens."""
    # "th" is a token that can be written but is never read: the tokenizer splits into characters.
    th = len(SPECIAL) + len(CHARACTERS)
    vocab = {token: index for index, token in enumerate([*SPECIAL, *CHARACTERS, "th"])}
    tokenizer.backend_tokenizer.model = models.WordLevel(vocab, unk_token="<unk>")
    script(["abcdefgh</think>ab<eos>", [th] * 6 + [tokenizer.eos_token_id]], ["ab<eos>", "ab<eos>"])
    agents = [Agent("scout", "Look: {question}", max_new_tokens=40), Agent("judger", "{notes}", max_new_tokens=9)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Chain(model, tokenizer, agents, max_note_tokens=7).run(["Why?", "x"])
    assert [tokenizer.decode(row) for row in calls[1][0]] == [
        f"<user>scout:\n{text}|<assistant>" for text in ("ab", "th" * 6)
    ]


# ---- texts in the middle of a memory -------------------------------------------------------------------------------


def test_thoughts_and_texts_take_turns_in_one_memory(model, tokenizer, calls, monkeypatch):
    """The calls by hand, in one buffer that nobody allocates again. Some texts end by themselves, some by length."""
    free = by_hand(model, tokenizer, MIXED, QUESTIONS)
    early, late = (written(out, max(map(len, rows))) for rows, out in (free[1], free[3]))
    ends = [
        token
        for token in early[0][:-1]
        if any(token not in text for text in early) and any(token not in text for text in late)
    ]
    for end in (None, ends[0]):
        model.generation_config.eos_token_id = end
        want = by_hand(model, tokenizer, MIXED, QUESTIONS)
        chain = Chain(model, tokenizer, MIXED, aligner="ridge")
        calls.clear()
        made = []
        with monkeypatch.context() as patch:
            patch.setattr(LatentCache, "__init__", counted(LatentCache.__init__, made))
            result = chain.run(QUESTIONS)
        assert len(made) == 1
        assert all(out.past_key_values is result.memory for _, _, out in calls)
        assert [rows for rows, _, _ in calls] == [rows for rows, _ in want]
        for turn in (1, 3):
            got, by_hands = calls[turn][2], want[turn][1]
            assert (got.new_tokens, got.finish_reasons) == (by_hands.new_tokens, by_hands.finish_reasons)
            assert torch.equal(got.sequences, by_hands.sequences)
        assert_same_memory(result.memory, want[-1][1].past_key_values)
        reasons = {answer.turns[1].finish_reason for answer in result.answers}
        assert reasons == ({"length"} if end is None else {"stop", "length"})
        for row, answer in enumerate(result.answers):
            fed = sum(turn.prompt_tokens + turn.latent_steps + max(turn.new_tokens - 1, 0) for turn in answer.turns)
            assert int(result.memory.lengths[row]) == fed
        if end is None:
            assert int(result.memory.lengths.max()) == result.memory.capacity


def counted(function, made):
    def call(*arguments, **options):
        made.append(options)
        return function(*arguments, **options)

    return call


def test_a_text_cut_by_its_length_brings_its_last_token_with_the_next_turn(model, tokenizer, calls, script):
    """It was not fed in. The end token of a text that stopped is left out: the template closes the turn."""
    script(["abcdef", "abc<eos>", "abcde<eos>"], ["yes<eos>", "no", "no"])
    result = Chain(model, tokenizer, MIXED, aligner="ridge").run(["Why?", "x", "y"])
    assert [tokenizer.decode(row) for row in calls[2][0]] == [
        "f|<user>Refine: Why?|<assistant>", "|<user>Refine: x|<assistant>", "|<user>Refine: y|<assistant>",
    ]  # fmt: skip
    assert [tokenizer.decode(row) for row in calls[3][0]] == [
        f"|<user>Answer: {question}|<assistant>" for question in ("Why?", "x", "y")
    ], "brought once"
    assert [answer.turns[2].prompt_tokens for answer in result.answers] == [len(row) for row in calls[2][0]]
    assert [answer.turns[1].finish_reason for answer in result.answers] == ["length", "stop", "stop"]


CHATML = (
    "{% for message in messages %}{{ '(' + message['role'] + ')' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '(assistant)' }}{% endif %}"
)


@pytest.mark.parametrize("special", [True, False], ids=["special", "not special"])
@pytest.mark.parametrize("named", [True, False], ids=["one more end", "no end"])
def test_texts_end_where_the_template_ends_a_turn(model, tokenizer, calls, script, named, special):
    """Whatever generation_config says; what it names ends texts too. No text holds its end, and the next turn brings it."""
    with_tokens(tokenizer, "<|im_end|>", special=special).chat_template = CHATML
    script(["abc<|im_end|>", "ab<eos>", "abcdef"], ["yes<|im_end|>", "no<eos>", "x<|im_end|>"])
    if not named:
        model.generation_config.eos_token_id = None
    agents = [Agent("writer", "Say {question}", max_new_tokens=6), Agent("judger", "Answer.", max_new_tokens=5)]
    chain = Chain(model, tokenizer, agents)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert chain.setup.model_contexts[None].end_ids == ((tokenizer.eos_token_id,) if named else ()) + (end,)
    result = chain.run(["Why?", "x", "y"])
    turns = [answer.turns for answer in result.answers]
    beyond = "" if named else "xxx"  # <eos> is special, and is not shown
    assert [turn[0].text for turn in turns] == ["abc", f"ab{beyond}", "abcdef"]
    assert [turn[1].text for turn in turns] == ["yes", f"no{beyond[1:]}", "x"]
    assert [turn[0].new_tokens for turn in turns] == [4, 3 if named else 6, 6]
    assert [turn[1].finish_reason for turn in turns] == ["stop", "stop" if named else "length", "stop"]
    pending = ["", "" if named else "x", "f"]
    assert [tokenizer.decode(row) for row in calls[1][0]] == [
        f"{token}<|im_end|>\n(user)Answer.<|im_end|>\n(assistant)" for token in pending
    ]


def test_notes_do_not_hold_the_end_of_a_text(model, tokenizer, calls, script):
    with_tokens(tokenizer, "<|im_end|>", special=False).chat_template = CHATML
    script(["abc<|im_end|>"], ["<|im_end|>"])
    agents = [Agent("writer", "Say {question}", max_new_tokens=6), Agent("judger", "{notes} Answer.", max_new_tokens=5)]
    answer = Chain(model, tokenizer, agents).run(["Why?"]).answers[0]
    assert tokenizer.decode(calls[1][0][0]) == "(user)writer:\nabc Answer.<|im_end|>\n(assistant)"
    assert answer.text == ""


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


def test_text_behind_text_is_what_one_plain_loop_says(model, tokenizer):
    """Every position of [thinker, writer, thinker, writer], one after the other."""
    result = Chain(model, tokenizer, MIXED, aligner="identity").run(["How many?"])
    alone = PlainLoop(model, feed_back(model, "identity"))
    first, second, third, fourth = prompts(tokenizer, MIXED, "How many?")
    with torch.no_grad():
        alone.run_latent(torch.tensor([first]), 4)
        said = alone.decode(torch.tensor([second]), 6)
        alone.run_latent(torch.tensor([said[-1:] + third]), 3)
        answer = alone.decode(torch.tensor([fourth]), 9)
    turns = result.answers[0].turns
    assert turns[1].text == tokenizer.decode(said, skip_special_tokens=True).strip()
    assert turns[3].text == tokenizer.decode(answer, skip_special_tokens=True).strip()


# ---- what is reported ----------------------------------------------------------------------------------------------


def test_turns_and_metrics_report_what_was_done(model, tokenizer):
    """Turns per question; metrics summed over the questions, without padding."""
    result = Chain(model, tokenizer, MIXED, aligner="ridge").run(QUESTIONS)
    rows = [prompts(tokenizer, MIXED, question) for question in QUESTIONS]
    read = [[len(row[0]), len(row[1]), 1 + len(row[2]), len(row[3])] for row in rows]
    for question, answer, lengths in zip(QUESTIONS, result.answers, read, strict=True):
        turns = answer.turns
        assert answer.question == question
        assert [turn.agent for turn in turns] == ["planner", "critic", "refiner", "judger"]
        assert [turn.prompt_tokens for turn in turns] == lengths
        assert [turn.latent_steps for turn in turns] == [4, 0, 3, 0]
        assert [turn.new_tokens for turn in turns] == [0, 6, 0, 9]
        assert [turn.finish_reason for turn in turns] == [None, "length", None, "length"]
        assert turns[0].text is turns[2].text is None
        assert turns[3].text == answer.text
    assert [agent.agent for agent in result.agents] == ["planner", "critic", "refiner", "judger"]
    assert [agent.prompt_tokens for agent in result.agents] == [sum(column) for column in zip(*read, strict=True)]
    assert [agent.latent_steps for agent in result.agents] == [4 * 4, 0, 4 * 3, 0]
    assert [agent.new_tokens for agent in result.agents] == [0, 4 * 6, 0, 4 * 9]
    assert [agent.steps for agent in result.agents] == [4, 6, 3, 9]
    held = [sum(segment.stop) for segment in result.memory.segments if segment.kind != "prompt"]
    assert [agent.kv_bytes for agent in result.agents] == [slots * PER_SLOT for slots in held]


def test_a_batch_takes_as_many_steps_as_its_longest_text(model, tokenizer, script):
    script(["ab<eos>", "abcdef<eos>", "<eos>"])
    metrics = Chain(model, tokenizer, AGENTS[-1:]).run(["Why?", "x", "y"]).agents[0]
    assert (metrics.steps, metrics.new_tokens) == (7, 3 + 7 + 1)


@pytest.mark.parametrize("chain", CHAINS)
def test_every_second_is_counted_once_and_where_it_belongs(model, tokenizer, monkeypatch, chain):
    """On a clock that only moves where work is done: each phase lasts a power of ten, so none can hide in another."""
    agents = CHAINS[chain]
    clock = SimpleNamespace(now=0.0)

    def takes(owner, name, seconds):
        function = getattr(owner, name)

        def call(*arguments, **options):
            clock.now += seconds(*arguments) if callable(seconds) else seconds
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    def forward(engine, cache, prompt):
        if prompt.inputs_embeds is not None:
            return 100.0
        return 10_000.0 if prompt.columns == 1 else 1_000_000.0

    chain = Chain(model, tokenizer, agents, aligner="ridge", engine="eager")
    takes(EagerEngine, "extend", forward)
    takes(latentmas.chain.setup, "turn_ids", 1.0)
    takes(tokenizer, "decode", 1.0)
    takes(generation, "check_finite_weights", 1.0)
    takes(LatentCache, "name_segments", 1.0)
    takes(chain_module, "padded", 1.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    result = chain.run(QUESTIONS)
    for agent, metrics in zip(agents, result.agents, strict=True):
        assert metrics.prefill_seconds == 1_000_000
        assert metrics.latent_seconds == 100 * (agent.latent_steps or 0)
        assert metrics.decode_seconds == 10_000 * ((agent.max_new_tokens or 1) - 1)
        parts = metrics.prefill_seconds + metrics.latent_seconds + metrics.decode_seconds + metrics.other_seconds
        assert metrics.seconds == parts
    prompts_read, texts_read = len(agents) * 4, 4 * sum(agent.latent_steps is None for agent in agents)
    others = sum(metrics.other_seconds for metrics in result.agents)
    assert others == prompts_read + texts_read + 3 * len(agents), (
        "and the check, the segments and the padding of each call"
    )
    assert sum(metrics.seconds for metrics in result.agents) == result.seconds == clock.now


def test_metrics_add_up_over_batches():
    one = AgentMetrics("planner", 1, 2, 3, 4, 1.0, 2.0, 4.0, 8.0, 100)
    two = AgentMetrics("planner", 10, 20, 30, 40, 16.0, 32.0, 64.0, 128.0, 70)
    assert one + two == two + one == AgentMetrics("planner", 11, 22, 33, 44, 17.0, 34.0, 68.0, 136.0, 100)
    assert (one + two).seconds == one.seconds + two.seconds == 255
    assert (one, two) == (
        AgentMetrics("planner", 1, 2, 3, 4, 1.0, 2.0, 4.0, 8.0, 100),
        AgentMetrics("planner", 10, 20, 30, 40, 16.0, 32.0, 64.0, 128.0, 70),
    )
    with pytest.raises(AssertionError, match="per agent"):
        one + AgentMetrics("critic")


def test_milliseconds_per_step_are_those_of_the_steps():
    """Reading the prompt and the rest are no steps; without steps there is no such number."""
    metrics = AgentMetrics(
        "judger", steps=8, prefill_seconds=64.0, latent_seconds=0.5, decode_seconds=1.5, other_seconds=9
    )
    assert metrics.ms_per_step == 250
    assert AgentMetrics("reader", prefill_seconds=1.0).ms_per_step is None
    assert metrics.to_dict()["ms_per_step"] == 250
    assert metrics.to_dict()["seconds"] == 75
    assert {"agent", "prompt_tokens", "steps", "kv_bytes", "prefill_seconds"} <= metrics.to_dict().keys()


@pytest.mark.parametrize("method", METHODS)
def test_results_turn_into_json_and_back(model, tokenizer, method):
    """All but the memory."""
    result = Chain(model, tokenizer, METHODS[method](2, 5), aligner="ridge").run(QUESTIONS)
    told = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    thinks = any(agent.thinks for agent in serial(METHODS[method](2, 5)))
    assert told == result.to_dict()
    assert [(answer["question"], answer["text"]) for answer in told["answers"]] == list(
        zip(QUESTIONS, texts_of(result), strict=True)
    )
    assert [turn["text"] for turn in told["answers"][0]["turns"]] == [turn.text for turn in result.answers[0].turns]
    assert told["seconds"] == result.seconds > 0
    assert [agent["seconds"] for agent in told["agents"]] == [agent.seconds for agent in result.agents]
    assert told["aligner"] == ({"kind": "ridge", "reason": "asked for"} if thinks else None)
    assert "memory" not in told


# ---- progress ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chain", CHAINS)
def test_progress_tells_of_every_step_and_of_the_tokens_written(model, tokenizer, calls, chain):
    agents, heard = CHAINS[chain], []
    Chain(model, tokenizer, agents, aligner="ridge").run(QUESTIONS, on_progress=heard.append)
    assert [(p.agent, p.number, p.step) for p in heard] == [
        (agent, number, step) for number, agent in enumerate(agents, 1) for step in range(agent.steps + 1)
    ]
    assert {p.agents for p in heard} == {len(agents)}
    for number, agent in enumerate(agents, 1):
        told = [p.tokens for p in heard if p.number == number]
        assert told[0] is None
        if agent.latent_steps is not None:
            assert told == [None] * (agent.latent_steps + 1)
        else:
            said = calls[number - 1][2].sequences[:, -agent.max_new_tokens :]
            assert torch.equal(torch.stack(told[1:], dim=1), said)


def test_an_agent_begins_before_its_prompt_is_read(model, tokenizer):
    """Step 0 is told of while there is still nothing to show."""
    events = []
    model.get_decoder().register_forward_pre_hook(lambda *_: events.append("forward"))
    chain = Chain(model, tokenizer, AGENTS[1:], aligner="ridge", engine="eager")
    events.clear()
    chain.run(["Why?"], on_progress=lambda p: events.append((p.number, p.step)))
    thinking = [(1, 0), "forward", (1, 1), "forward", (1, 2), "forward", (1, 3), "forward"]
    assert events[:12] == [*thinking, (2, 0), "forward", (2, 1), "forward"]


@pytest.mark.parametrize("where", [(1, 0), (1, 3), (2, 0), (2, 4), (3, 1), (4, 9)])
def test_interrupted_by_the_one_who_watches_the_chain_can_run_again(model, tokenizer, where):
    chain = Chain(model, tokenizer, MIXED, aligner="ridge")
    want = chain.run(QUESTIONS)

    def interrupt(progress):
        if (progress.number, progress.step) == where:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chain.run(["What else?", "x"], on_progress=interrupt)
    again = chain.run(QUESTIONS)
    assert again.answers == want.answers
    assert_same_memory(again.memory, want.memory)


# ---- what is refused -----------------------------------------------------------------------------------------------


def positions_of(tokenizer, agents, question):
    """Of agents in one memory: all but the last new token take one."""
    return sum(map(len, prompts(tokenizer, agents, question))) + sum(agent.steps for agent in agents) - 1


def test_too_long_chain_is_refused_before_any_work(tokenizer):
    """The message names the positions needed and those there are; no token goes through the model."""
    model = endless(120)
    chain = Chain(model, tokenizer, AGENTS, aligner="ridge", engine="eager")
    forwards, began = [], []
    model.get_decoder().register_forward_hook(lambda *args: forwards.append(args))
    need = positions_of(tokenizer, AGENTS, QUESTIONS[1])
    words = (
        rf"up to {need} positions \({need - 15} of prompts, 15 of latent steps and new tokens\), but LlamaForCausalLM was "
        r"made for 120; shorten the question or lower latent_steps and max_new_tokens$"
    )
    assert need > 120
    with pytest.raises(ValueError, match=words):
        chain.run(QUESTIONS, on_progress=began.append)
    with pytest.raises(ValueError, match=words):
        chain.check(QUESTIONS[1])
    assert forwards == began == []
    chain.run([QUESTIONS[0]])
    assert len(forwards) > 0, "the short one fits"


@pytest.mark.parametrize("chain", ["alone", "thinkers", "mixed"])
def test_check_accepts_up_to_the_last_position(tokenizer, chain):
    """One that is filled to its last position runs; with one position less it is refused, by check() and run() alike."""
    agents = CHAINS[chain]
    need = positions_of(tokenizer, agents, "How many?")
    fits, short = (Chain(endless(limit), tokenizer, agents, aligner="ridge") for limit in (need, need - 1))
    fits.check("How many?")
    assert fits.run(["How many?"]).memory.lengths.tolist() == [need]
    for door in (short.check, lambda question: short.run([question])):
        with pytest.raises(ValueError, match=f"up to {need} positions .* made for {need - 1}"):
            door("How many?")


@pytest.mark.parametrize("handover", [3, 5])
def test_check_counts_notes_as_long_as_they_may_become(model, tokenizer, script, handover):
    """Texts that are handed on up to the limit, all of them cut, need what check() counts, but for what a text that is not cut
    may be split into on top."""
    agents = [
        Agent("scout", "Look: {question}", max_new_tokens=8),
        Agent("critic", "{notes} Criticise.", max_new_tokens=6),
        Agent("judger", "{notes} Answer: {question}", max_new_tokens=4),
    ]
    script(["abcdefgh"], ["abcdefgh"], ["abcdefgh"])
    with pytest.warns(UserWarning, match="max_note_tokens"):
        result = Chain(model, tokenizer, agents, max_note_tokens=handover).run(["Why?"])
    need = result.answers[0].turns[-1].prompt_tokens + 4 - 1
    assert need == int(result.memory.lengths[0]) > max(t.prompt_tokens + 8 for t in result.answers[0].turns[:-1])
    need += 2 * RESPLIT
    Chain(endless(need), tokenizer, agents, max_note_tokens=handover).check("Why?")
    with pytest.raises(ValueError, match=f"up to {need} positions .* made for {need - 1}; .*, or max_note_tokens"):
        Chain(endless(need - 1), tokenizer, agents, max_note_tokens=handover).check("Why?")


def test_short_texts_are_not_counted_up_to_the_handover_limit(tokenizer):
    """An agent that may write little leaves little: a higher limit changes nothing."""
    chains = [Chain(endless(130), tokenizer, READERS, max_note_tokens=tokens) for tokens in (6, 10**6)]
    for chain in chains:
        chain.check("Why?")
    told = []
    for chain in chains:
        with pytest.raises(ValueError, match="positions") as caught:
            chain.check("Why?" * 30)
        told.append(str(caught.value))
    assert told[0] == told[1]


@st.composite
def chains_of_agents(draw):
    """Agents that make a chain, with room for few or many tokens."""
    agents, last = [], None
    for number in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["think", "write", *(["read"] if last in ("write", "read") else [])]))
        prompts = ["{question}", "Look: {question}!", *(["Go on."] if number else [])]
        prompt = draw(st.sampled_from(prompts)) + " {notes}" * (kind == "read")
        steps = draw(st.integers(3, 8))
        options = {"latent_steps": steps} if kind == "think" else {"max_new_tokens": steps}
        agents.append(Agent(f"agent{number}", prompt, **options))
        last = kind
    if last == "think":
        agents.append(Agent("last", "Answer.", max_new_tokens=4))
    return agents


@settings(max_examples=25, deadline=None)
@given(
    agents=chains_of_agents(),
    handover=st.integers(3, 9),
    question=st.text("ab {}?", min_size=1, max_size=12).filter(str.strip),
    template=st.sampled_from([TEMPLATE, None]),
)
def test_what_check_accepts_runs_to_its_end(agents, handover, question, template):
    """With not one position more than check() asks for, and texts that are as long as they may be."""
    tokenizer = character_tokenizer(template)

    model = endless(1)

    def chain_for(positions):
        model.config.max_position_embeddings = positions  # each chain reads it anew
        return Chain(model, tokenizer, agents, aligner="identity", max_note_tokens=handover)

    def accepts(positions):
        try:
            chain_for(positions).check(question)
        except ValueError:
            return False
        return True

    least = bisect_left(range(4096), True, key=accepts)
    assert not accepts(least - 1)
    assert accepts(least)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = chain_for(least).run([question])
    assert [turn.agent for turn in result.answers[0].turns] == [agent.name for agent in agents]
    assert int(result.memory.lengths[0]) <= least


def test_memory_that_is_not_there_is_refused_before_the_model_runs(model, tokenizer, monkeypatch):
    """With what is needed for all rows and what is free."""
    chain = Chain(model, tokenizer, AGENTS, aligner="ridge", engine="eager")
    need = 200 * positions_of(tokenizer, AGENTS, QUESTIONS[1]) * PER_SLOT
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=need - 1))
    model.get_decoder().register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=rf"200 rows .* needs {need / 2**20:,.0f} MB.* free on cpu .* smaller batch"):
        chain.run([QUESTIONS[1]] * 200)


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


BAD_CHAINS = {
    "none": ([], r"ends with an agent that writes \(max_new_tokens\); got no agents"),
    "no writer": (AGENTS[:2], "ends with an agent that writes .*; got 'critic', which thinks"),
    "one name twice": ([*AGENTS, AGENTS[2]], "a name of its own.*more than one 'judger'"),
    "thinker last": (
        [*AGENTS, replace(AGENTS[0], name="late")],
        "ends with an agent that writes .*; got 'late', which thinks",
    ),
    "notes first": (READERS[1:], r"agent 'critic' reads \{notes\}, but nobody wrote any before it"),
    "notes alone": (READERS[2:], r"agent 'judger' reads \{notes\}, but nobody wrote any before it"),
    "notes behind a thinker": (
        [AGENTS[0], READERS[2]],
        r"'judger' reads \{notes\} .* the thoughts of 'planner' .* lost; take \{notes\} out of its prompt",
    ),
    "notes behind a writer and a thinker": (
        [READERS[0], AGENTS[1], READERS[2]],
        r"'judger' reads \{notes\} .* the thoughts of 'critic' .* let an agent that writes come between",
    ),
}


@pytest.mark.parametrize("what", BAD_CHAINS)
def test_agents_that_make_no_chain_are_refused(model, tokenizer, what):
    agents, words = BAD_CHAINS[what]
    with pytest.raises(ValueError, match=words):
        Chain(model, tokenizer, agents, aligner="ridge")


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


@pytest.mark.parametrize("template", [TEMPLATE, None], ids=["chat", "plain"])
def test_thinking_that_cannot_be_switched_on_is_warned_of_once(model, template):
    """As the chain is made, however many of its agents ask for it; nothing is said where the template has the switch."""
    thinking = [
        Agent("scout", "Look: {question}", max_new_tokens=2, enable_thinking=True),
        Agent("judger", "Answer.", max_new_tokens=2, enable_thinking=True),
    ]
    with pytest.warns(UserWarning, match="has no thinking switch, so enable_thinking changes nothing") as caught:
        chain = Chain(model, character_tokenizer(template), thinking)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chain.run(QUESTIONS)
        Chain(model, character_tokenizer(template), AGENTS, aligner="ridge")
        Chain(model, character_tokenizer(TEMPLATE + SWITCH), thinking).run(QUESTIONS)


# ---- the default model ---------------------------------------------------------------------------------------------


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
