"""A chain whose texts are written by a decoder, here our own engine behind its protocol: all is as without one."""

import pytest
import torch
from buffers import count_buffers
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from latentmas import Agent, Chain, MemoryPolicy
from latentmas.backends.base import Completion, LockstepTokens, PromptEmbeds, check_requests
from latentmas.chain_files.reader import METHODS, serial
from tiny_models import VOCAB, tiny_model
from tokenizers_offline import character_tokenizer, with_tokens

from latentmas_kernels import generate, latent_generate
from latentmas_kernels.models.architecture import Architecture, UnsupportedModelError
from latentmas_kernels.models.fingerprint import ModelFingerprint

pytestmark = pytest.mark.usefixtures("keys_are_moved_by_torch")
TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '|' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
TOKENIZER = character_tokenizer(TEMPLATE)
QUESTIONS = ["Why is the sky blue, and not green or red?", "Name a colour.", "x"]
LONG = "There are 3 cats, 2 birds and a dog in a house of 4 rooms, and none of them sleeps. "
SHARED = [LONG + question for question in QUESTIONS]


def made(ends, name="llama", **overrides):
    model = tiny_model(name, max_position_embeddings=4096, **overrides)
    model.generation_config.eos_token_id = ends
    return model


ENDLESS = made(None)
STOPS = made(list(range(2, VOCAB, 5)))
WIDE = made(
    list(range(1, VOCAB, 7)), "qwen3", hidden_size=64, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4
)
MODELS = {"texts end by length": ENDLESS, "texts end anywhere": STOPS}


class Fake:
    """Writes as a decoder does: from the requests, without looking at the chain.

    `cached` has it say that all but one token of each prompt were found in a cache.
    """

    def __init__(self, model, kv_transfer="kv", *, max_model_len=4096, cached=False):
        self.model, self.kv_transfer, self.max_model_len, self.cached = model, kv_transfer, max_model_len, cached
        self.stamp, self.calls, self.slots = ModelFingerprint.of(model), [], {}

    def write(self, memory, requests, on_tokens=None):
        check_requests(requests, memory, self.max_model_len, self.kv_transfer)
        assert len({id(memory) for memory in [memory, *(None for r in requests if r.row is None)]}) == 1
        self.calls.append((memory, requests))
        self.slots[id(memory)] = [] if memory is None else memory.lengths.tolist()
        before = None if memory is None else (memory.buffer.clone(), memory.lengths.clone(), memory.positions.clone())
        written = [self._one(memory, request) for request in requests]
        steps, left = LockstepTokens(len(requests), on_tokens), [list(text.ids) for text in written]
        for _ in range(max(map(len, left))):  # the last request is always two tokens ahead
            for number, ids in reversed(list(enumerate(left))):
                take = 3 if number + 1 == len(left) else 1
                steps.add(number, ids[:take], not ids[take:])
                del ids[:take]
        if memory is not None:
            assert torch.equal(memory.buffer.nan_to_num(7), before[0].nan_to_num(7))
            assert torch.equal(memory.lengths, before[1])
            assert torch.equal(memory.next_position, memory.lengths), "what vLLM assumes"
        return written

    def _one(self, memory, request):
        ends = self.model.generation_config.eos_token_id or ()
        assert set(request.end_ids) == set(ends)
        ids, past, read = list(request.prompt), None, len(request.prompt)
        if self.kv_transfer == "kv":
            assert not request.slot_inputs
            past = None if request.row is None else memory.select([request.row])
        else:
            assert len(request.slot_inputs) == (0 if request.row is None else int(memory.lengths[request.row]))
            a = Architecture.of(self.model)
            mixed = PromptEmbeds.of(request, a.hidden_size, a.dtype)
            ids, read = [*request.slot_inputs, *ids], read + len(request.slot_inputs)
            if mixed is not None:
                whole = mixed.embed_tokens(self.model.get_input_embeddings())[None]
                past = latent_generate(
                    self.model, inputs_embeds=whole[:, :-1], latent_steps=0, aligner="identity"
                ).past_key_values
                ids = ids[-1:]
        said = generate(self.model, torch.tensor([ids]), past_key_values=past, max_new_tokens=request.max_new_tokens)
        new = said.sequences[0, len(ids) :].tolist()
        return Completion(new, said.finish_reasons[0], 1 if self.cached else read)


