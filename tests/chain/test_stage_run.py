"""Stages: texts in the middle of a cache, agents in parallel, and what several rows have in common."""

import latentmas.chain.planner
import latentmas.chain.setup
import pytest
import torch
from example_chains import (
    CHATML,
    CODE,
    JUDGER,
    MATH,
    MIXED,
    QUESTIONS,
    SENTENCES,
    WORDS,
    assert_same_memory,
    by_hand,
    double_moved,
    endless,
    ids_of,
    prompts,
    texts_of,
    written,
)
from latentmas.chain.agent import Agent
from latentmas.chain.chain import Chain
from latentmas.chain_files.reader import METHODS
from tiny_models import PlainLoop, feed_back
from tokenizers_offline import with_tokens

from latentmas_kernels import generate, latent_generate
from latentmas_kernels.cache.buffer import KVBuffer
from latentmas_kernels.engines import EagerEngine, NativeEngine

pytestmark = pytest.mark.usefixtures("keys_are_moved_by_torch")


# ---- texts in the middle of a cache -----------------------------------------------------------------------------------


def test_latent_steps_and_texts_take_turns_in_one_cache(model, tokenizer, calls, monkeypatch):
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
            patch.setattr(KVBuffer, "__init__", counted(KVBuffer.__init__, made))
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


# ---- agents in parallel -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["eager", "native"])
@pytest.mark.parametrize("before", [False, True], ids=["first", "behind a planner"])
@pytest.mark.parametrize("name", ["llama", "qwen3-mixed"])
def test_merged_memory_is_that_of_each_agent_alone_moved_in_float64(tokenizer, engine, before, name):
    """Each agent by itself from the same memory; its part of the keys moved behind the parts before it."""
    model = endless(name=name)
    planner = Agent("planner", "Plan. {question}", latent_steps=3)
    agents = [*([planner] if before else []), [MATH, CODE, WORDS], JUDGER]
    result = Chain(model, tokenizer, agents, aligner="ridge", engine=engine).run(SENTENCES)
    inv_freq = model.model.rotary_emb.inv_freq
    for row, question in enumerate(SENTENCES):
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
    together = chain.run(SENTENCES)
    for row, question in enumerate(SENTENCES):
        alone = chain.run([question])
        assert texts_of(alone) == [together.answers[row].text]
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
    Chain(model, tokenizer, [[MATH, CODE], JUDGER], aligner="ridge", engine="eager").run(SENTENCES)
    latent_counts = [counts for counts, latent in seen if latent]
    assert latent_counts == [[1] * 8, [1] * 8, [1, 0] * 4, [1, 0] * 4]


def test_agents_of_a_group_share_what_they_read(model, tokenizer):
    result = Chain(model, tokenizer, [[MATH, CODE], JUDGER], aligner="ridge").run(SENTENCES)
    math, code, judger = result.agents
    common = [len("<user>Q: ") + len(q) + len(" As a ") for q in SENTENCES]
    assert code.shared_tokens == sum(common)
    assert code.prompt_tokens + code.shared_tokens == sum(a.turns[1].prompt_tokens for a in result.answers)
    assert math.prompt_tokens == sum(a.turns[0].prompt_tokens for a in result.answers)
    assert (math.shared_tokens, judger.shared_tokens) == (0, 0)
    assert [s.name for s in result.memory.segments][:5] == [
        "math + code:prompt", "math:prompt", "math:latent", "code:prompt", "code:latent"
    ]  # fmt: skip


# ---- common beginnings ------------------------------------------------------------------------------------------------


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
    assert texts_of(shared) == texts_of(unshared)
    assert [a.turns for a in shared.answers] == [a.turns for a in unshared.answers]
    assert shared.memory.segments == unshared.memory.segments
    for row, length in enumerate(shared.memory.lengths.tolist()):
        got = shared.memory.select([row]).keys[:, 0, :, :length]
        torch.testing.assert_close(got, unshared.memory.keys[:, row, :, :length], rtol=1e-5, atol=1e-5)
    if not isinstance(agents[0], list):
        assert int(shared.memory.prefix_len.min()) == 0
        assert int(shared.memory.prefix_len.max()) == beginning // 64 * 64, "and held once"
