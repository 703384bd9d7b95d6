"""Agent: what it may be, and how its prompt is filled in; the methods as data."""

from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st
from latentmas import METHODS, hierarchical_agents, latent_agents, single_agent, text_agents
from latentmas.chain.agent import Agent
from latentmas.chain.memory_policy import KEEP_ALL, MemoryPolicy
from latentmas.chain_files.reader import read_builtin, serial

PLACES = ["{question}", "{notes}", "{domain}"]
BRACES = st.text("{}ab\\1g<>\n", max_size=4)  # spells no place; \1 and \g<> mean something to re.sub


@given(
    pieces=st.lists(st.sampled_from(PLACES) | BRACES, max_size=8),
    question=st.sampled_from(["{notes}", "{question}", "\\g<0>"]) | st.text(),
    notes=st.sampled_from(["{notes}", "{domain}", "\\1"]) | st.text(),
    domain=st.sampled_from(["{notes}", "{{domain}}", "\\1"]) | st.text(),
)
def test_all_places_are_filled_in_at_once_and_other_braces_stay(pieces, question, notes, domain):
    """What is filled in is not looked through again."""
    text = "|".join(pieces)  # braces of two pieces make no place of a third
    filled = {"{question}": question, "{notes}": notes, "{domain}": domain}
    agent = Agent("planner", text, latent_steps=1, fields={"domain": domain})
    assert agent.text(question, notes) == "|".join(filled.get(piece, piece) for piece in pieces)


@pytest.mark.parametrize(
    ("prompt", "text", "places"),
    [
        ("{{question}}", "{question}", []),
        ("{{notes}} {notes}", "{notes} N", ["notes"]),
        ("{{{domain}}}", "{{domain}}", []),
        ("{{domain} {domain}}", "{algebra algebra}", ["domain", "domain"]),
        ("{{other}} {other}", "{other} {other}", ["other"]),
        ("{{}} {} { domain }", "{{}} {} { domain }", []),
        ("{domain}: {question}", "algebra: Q", ["domain", "question"]),
    ],
)
def test_doubled_braces_write_a_place_as_it_is(prompt, text, places):
    agent = Agent("planner", prompt, latent_steps=1, fields={"domain": "algebra"})
    assert agent.text("Q", "N") == text
    assert agent.placeholders == places
    assert agent.reads_notes is ("notes" in places)


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
        ("{{notes}}", False),
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
        ({"latent_steps": -1}, "latent_steps must be an integer of 0 or more; got -1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an integer of 1 or more; got 0"),
        ({"latent_steps": 1, "settle": 1.5}, "settle is a cosine, from -1 to 1, .*got 1.5 and latent_steps=1"),
        ({"latent_steps": 1, "settle": float("nan")}, "settle is a cosine, from -1 to 1, .*got nan"),
        ({"max_new_tokens": 1, "settle": 0.9}, "for agents that think; got 0.9 and latent_steps=None"),
        ({"latent_steps": 1, "fields": {"notes": "x"}}, "'notes' is filled in by the chain and cannot be a field"),
        ({"latent_steps": 1, "fields": {"question": "x"}}, "'question' is filled in by the chain"),
    ],
)
def test_agent_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=f"agent 'critic'.*{message}"):
        Agent("critic", "{question}", **options)


def test_agents_get_all_of_the_memory_unless_they_say_otherwise():
    assert Agent("critic", "-", latent_steps=1).memory == KEEP_ALL == MemoryPolicy("all", "all", None)
    assert Agent("critic", "-", latent_steps=1, memory=MemoryPolicy("last")).memory != KEEP_ALL


@pytest.mark.parametrize("settle", [-1, 0.999, 1, None])
def test_an_agent_that_thinks_may_settle(settle):
    agent = Agent("critic", "-", latent_steps=4, settle=settle)
    assert (agent.settle, agent.steps, agent.thinks) == (settle, 4, True)
    assert not Agent("critic", "-", max_new_tokens=4).thinks