def counts(result):
    return [(a.agent, a.latent_steps, a.new_tokens, a.steps, a.prompt_tokens + a.shared_tokens) for a in result.agents]


def read_again(chain, calls, counts):
    """Counts of the chain's own engine, and what embeddings have a decoder read again where it is last in a memory."""
    added = dict.fromkeys((row[0] for row in counts), 0)
    stages = [
        (stage, context) for context in chain.setup.contexts for stage in context if chain.setup.decoder_of(stage)
    ]
    for (stage, context), (_, requests) in zip(stages, calls, strict=True):
        writers = [agent.name for agent in stage.agents if not agent.thinks]
        for number, request in enumerate(requests):
            if stage is context[-1]:
                added[writers[number % len(writers)]] += len(request.slot_inputs)
    return [(*row[:-1], row[-1] + added[row[0]]) for row in counts]


def assert_same(
    model, agents, questions=QUESTIONS, kv_transfer="kv", *, writer=None, cached=False, same_progress=True, **options
):
    """With a decoder and without, in one go and prepared; the result with it, and what the decoder was given."""
    progress = [], []
    fake = Fake(writer or model, kv_transfer, cached=cached)
    own = Chain(model, TOKENIZER, agents, aligner="ridge", **options)
    chain = Chain(model, TOKENIZER, agents, aligner="ridge", decoder=fake, **options)
    want = own.run(questions, on_progress=lambda p: progress[0].append((p.names, p.number, p.step)))
    got = chain.run(questions, on_progress=lambda p: progress[1].append((p.names, p.number, p.step)))
    assert got.answers == want.answers
    if same_progress:
        assert progress[0] == progress[1]
    for agent in got.agents:
        assert min(agent.prompt_tokens, agent.shared_tokens, agent.latent_steps, agent.new_tokens, agent.kv_bytes) >= 0
        assert min(agent.prefill_seconds, agent.latent_seconds, agent.decode_seconds) >= 0
    calls = list(fake.calls)
    memory, requests = calls[-1]
    assert counts(got) == read_again(chain, calls, counts(want))
    assert got.memory is memory or memory is None
    prepared = chain.prepare(questions)
    assert [(r.prompt, r.row, r.max_new_tokens) for r in prepared.requests] == [
        (r.prompt, r.row, r.max_new_tokens) for r in requests
    ]
    finished = prepared.finish(fake.write(prepared.memory, prepared.requests))
    assert finished.answers == want.answers
    assert counts(finished) == counts(got)
    prepared = chain.prepare(questions)
    written = fake.write(prepared.memory, prepared.requests)
    prepared.forget()
    forgotten = prepared.finish(written)
    assert (forgotten.answers, counts(forgotten), forgotten.memory) == (want.answers, counts(got), None)
    return got, calls


# ---- the methods ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_transfer", ["kv", "embeds"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_methods_answer_as_without_a_decoder(method, model, kv_transfer):
    """Serial where embeddings are handed over; two of them with a prefix cache that has all but one token."""
    agents = METHODS[method](3, 7)
    if kv_transfer == "embeds":
        agents = serial(agents)
    cached = method in ("single", "latent")
    result, _ = assert_same(MODELS[model], agents, kv_transfer=kv_transfer, cached=cached)
    texts = {turn.text for answer in result.answers for turn in answer.turns if turn.text is not None}
    assert len(texts) > 1, "answers that are all alike show nothing"
    if cached:
        assert result.agents[-1].prompt_tokens == len(QUESTIONS)


