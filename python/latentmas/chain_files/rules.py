"""What the agents of a chain file must be to each other, and what their prompts may have in braces."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import yaml

from latentmas.chain.agent import Agent
from latentmas.chain_files.yaml_lines import Faults, fault, line_of, meant, source_lines


@dataclass(frozen=True)
class Member:
    """An agent and the nodes that it was read from."""

    agent: Agent
    node: yaml.Node
    keys: dict[str, yaml.Node]

    def at(self, key: str) -> yaml.Node:
        return self.keys.get(key, self.node)


Step = list[Member | None]
"""One agent, or a parallel group; None stands for what has faults, and no rule looks at it."""


def check_places(prompt: yaml.Node, text: str, known: list[str], owner: str, faults: Faults) -> None:
    """Note names in braces that nothing stands for."""
    for place in dict.fromkeys(_places(text)):
        if place not in known:
            allowed = ", ".join(f"{{{word}}}" for word in known)
            message = f"{owner} has {{{place}}} in its prompt; {meant(place, known)}allowed are {allowed} and fields"
            faults.append((_place_line(prompt, place), f"{message}; {{{{{place}}}}} writes it literally"))


def check_chain(steps: list[Step], faults: Faults) -> None:
    """Note names that are there twice, notes that nobody wrote, thoughts that get lost, a question that nobody gets, and an end
    that is no answer."""
    lines: dict[str, int] = {}
    written = False
    for before, step in pairwise([[], *steps]):
        members = [member for member in step if member]
        for member in members:
            _check_name(member, lines, faults)
            if member.agent.reads_notes:
                _check_notes(member, before, written, faults)
        _check_group(members, faults)
        written = written or any(member is None or not member.agent.thinks for member in step)
    if steps:
        _check_question(steps, faults)
        _check_last(steps[-1], faults)


def _check_question(steps: list[Step], faults: Faults) -> None:
    members = [member for step in steps for member in step]
    whole = [member for member in members if member]
    if len(whole) == len(members) and not any(member.agent.reads_question for member in whole):
        literal = next((member for member in whole if "{{question}}" in member.agent.prompt), None)
        found = "no prompt has {question}, so that nobody gets the question"
        if literal is not None:
            found += f"; {{{{question}}}} of agent {literal.agent.name!r} writes it literally"
        fault(
            faults,
            (literal or whole[0]).at("prompt"),
            f"{found}; allowed is {{question}} in the prompt of an agent or more",
        )


def _check_name(member: Member, lines: dict[str, int], faults: Faults) -> None:
    name, node = member.agent.name, member.at("name")
    if name in lines:
        there = f"agent {name!r} is there already, in line {lines[name]}"
        fault(faults, node, f"{there}; allowed is a name of its own")
    lines.setdefault(name, line_of(node))


def _check_notes(member: Member, before: Step, written: bool, faults: Faults) -> None:
    reads, line = f"agent {member.agent.name!r} reads {{notes}}", _place_line(member.at("prompt"), "notes")
    thinker = next((other.agent.name for other in before if other and other.agent.thinks), None)
    if not written:
        allowed = "allowed is {notes} in a step after an agent with output: text"
        faults.append((line, f"{reads}, but nobody wrote any before it; {allowed}"))
    elif thinker is not None:
        lost = f"and so begins a new memory, in which the thoughts of {thinker!r} before it would be lost"
        faults.append((line, f"{reads} {lost}; allowed is {{notes}} right after a step that writes"))


def _check_group(members: list[Member], faults: Faults) -> None:
    for key, of in _SHARED.items():
        other = next((member for member in members if of(member.agent) != of(members[0].agent)), None)
        if other is not None:
            both = f"agents {members[0].agent.name!r} and {other.agent.name!r} of a parallel group"
            differ = "have {notes} in the prompt of one only" if key == "prompt" else f"differ in {key}"
            fault(faults, other.at(key), f"{both} {differ}; allowed is the same for all of them")


_SHARED: dict[str, Callable[[Agent], Any]] = {
    "model": lambda agent: agent.model,
    "memory": lambda agent: agent.memory,
    "prompt": lambda agent: agent.reads_notes,
}


def _check_last(step: Step, faults: Faults) -> None:
    last = next((member for member in step if member), None)
    if last is not None and (len(step) > 1 or last.agent.thinks):
        name = last.agent.name
        end = f"the group of agent {name!r}" if len(step) > 1 else f"agent {name!r}, which has output: latent"
        at = last.node if len(step) > 1 else last.at("output")
        fault(faults, at, f"the chain ends with {end}; allowed is one agent with output: text")


def _places(text: str) -> list[str]:
    return Agent("-", text, latent_steps=0).placeholders


def _place_line(prompt: yaml.Node, place: str) -> int:
    """Where a place stands in a prompt; where the prompt begins, if it is spelled with escapes."""
    return next((number for number, line in source_lines(prompt) if place in _places(line)), line_of(prompt))
