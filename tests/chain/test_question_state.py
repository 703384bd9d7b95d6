"""Notes: what later agents read of a text, and how a text that is too long is truncated."""

import warnings

import latentmas.chain.stage_run
import pytest
import torch
from example_chains import CHATML, QUESTIONS, READERS, TEMPLATE, endless, noted, texts_of, written
from latentmas.chain.agent import Agent
from latentmas.chain.chain import Chain
from latentmas.chain.prompts import padded, turn_ids
from tiny_models import VOCAB
from tokenizers import models
from tokenizers_offline import CHARACTERS, SPECIAL, character_tokenizer, with_tokens

from latentmas_kernels import generate
from latentmas_kernels.errors import LatentMASError

pytestmark = pytest.mark.usefixtures("keys_are_moved_by_torch")


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


def test_notes_do_not_hold_the_end_of_a_text(model, tokenizer, calls, script):
    with_tokens(tokenizer, "<|im_end|>", special=False).chat_template = CHATML
    script(["abc<|im_end|>"], ["<|im_end|>"])
    agents = [Agent("writer", "Say {question}", max_new_tokens=6), Agent("judger", "{notes} Answer.", max_new_tokens=5)]
    answer = Chain(model, tokenizer, agents).run(["Why?"]).answers[0]
    assert tokenizer.decode(calls[1][0][0]) == "(user)writer:\nabc Answer.<|im_end|>\n(assistant)"
    assert answer.text == ""


# ---- texts that are too long to be handed on --------------------------------------------------------------------------


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
    says = "{} wrote 10 tokens, of which the agents after it read the first 7; raise max_note_tokens "
    says += "(--handover-tokens) to hand on more"
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


def test_it_is_said_of_a_stage_that_fails_later(model, tokenizer, script, monkeypatch):
    """The two writers have limits of their own, so each has a call of its own."""
    script(["abcdefghij"])
    call = latentmas.chain.stage_run.generate

    def generate(model, ids, mask, *, max_new_tokens, **options):
        if max_new_tokens == 11:
            raise LatentMASError("the second one fails")
        return call(model, ids, mask, max_new_tokens=max_new_tokens, **options)

    monkeypatch.setattr(latentmas.chain.stage_run, "generate", generate)
    group = [Agent(f"scout {limit}", "Look: {question}", max_new_tokens=limit) for limit in (10, 11)]
    chain = Chain(model, tokenizer, [group, Agent("judger", "{notes}", max_new_tokens=1)], max_note_tokens=7)
    with (
        pytest.warns(UserWarning, match="scout 10 wrote 10 tokens, of which the agents after it read the first 7"),
        pytest.raises(LatentMASError, match="the second one fails"),
    ):
        chain.run(["Why?"])


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
    with pytest.warns(
        UserWarning,
        match="what writer wrote is 96 tokens to judger, of which 20 are read; raise max_note_tokens .--handover-tokens. to",
    ):
        result = chain.run(["Why?"])
    assert result.memory.buffer.nbytes <= need
    assert result.answers[0].turns[1].prompt_tokens < 96
