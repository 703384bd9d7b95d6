"""Agent: what it may be, and how its prompt is filled in; the three methods as data."""

from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latentmas.agents import Agent
from latentmas.methods import METHODS, latent_agents, single_agent, text_agents

PLACES = ["{question}", "{notes}"]
BRACES = st.text("{}ab\\1g<>\n", max_size=4)  # spells no place; \1 and \g<> mean something to re.sub


@given(
    pieces=st.lists(st.sampled_from(PLACES) | BRACES, max_size=8),
    question=st.sampled_from(["{notes}", "{question}", "\\g<0>"]) | st.text(),
    notes=st.sampled_from(["{notes}", "{question}", "\\1"]) | st.text(),
)
def test_both_places_are_filled_in_at_once_and_other_braces_stay(pieces, question, notes):
    """What is filled in is not looked through again."""
    filled = {"{question}": question, "{notes}": notes}
    agent = Agent("planner", "".join(pieces), latent_steps=1)
    assert agent.text(question, notes) == "".join(filled.get(piece, piece) for piece in pieces)


def test_an_agent_without_places_says_the_same_to_every_question():
    assert Agent("planner", "Plan {it}.", latent_steps=1).text("Why?", "planner:\nyes") == "Plan {it}."


def test_without_notes_their_place_is_empty():
    assert Agent("judger", "<{notes}> {question}", max_new_tokens=1).text("Why?") == "<> Why?"


@pytest.mark.parametrize(
    ("prompt", "reads"),
    [
        ("{notes}", True),
        ("{question}\n\n{notes}!", True),
        ("{question}", False),
        ("{ notes }", False),
        ("notes", False),
    ],
)
def test_an_agent_reads_notes_where_its_prompt_has_a_place_for_them(prompt, reads):
    assert Agent("critic", prompt, max_new_tokens=1).reads_notes is reads


def test_steps_are_the_positions_added_behind_the_prompt():
    assert Agent("planner", "-", latent_steps=7).steps == 7
    assert Agent("reader", "-", latent_steps=0).steps == 0
    assert Agent("judger", "-", max_new_tokens=9).steps == 9


def test_agents_do_not_change():
    with pytest.raises(FrozenInstanceError):
        Agent("planner", "-", latent_steps=7).latent_steps = 8


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


# ---- the three methods ---------------------------------------------------------------------------------------------


def shape(agents):
    """(name, latent steps, new tokens, whether it reads notes) of each."""
    return [(agent.name, agent.latent_steps, agent.max_new_tokens, agent.reads_notes) for agent in agents]


def test_single_is_one_agent_that_answers():
    assert shape(single_agent(7)) == [("solver", None, 7, False)]


def test_text_is_four_writers_of_which_all_but_the_first_read_notes():
    assert shape(text_agents(7)) == [
        ("planner", None, 7, False), ("critic", None, 7, True), ("refiner", None, 7, True), ("judger", None, 7, True),
    ]  # fmt: skip


def test_latent_is_three_thinkers_and_a_judger_in_one_memory():
    assert shape(latent_agents(3, 7)) == [
        ("planner", 3, None, False), ("critic", 3, None, False), ("refiner", 3, None, False),
        ("judger", None, 7, False),
    ]  # fmt: skip


def test_methods_are_found_by_name():
    assert list(METHODS) == ["single", "text", "latent"]
    assert METHODS["single"](3, 7) == single_agent(7)
    assert METHODS["text"](3, 7) == text_agents(7)
    assert METHODS["latent"](3, 7) == latent_agents(3, 7)


@pytest.mark.parametrize("method", METHODS)
def test_every_agent_of_a_method_is_told_the_question_once(method):
    """And the notes once, if at all; the texts leave no place unfilled."""
    for agent in METHODS[method](3, 7):
        text = agent.text("Why 7?", "planner:\nyes")
        assert text.count("Why 7?") == 1
        assert text.count("planner:\nyes") == int(agent.reads_notes)
        assert "{" not in text


def test_the_answer_is_asked_for_in_the_same_words_by_every_method():
    """Methods are held against each other: their last agents must not differ in what they are asked for."""
    asked = {METHODS[method](3, 7)[-1].prompt.rsplit("\n\n", 1)[1].split(" not help. ")[-1] for method in METHODS}
    assert len(asked) == 1