def test_agents_can_be_keys():
    agents = [Agent("critic", "-", latent_steps=1, fields={"side": side}) for side in "ab"]
    assert len({agent: agent.name for agent in agents}) == 2


# ---- the methods ---------------------------------------------------------------------------------------------------


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


def test_hierarchical_is_three_thinkers_side_by_side_and_a_judger():
    specialists, judger = hierarchical_agents(3, 7)
    assert shape(specialists) == [
        ("math", 3, None, False), ("science", 3, None, False), ("code", 3, None, False),
    ]  # fmt: skip
    assert shape([judger]) == [("judger", None, 7, False)]


def test_what_the_agents_of_the_first_methods_are_prompts():
    """Results of one method are held against each other over the years: the words stay."""
    prompts = {agent.name: agent.prompt for agent in text_agents()}
    assert prompts == {
        "planner": "Question: {question}\n\nYou are the planner. Write a short plan for answering this question.",
        "critic": "Question: {question}\n\nNotes so far:\n\n{notes}\n\nYou are the critic. Say what is missing in the plan.",
        "refiner": "Question: {question}\n\nNotes so far:\n\n{notes}\n\nYou are the refiner. Write a better plan.",
        "judger": "Notes so far:\n\n{notes}\n\n{question}\n\nThe notes so far may not help. Give the complete answer in your "
        "own words.",
    }
    notes = "Notes so far:\n\n{notes}\n\n"
    assert {agent.name: agent.prompt for agent in latent_agents()} == {
        name: prompt.replace(notes, "") for name, prompt in prompts.items()
    }
    assert single_agent()[0].prompt == "{question}\n\nGive the complete answer in your own words."


def test_methods_are_found_by_name():
    assert list(METHODS) == ["debate", "hierarchical", "mix", "sequential", "single", "text", "latent"]
    assert METHODS["single"](3, 7) == single_agent(7)
    assert METHODS["text"](3, 7) == text_agents(7)
    assert METHODS["latent"](3, 7) == METHODS["sequential"](3, 7) == latent_agents(3, 7)
    assert METHODS["hierarchical"](3, 7) == hierarchical_agents(3, 7)
    for name in ("debate", "mix"):
        assert METHODS[name](3, 7) == read_builtin(name, latent_steps=3, max_new_tokens=7).agents


def test_methods_do_not_read_files_of_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "single").write_text("agents: [{name: other, output: text, prompt: x}]")
    assert [agent.name for agent in METHODS["single"](3, 7)] == ["solver"]


@pytest.mark.parametrize("method", METHODS)
def test_every_agent_of_a_method_is_prompts_the_question_once(method):
    """And the notes once, if at all; the texts leave no place unfilled."""
    for agent in serial(METHODS[method](3, 7)):
        text = agent.text("Why 7?", "planner:\nyes")
        assert text.count("Why 7?") == 1
        assert text.count("planner:\nyes") == int(agent.reads_notes)
        assert "{" not in text


def test_the_answer_is_asked_for_in_the_same_words_by_every_method():
    """Methods are held against each other: their last agents must not differ in what they are asked for."""
    last = [METHODS[method](3, 7)[-1].prompt for method in METHODS]
    asked = {prompt.rsplit("\n\n", 1)[1].split(" not help. ")[-1] for prompt in last}
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("name", {"name": "a\ud83d"}),
        ("prompt", {"prompt": "\udcff {question}"}),
        ("system", {"system": "\ud83d"}),
        ("side", {"fields": {"side": "\ud83d"}}),
    ],
)
def test_halves_of_characters_are_refused(what, options):
    """No tokenizer takes them: it would be a TypeError in the middle of a run."""
    with pytest.raises(ValueError, match=rf": {what} holds '\\ud\w+' at character \d, half a surrogate pair"):
        Agent(**{"name": "a", "prompt": "{question}", "latent_steps": 1, **options})