THINKER = Agent("thinker", "Plan: {question}", latent_steps=3)
WRITER = Agent("writer", "{question} Say.", max_new_tokens=6)
OTHER = Agent("other", "{question} Say more.", max_new_tokens=6)
SHORT = Agent("short", "{question} Say it in short.", max_new_tokens=2)
BESIDE = Agent("beside", "{question} Think.", latent_steps=2)
READER = Agent("reader", "{notes} Answer: {question}", max_new_tokens=5)
JUDGER = Agent("judger", "Answer: {question}", max_new_tokens=9)
CHAINS = {
    "a writer first": [WRITER, THINKER, JUDGER],
    "writers one after the other": [THINKER, WRITER, OTHER, JUDGER],
    "writers side by side in the middle": [THINKER, [WRITER, OTHER], JUDGER],
    "writers side by side first": [[WRITER, OTHER], BESIDE, JUDGER],
    "writers side by side at the end": [THINKER, [WRITER, OTHER], READER],
    "writers side by side and alone": [[WRITER, OTHER], READER],
    "of other lengths": [THINKER, [SHORT, OTHER, WRITER], JUDGER],
    "a writer beside thinkers": [THINKER, [BESIDE, WRITER, Agent("third", "{question}?", latent_steps=1)], JUDGER],
    "a thinker beside a writer": [[WRITER, BESIDE], JUDGER],
}
OTHER_PROGRESS = ["of other lengths", "a writer beside thinkers", "a thinker beside a writer"]
"""Here our own engine makes several calls, and a decoder writes all in one."""


