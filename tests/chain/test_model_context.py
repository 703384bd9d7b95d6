"""Chains of two models: memory that crosses between models of other widths, and where it cannot."""

import pytest
import torch
from buffers import count_buffers
from latentmas import Agent, Chain, MemoryPolicy
from latentmas.chain.prompts import turn_ids
from tiny_models import VOCAB, PlainLoop, tiny_model
from tokenizers_offline import character_tokenizer
from transformers import DynamicCache

from latentmas_kernels import build_aligner

pytestmark = pytest.mark.usefixtures("keys_are_moved_by_torch")
TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '|' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
QUESTIONS = ["Why is the sky blue?", "What is 12 times 7, and why?", "x"]
PLANNER = Agent("planner", "Plan: {question}", latent_steps=4)
CRITIC = Agent("critic", "{question} Criticise.", latent_steps=3, model="wide")
JUDGER = Agent("judger", "Answer: {question}", max_new_tokens=6)


def endless(name, **overrides):
    model = tiny_model(name, max_position_embeddings=2048, **overrides)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def narrow():
    return endless("llama")


@pytest.fixture(scope="module")
def wide():
    """Another family, width, number of layers and heads."""
    return endless("qwen3", hidden_size=64, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4)


@pytest.fixture(scope="module")
def tokenizer():
    return character_tokenizer(TEMPLATE)


def crossed(source, target, seeds, kind):
    """The embeddings of the target model for hidden states or logits [n, ...] of the source, in float64."""
    rows = target.get_input_embeddings().weight.double()
    if kind == "soft":
        top, tokens = seeds.double().topk(10)
        y = (top.softmax(-1)[..., None] * rows[tokens]).sum(-2)
    else:
        u = source.get_output_embeddings().weight.double()
        w_a = torch.linalg.solve(u.T @ u + 1e-5 * torch.eye(u.shape[1], dtype=torch.float64), u.T @ rows)
        y = seeds.double() @ w_a
    return (y * rows.norm(dim=1).mean() / y.norm(dim=-1, keepdim=True)).float()


class Thinker(PlainLoop):
    """The plain loop, which also keeps what each embedding was made of."""

    def run_latent(self, ids, steps):
        self.seeds = []
        hidden, logits = self.forward(input_ids=ids)
        for _ in range(steps):
            self.seeds.append((hidden[0], logits[0]))
            hidden, logits = self.forward(inputs_embeds=self.feed_back(hidden, logits)[:, None])


@pytest.mark.parametrize("engine", ["eager", "native"])
@pytest.mark.parametrize("kind", ["ridge", "soft"])
@torch.no_grad()
def test_latent_steps_go_on_in_another_model(narrow, wide, tokenizer, kind, engine):
    """Planner on one model, critic and judger on a wider one: against the loops written out, token by token."""
    judger = Agent("judger", "Answer: {question}", max_new_tokens=6, model="wide")
    chain = Chain(
        narrow, tokenizer, [PLANNER, CRITIC, judger], aligner=kind, engine=engine, models={"wide": (wide, tokenizer)}
    )
    result = chain.run(QUESTIONS)
    own = {m: build_aligner(m, kind) for m in (narrow, wide)}
    for row, question in enumerate(QUESTIONS):
        plan, criticise, answer = (
            turn_ids(tokenizer, agent.text(question), first=turn == 0)
            for turn, agent in enumerate((PLANNER, CRITIC, judger))
        )
        first = Thinker(narrow, lambda h, z: own[narrow](z if kind == "soft" else h))
        first.run_latent(torch.tensor([plan]), 4)
        seeds = torch.stack([z if kind == "soft" else h for h, z in first.seeds])
        second = Thinker(wide, lambda h, z: own[wide](z if kind == "soft" else h))
        embeds = torch.cat([wide.get_input_embeddings()(torch.tensor(plan)), crossed(narrow, wide, seeds, kind)])
        second.forward(inputs_embeds=embeds[None])
        second.run_latent(torch.tensor([criticise]), 3)
        said = second.decode(torch.tensor([answer]), 6)
        assert result.answers[row].text == tokenizer.decode(said, skip_special_tokens=True).strip()
    assert [s.name for s in result.memory.segments] == [
        "planner:prompt", "planner:latent", "critic:prompt", "critic:latent", "judger:prompt", "judger:text"
    ]  # fmt: skip
    assert result.memory.keys.shape[0] == 2, "the memory is the wide model's"
    assert result.agents[1].prompt_tokens == sum(
        answer.turns[0].prompt_tokens + 4 + answer.turns[1].prompt_tokens for answer in result.answers
    )


def test_there_and_back(narrow, wide, tokenizer):
    """Latent steps of the first model come back to it as they were; those of the other, by its alignment."""
    chain = Chain(narrow, tokenizer, [PLANNER, CRITIC, JUDGER], aligner="ridge", models={"wide": (wide, tokenizer)})
    result = chain.run(QUESTIONS[:1])
    alone = Chain(narrow, tokenizer, [PLANNER, JUDGER], aligner="ridge").run(QUESTIONS[:1])
    stop = next(s.stop[0] for s in result.memory.segments if s.name == "planner:latent")
    torch.testing.assert_close(
        result.memory.keys[:, 0, :, :stop], alone.memory.keys[:, 0, :, :stop], rtol=1e-5, atol=1e-5
    )
    assert set(chain.setup.model_contexts[None].target_aligners) == {"wide"}
    assert set(chain.setup.model_contexts["wide"].target_aligners) == {None}


