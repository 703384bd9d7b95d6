"""Chains, models and prompts of the tests of chains, and the chain written out as the calls that it is made of."""

from dataclasses import replace

import torch
from latentmas.chain.agent import Agent
from latentmas.chain.prompts import padded, turn_ids
from tiny_models import tiny_model

from latentmas_kernels import generate, latent_generate

TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '|' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)

SWITCH = "{% if enable_thinking %}{{ '<think>' }}{% endif %}"

CHATML = (
    "{% for message in messages %}{{ '(' + message['role'] + ')' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '(assistant)' }}{% endif %}"
)

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


# Latent steps and texts take turns in one cache.
MIXED = [
    Agent("planner", "Plan: {question}", latent_steps=4),
    Agent("critic", "Criticise.", max_new_tokens=6),
    Agent("refiner", "Refine: {question}", latent_steps=3),
    Agent("judger", "Answer: {question}", max_new_tokens=9),
]

FIRST = replace(AGENTS[2], name="first")

CHAINS = {"alone": AGENTS[-1:], "thinkers": AGENTS, "readers": READERS, "mixed": MIXED}

MATH = Agent("math", "Q: {question} As a mathematician.", latent_steps=4)

CODE = Agent("code", "Q: {question} As a programmer, say how.", latent_steps=2)

WORDS = Agent("words", "Q: {question} Write.", max_new_tokens=5)

JUDGER = Agent("judger", "Answer: {question}", max_new_tokens=6)

QUESTIONS = ["Why?", "What is 12 times 7, and why is it so?", "Name a colour.", "x"]

SENTENCES = [
    "Why is the sky blue, and not green or red?",
    "What is 12 times 7, and why is it so?",
    "Name a colour.",
    "x",
]

PER_SLOT = 2 * 3 * 2 * 16 * 4  # keys and values, layers, heads, width, bytes


def endless(positions=4096, name="llama", **overrides):
    """A model that never stops, so that lengths are known."""
    model = tiny_model(name, max_position_embeddings=positions, **overrides)
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


def ids_of(tokenizer, agent, question, *, first):
    return torch.tensor([turn_ids(tokenizer, agent.text(question), first=first)])


def double_moved(keys, shifts, inv_freq):
    """Keys [layers, heads, n, hd] moved by shifts [n], in float64."""
    low, high = keys.double().chunk(2, dim=-1)
    angle = shifts.double()[:, None] * inv_freq.double()
    return torch.cat([low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()], dim=-1)