@pytest.mark.parametrize("questions", [QUESTIONS, SHARED, QUESTIONS[:1]], ids=["short", "beginning alike", "one"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("chain", CHAINS)
def test_writers_anywhere(chain, model, questions):
    result, calls = assert_same(MODELS[model], CHAINS[chain], questions, same_progress=chain not in OTHER_PROGRESS)
    texts = [turn for answer in result.answers for turn in answer.turns if turn.text is not None]
    assert sum(len(requests) for _, requests in calls) == len(texts), "the decoder writes all of them, and nothing else"
    if questions is QUESTIONS:
        assert ("stop" in {turn.finish_reason for turn in texts}) == (model == "texts end anywhere")


@pytest.mark.parametrize("kv_transfer", ["kv", "embeds"])
@pytest.mark.parametrize("chain", ["a writer first", "writers one after the other", "writers side by side at the end"])
def test_a_beginning_that_all_questions_share_is_read_once(chain, kv_transfer):
    """And is not sent again to a decoder that has it in its memory."""
    result, calls = assert_same(ENDLESS, CHAINS[chain], SHARED, kv_transfer)
    assert result.agents[0].shared_tokens >= 2 * 64
    memory, requests = calls[0]
    assert memory is not None
    if chain == "a writer first":
        assert [request.row for request in requests] == [0, 1, 2]
        assert all(len(request.prompt) < len(LONG) for request in requests)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("chain", ["a writer first", "writers one after the other", "writers side by side at the end"])
def test_embeddings_of_writers_anywhere(chain, model):
    assert_same(MODELS[model], CHAINS[chain], kv_transfer="embeds")


@pytest.mark.parametrize("budget", [None, "90 slots", "500 KB"])
@pytest.mark.parametrize(
    "memory",
    [MemoryPolicy(), MemoryPolicy("last"), MemoryPolicy(kinds="latent"), MemoryPolicy(slots=20),
     MemoryPolicy("last", "latent", 5)],
    ids=str,
)  # fmt: skip
def test_memories_that_were_cut_go_to_a_decoder_as_they_are(memory, budget):
    agents = [
        THINKER,
        Agent("writer", "Say.", max_new_tokens=6, memory=memory),
        [Agent("a", "Think.", latent_steps=2, memory=memory), Agent("b", "Thinker.", latent_steps=4, memory=memory)],
        Agent("judger", "Answer: {question}", max_new_tokens=9, memory=memory),
    ]
    assert_same(STOPS, agents, budget=budget)


def test_layout_take_embeddings():
    assert_same(made(None, "qwen3-mixed"), [THINKER, WRITER, JUDGER], SHARED, "embeds")


@pytest.mark.parametrize("kv_transfer", ["kv", "embeds"])
def test_a_decoder_stops_where_the_template_ends_a_turn(kv_transfer):
    tokenizer = with_tokens(character_tokenizer(TEMPLATE.replace("'|'", "'<|end|>'")), "<|end|>")
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    for model, ends in ((ENDLESS, {end}), (STOPS, {*STOPS.generation_config.eos_token_id, end})):
        chain = Chain(model, tokenizer, [THINKER, JUDGER], aligner="ridge", decoder=Fake(model, kv_transfer))
        requests = chain.prepare(QUESTIONS).requests
        assert [set(request.end_ids) for request in requests] == [ends] * 3


# ---- two models ----------------------------------------------------------------------------------------------------

BIG = {"big": (WIDE, TOKENIZER)}


def on_big(agent):
    return Agent(**{**vars(agent), "name": f"big {agent.name}", "model": "big"})


@pytest.mark.parametrize("kv_transfer", ["kv", "embeds"])
@pytest.mark.parametrize(
    ("agents", "models", "written"),
    [
        ([THINKER, WRITER, BESIDE, on_big(THINKER), on_big(WRITER), on_big(JUDGER)], BIG, 2),
        ([on_big(WRITER), on_big(THINKER), THINKER, on_big(BESIDE), on_big(JUDGER)], BIG, 2),
        ([THINKER, on_big(JUDGER)], BIG, 1),
        ([on_big(THINKER), on_big(WRITER), JUDGER], BIG, 1),
        ([[THINKER, BESIDE], on_big(WRITER), on_big(JUDGER)], BIG, 2),
        ([WRITER, on_big(READER)], BIG, 1),
        ([THINKER, Agent("w", "Say.", max_new_tokens=4, model="same"), JUDGER], {"same": (STOPS, TOKENIZER)}, 1),
        ([THINKER, Agent("j", "Say.", max_new_tokens=4, model="same")], {"same": (made(None, "qwen2"), TOKENIZER)}, 1),
    ],
)
def test_texts_on_the_last_model_go_to_the_decoder_and_others_do_not(agents, models, written, kv_transfer):
    """Latent steps reach it as embeddings of that model, whatever it is called; of another width or not."""
    last = agents[-1].model
    writer = ENDLESS if last is None else models[last][0]
    _, calls = assert_same(ENDLESS, agents, kv_transfer=kv_transfer, writer=writer, models=models)
    assert [len(requests) for _, requests in calls] == [len(QUESTIONS)] * written


# ---- any chain -----------------------------------------------------------------------------------------------------


@st.composite
def chains(draw):
    entries, count = [], 0
    for _ in range(draw(st.integers(0, 4))):
        wrote = entries and all(not agent.thinks for agent in serial(entries[-1:]))
        reads = bool(wrote) and draw(st.booleans())
        memory = MemoryPolicy(
            draw(st.sampled_from(["all", "all", "last"])),
            draw(st.sampled_from(["all", "all", "latent"])),
            draw(st.sampled_from([None, None, 1, 30])),
        )
        model = draw(st.sampled_from([None, None, None, "big"]))
        group = []
        for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
            count += 1
            kind = draw(st.sampled_from(["latent_steps", "max_new_tokens"]))
            prompt = draw(st.sampled_from(["{question} Go on.", "Go.", "{question}?"])) + " {notes}" * reads
            steps = {kind: draw(st.integers(kind != "latent_steps", 5))}
            group.append(Agent(f"agent{count}", prompt, **steps, memory=memory, model=model))
        entries.append(group if len(group) > 1 else group[0])
    return [
        *entries,
        Agent("last", "Answer: {question}", max_new_tokens=7, memory=memory if entries else MemoryPolicy()),
    ]


@settings(max_examples=36, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    agents=chains(),
    kv_transfer=st.sampled_from(["kv", "embeds"]),
    model=st.sampled_from([ENDLESS, STOPS]),
    questions=st.sampled_from([QUESTIONS, SHARED, ["Why?"]]),
    budget=st.sampled_from([None, None, "150 slots"]),
)
def test_any_chain_answers_as_without_a_decoder(agents, kv_transfer, model, questions, budget):
    """Or is refused before any work, for embeddings of a memory that they cannot bring back."""
    options = {"aligner": "ridge", "budget": budget, "models": BIG}
    try:
        Chain(model, TOKENIZER, agents, **options).kv_bytes(questions)
    except ValueError as error:  # no chain, or no room
        event(f"refused: {str(error)[:9]}")
        return
    try:
        Chain(model, TOKENIZER, agents, decoder=Fake(model, kv_transfer), **options)
    except ValueError as error:
        assert kv_transfer == "embeds"
        event(f"refused: {str(error)[:20]}")
        return
    event(f"run with {kv_transfer}")
    assert_same(model, agents, questions, kv_transfer, same_progress=False, budget=budget, models=BIG)


# ---- what is refused before any work -------------------------------------------------------------------------------

CUT = Agent("cut", "Answer: {question}", max_new_tokens=3, memory=MemoryPolicy("last"))
BEHIND_A_CUT = Agent("behind", "Answer.", latent_steps=1, memory=MemoryPolicy(slots=9))


@pytest.mark.parametrize(
    ("agents", "options", "words"),
    [
        ([THINKER, CUT], {}, r"the memory is cut before cut\. .*\(kv\).*memory: all"),
        ([THINKER, BEHIND_A_CUT, JUDGER], {}, "the memory is cut before behind"),
        ([THINKER, CUT, JUDGER], {}, "the memory is cut before cut"),
        (
            [THINKER, JUDGER],
            {"budget": "900 slots"},
            r"a budget may cut the memory before judger\. .*leave the budget out",
        ),
        ([on_big(THINKER), THINKER, JUDGER], {"budget": "2 MB"}, "a budget may cut the memory before judger"),
        ([[THINKER, BESIDE], JUDGER], {}, r"thinker \+ beside work side by side.*--hierarchical serial"),
        ([WRITER, THINKER, [BESIDE, OTHER], JUDGER], {}, r"beside \+ other work side by side"),
        ([on_big(THINKER), [THINKER, BESIDE], JUDGER], {}, r"thinker \+ beside work side by side"),
        ([on_big(THINKER), THINKER, CUT, JUDGER], {}, "the memory is cut before cut"),
    ],
)
def test_embeddings_of_a_memory_that_they_do_not_bring_back_are_refused(agents, options, words):
    """Keys and values of all of them are handed over."""
    with pytest.raises(ValueError, match=words):
        Chain(ENDLESS, TOKENIZER, agents, aligner="ridge", models=BIG, decoder=Fake(ENDLESS, "embeds"), **options)
    assert_same(ENDLESS, agents, models=BIG, same_progress=False, **options)


@pytest.mark.parametrize(
    ("agents", "options"),
    [
        ([on_big(THINKER), CUT], {}),
        ([on_big(THINKER), on_big(CUT), JUDGER], {}),
        ([on_big(THINKER), JUDGER], {"budget": "90 slots"}),
        ([[on_big(THINKER), on_big(BESIDE)], JUDGER], {}),
        ([[on_big(THINKER), on_big(WRITER)], JUDGER], {}),
        ([CUT], {"budget": "900 slots"}),
        ([WRITER, READER], {"budget": "900 slots"}),
        ([THINKER, [WRITER, OTHER], READER], {}),
        ([[WRITER, OTHER], READER], {}),
    ],
)
def test_embeddings_of_what_is_read_in_one_go_are_taken(agents, options):
    """Behind a crossing, at the beginning of a memory, for texts alone."""
    assert_same(ENDLESS, agents, kv_transfer="embeds", models=BIG, **options)


def test_layout_are_refused_by_name_for_keys_and_values():
    windowed = made(None, "mistral-window")
    with pytest.raises(UnsupportedModelError, match="MistralForCausalLM has a sliding window in 3 of its 3 layers"):
        Chain(windowed, TOKENIZER, [JUDGER], decoder=Fake(windowed))


@pytest.mark.parametrize("other", [WIDE, made(None, "qwen2"), made(None).bfloat16()], ids=["shape", "family", "dtype"])
@pytest.mark.parametrize("kv_transfer", ["kv", "embeds"])
def test_a_decoder_of_another_model_is_refused(other, kv_transfer):
    fake = Fake(other, kv_transfer)
    words = f"decoder runs .*{fake.stamp.fingerprint[:12]}.*the last agent .*Llama.*model and dtype"
    with pytest.raises(ValueError, match=words):
        Chain(ENDLESS, TOKENIZER, [on_big(WRITER), READER], models=BIG, decoder=fake)


@pytest.mark.parametrize("kv_transfer", ["kv", "embeds"])
@pytest.mark.parametrize("chain", [[JUDGER], [JUDGER, THINKER, SHORT], *CHAINS.values()])
def test_a_chain_may_take_what_the_decoder_was_started_for_to_the_token(chain, kv_transfer):
    """Texts that end by their length come to just what was counted."""
    fake = Fake(ENDLESS, kv_transfer)
    try:
        Chain(ENDLESS, TOKENIZER, chain, aligner="ridge", decoder=fake).run(QUESTIONS[:1])
    except ValueError:
        assert kv_transfer == "embeds"
        return
    need = 0
    for memory, requests in fake.calls:
        for request in requests:
            slots = 0 if request.row is None else fake.slots[id(memory)][request.row]
            need = max(need, slots + len(request.prompt) + request.max_new_tokens)
    least = Chain(ENDLESS, TOKENIZER, chain, aligner="ridge", decoder=Fake(ENDLESS, kv_transfer, max_model_len=need))
    reads = any(agent.reads_notes for agent in least.agents)
    if not reads:  # notes are counted as long as they may become
        least.check(QUESTIONS[0])
    least.run(QUESTIONS[:1])
    less = Chain(ENDLESS, TOKENIZER, chain, aligner="ridge", decoder=Fake(ENDLESS, kv_transfer, max_model_len=need - 1))
    for call in (less.check, lambda question: less.run([question])):
        with pytest.raises(
            ValueError, match=f"goes up to {need if not reads else '.*'} tokens .*started for {need - 1}"
        ):
            call(QUESTIONS[0])


# ---- what a run takes and sends ------------------------------------------------------------------------------------


class Canned(Fake):
    """Computes nothing."""

    def write(self, memory, requests, on_tokens=None):
        assert memory is None
        return [Completion([9] * request.max_new_tokens, "length", 5) for request in requests]


@pytest.mark.parametrize("method", ["single", "text"])
@pytest.mark.parametrize("questions", [QUESTIONS, SHARED])
def test_texts_alone_take_no_memory_of_our_own(monkeypatch, method, questions):
    chain = Chain(ENDLESS, TOKENIZER, METHODS[method](3, 7), decoder=Canned(ENDLESS), budget="1 KB")
    assert chain.kv_bytes(questions) == 0
    most = count_buffers(monkeypatch)
    result = chain.run(questions)
    assert most == [0]
    assert result.memory is None
    assert [agent.kv_bytes for agent in result.agents] == [0] * len(result.agents)


def test_sampling_is_asked_of_the_decoder_with_seeds_of_its_own():
    """From torch's generator, which a greedy run leaves alone."""
    fake = Fake(ENDLESS)
    chain = Chain(ENDLESS, TOKENIZER, [THINKER, JUDGER], aligner="ridge", decoder=fake)
    sent = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        sent.append(chain.prepare(QUESTIONS, temperature=0.7, top_p=0.9).requests)
    seeds = [[request.seed for request in requests] for requests in sent]
    assert seeds[0] == seeds[1] != seeds[2]
    assert len(set(seeds[0])) == len(QUESTIONS)
    assert {(request.temperature, request.top_p) for request in sent[0]} == {(0.7, 0.9)}
    before = torch.get_rng_state()
    assert {(r.temperature, r.top_p, r.seed) for r in chain.prepare(QUESTIONS).requests} == {(0.0, 1.0, 0)}
    assert torch.equal(torch.get_rng_state(), before)


def test_what_a_run_warns_of_is_said_as_it_is_prepared():
    chain = Chain(ENDLESS, TOKENIZER, [OTHER, READER], decoder=Fake(ENDLESS), max_note_tokens=2)
    with pytest.warns(
        UserWarning, match="other wrote . tokens, of which the agents after it read the first 2"
    ) as caught:
        prepared = chain.prepare(QUESTIONS[:1])
    assert [warning.filename for warning in caught] == [__file__]
    assert prepared.memory is None