def test_a_batch_crosses_as_each_question_alone(narrow, wide, tokenizer):
    agents = [[PLANNER, Agent("other", "Plan otherwise: {question}", latent_steps=2)], CRITIC, JUDGER]
    chain = Chain(narrow, tokenizer, agents, aligner="ridge", models={"wide": (wide, tokenizer)})
    together = chain.run(QUESTIONS)
    for row, question in enumerate(QUESTIONS):
        alone = chain.run([question])
        assert alone.answers[0].text == together.answers[row].text
        assert alone.memory.segments == together.memory.select([row]).segments


def test_texts_cross_as_tokens(narrow, wide, tokenizer):
    """A writer in the memory needs no alignment, and the token that was left out comes with the next turn."""
    writer = Agent("writer", "Draft: {question}", max_new_tokens=5)
    judger = Agent("judger", "Answer: {question}", max_new_tokens=6, model="wide")
    chain = Chain(narrow, tokenizer, [writer, judger], models={"wide": (wide, tokenizer)})
    result = chain.run(QUESTIONS[:1])
    ids = turn_ids(tokenizer, writer.text(QUESTIONS[0]), first=True)
    said = PlainLoop(narrow, lambda h, z: h).decode(torch.tensor([ids]), 5)
    turn = turn_ids(tokenizer, judger.text(QUESTIONS[0]), first=False)
    want = PlainLoop(wide, lambda h, z: h).decode(torch.tensor([[*ids, *said, *turn]]), 6)
    assert result.answers[0].text == tokenizer.decode(want, skip_special_tokens=True).strip()
    assert chain.setup.model_contexts[None].target_aligners == {}


def test_cut_memory_crosses_as_it_was_cut(narrow, wide, tokenizer):
    judger = Agent("judger", "Answer: {question}", max_new_tokens=6, model="wide", memory=MemoryPolicy(kinds="latent"))
    chain = Chain(narrow, tokenizer, [PLANNER, judger], aligner="ridge", models={"wide": (wide, tokenizer)})
    result = chain.run(QUESTIONS)
    assert [(s.name, s.stop[0] - s.start[0]) for s in result.memory.segments][:2] == [
        ("planner:prompt", 1), ("planner:latent", 4)
    ]  # fmt: skip


def test_readers_of_notes_may_have_any_tokenizer(narrow, tokenizer):
    """Text crosses between any two models."""
    other = character_tokenizer(None)
    other.add_tokens(["<extra>"])
    reader = Agent("judger", "{notes} Answer: {question}", max_new_tokens=4, model="other")
    writer = Agent("writer", "Draft: {question}", max_new_tokens=5)
    chain = Chain(narrow, tokenizer, [writer, reader], models={"other": (endless("qwen2"), other)})
    assert chain.run(QUESTIONS[:1]).answers[0].turns[1].new_tokens == 4


@pytest.mark.parametrize("what", ["another token", "fewer embeddings"])
def test_where_latent_steps_cannot_cross_text_is_offered(narrow, tokenizer, what):
    other, model = tokenizer, endless("llama")
    if what == "another token":
        other = character_tokenizer(TEMPLATE)
        other.add_tokens(["<extra>"])
        words = r"their tokenizers have other tokens \(\d+ and \d+; '<extra>' is \d+ in one only\)"
    else:
        model = endless("llama", vocab_size=VOCAB - 30)
        words = r"model 'other' has 67 input embeddings for \d+ tokens"
    agents = [PLANNER, Agent("judger", "Answer: {question}", max_new_tokens=4, model="other")]
    with pytest.raises(
        ValueError, match=f"cannot cross from the chain's own model to model 'other': {words}.*max_new_tokens"
    ):
        Chain(narrow, tokenizer, agents, aligner="ridge", models={"other": (model, other)})


def test_a_model_that_was_not_given_is_named(narrow, tokenizer, wide):
    agents = [Agent("judger", "{question}", max_new_tokens=4, model="big")]
    with pytest.raises(ValueError, match=r"on model 'big', which the chain was not given; given are \['wide'\]"):
        Chain(narrow, tokenizer, agents, models={"wide": (wide, tokenizer)})


def test_a_plain_cache_reads_the_same_memory(narrow, wide, tokenizer):
    """transformers goes on from a memory that has crossed."""
    judger = Agent("judger", "Answer: {question}", max_new_tokens=6, model="wide")
    chain = Chain(narrow, tokenizer, [PLANNER, judger], aligner="ridge", models={"wide": (wide, tokenizer)})
    memory = chain.run(QUESTIONS[:1]).memory
    cache = memory.to_hf()
    assert isinstance(cache, DynamicCache)
    with torch.no_grad():
        logits = wide(input_ids=torch.tensor([[5]]), past_key_values=cache).logits
    assert bool(logits.isfinite().all())


def test_buffers_of_both_models_are_counted(narrow, wide, tokenizer, monkeypatch):
    """One model's memory is free before there is the other's."""
    held = count_buffers(monkeypatch)
    agents = [[PLANNER, Agent("other", "Plan otherwise: {question}", latent_steps=2)], CRITIC, JUDGER]
    chain = Chain(narrow, tokenizer, agents, aligner="ridge", models={"wide": (wide, tokenizer)})
    need = chain.kv_bytes(QUESTIONS)
    chain.run(QUESTIONS)
    assert held[0] == need
