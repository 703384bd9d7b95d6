"""A chain file's entries as agents, and the lines of its faults.

`yaml.compose` gives nodes, which know their lines; `schema` checks the values of each mapping; `check_chain` checks what the
agents must be to each other. A fault hides no other one: an entry with faults is left out of the rules of the chain.
"""

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from latentmas.chain.agent import PLACEHOLDERS, Agent
from latentmas.chain.memory_policy import MemoryPolicy
from latentmas.chain.stages import check_chain
from latentmas.chain_files.schema import ROUND, TEXT, AgentEntry, ChainEntry, GroupEntry, Memory, RepeatEntry
from latentmas.chain_files.yaml_nodes import Faults, compose, line_of, pairs, plain, shown, source_lines
from latentmas.characters import quoted
from latentmas_kernels.errors import LatentMASError

LIMIT = 1000
"""Agents, groups and repeats of a chain after expansion, at most: aliases and repeats make much of little."""

SHOWN_FAULTS = 50
"""Lines of a message, at most, of faults; the others are counted."""

STAND_IN = Agent("-", "{question}", max_new_tokens=1)
"""In place of an entry with faults: breaks no rule of any chain."""


def parse(
    data: bytes, source: str, defaults: dict[str, Any], enable_thinking: bool
) -> tuple[ChainEntry, list[Agent | list[Agent]]]:
    """Return a chain file's own values and its agents, groups as lists.

    Args:
        data: the file.
        source: its name in messages.
        defaults: latent_steps and max_new_tokens that replace the file's.
        enable_thinking: turn a chat template's thinking switch on for all agents.

    Raises:
        LatentMASError: all faults of the file, a line for each.
    """
    parser = _Parser(defaults, enable_thinking)
    root = compose(data, parser.faults)
    chain, stages = (None, []) if root is None else parser.chain(root)
    if parser.faults or chain is None:
        faults = sorted(set(parser.faults))
        if len(faults) > SHOWN_FAULTS:
            count = f"and {len(faults) - SHOWN_FAULTS:,} more faults from here on; mend those above first"
            faults[SHOWN_FAULTS:] = [(faults[SHOWN_FAULTS][0], count)]
        raise LatentMASError("\n".join(f"{source}:{line}: {message}" for line, message in faults))
    groups = [[member.agent for member in stage] for stage in stages]
    return chain, [group[0] if len(group) == 1 else group for group in groups]


@dataclass(frozen=True)
class _Entry:
    """A mapping of the file.

    Attributes:
        node: where it begins.
        keys: nodes of its values.
        data: its values without those that have faults; lists are nodes.
        model: what `schema` made of them; None where one has a fault.
    """

    node: yaml.Node
    keys: dict[str, yaml.Node]
    data: dict[str, Any]
    model: Any = None


@dataclass(frozen=True)
class _Member:
    """An agent and its entry. Where the entry has faults, the agent is one that breaks no rule of its chain."""

    agent: Agent
    entry: _Entry
    faulty: bool = False


_Stages = list[list[_Member]]


@dataclass
class _Parser:
    """A file while it is read: faults so far, defaults of its agents, and how many entries were counted."""

    given: dict[str, Any]
    enable_thinking: bool
    faults: Faults = field(default_factory=list)
    defaults: dict[str, Any] = field(default_factory=dict)
    fields: list[str] = field(default_factory=list)
    counted: int = 0

    def chain(self, root: yaml.Node) -> tuple[Any, _Stages]:
        """Return the chain's own values, None where one has a fault, and its stages."""
        chain = self._entry(root, "the chain", ChainEntry)
        own = ("name", "description", "budget", "agents")
        self.defaults = {key: value for key, value in chain.data.items() if key not in own} | self.given
        self.fields = list(pairs(chain.keys.get("fields")))
        stages = self._stages(chain)
        members = [(member, stage[0]) for stage in stages for member in stage]
        rules = check_chain([[member.agent for member in stage] for stage in stages]) if stages else []
        for rule in rules:
            member, first = members[rule.agent or 0]
            member = first if rule.field is None else member
            if not member.faulty:
                key = "output" if rule.field == "latent_steps" else str(rule.field)
                at = member.entry.keys.get(key, member.entry.node)
                line = _line_of_place(at, "notes") if "{notes}" in rule.message else line_of(at)
                self.faults.append((line, rule.message))
        return chain.model, stages

    def fault(self, node: yaml.Node, message: str) -> None:
        self.faults.append((line_of(node), message))

    def _count(self, node: yaml.Node, more: int = 1) -> bool:
        """Return whether there is room for so many more entries; the first time there is not, it is a fault."""
        if self.counted <= LIMIT < self.counted + more:
            self.fault(node, f"the chain grows beyond {LIMIT} agents, groups and repeats here; allowed are {LIMIT}")
        self.counted += more
        return self.counted <= LIMIT

    def _list(self, entry: _Entry, key: str) -> Iterator[yaml.Node]:
        return takewhile(self._count, entry.data[key].value if key in entry.data else [])

    # ---- a mapping -------------------------------------------------------------------------------------------------

    def _entry(
        self, node: yaml.Node, owner: str, model: type[BaseModel], defaults: dict[str, Any] | None = None
    ) -> _Entry:
        """Read a mapping, on top of the defaults, and note the faults of its keys and values."""
        if not isinstance(node, yaml.MappingNode):
            self.fault(node, f"{owner} is {shown(node)}; allowed is a mapping (key: value)")
            return _Entry(node, {}, {})
        data = dict(defaults or {})
        found = pairs(node, owner, self.faults)
        for key, (_, value) in found.items():
            data[key] = plain(value)
            if key in ("memory", "fields") and isinstance(value, yaml.MappingNode):
                inner = pairs(value, f"{owner} has {key}, which", self.faults)
                data[key] = {name: plain(node, numbers_as_text=key == "fields") for name, (_, node) in inner.items()}
                if key == "fields":
                    data[key] = {**(defaults or {}).get(key, {}), **data[key]}
        keys = {key: value for key, (_, value) in found.items()}
        try:
            return _Entry(node, keys, data, model.model_validate(data))
        except ValidationError as refused:
            errors = refused.errors(include_url=False)
        missing = [str(error["loc"][0]) for error in errors if error["type"] == "missing"]
        needed = [key for key, info in model.model_fields.items() if info.is_required()]
        unknown = any(error["type"] == "extra_forbidden" for error in errors)
        if missing and not (unknown and missing == needed and model is AgentEntry):  # else a misspelled group
            allowed = f"allowed is an entry with {', '.join(needed)}"
            self.fault(node, f"{owner} has no {' and no '.join(missing)}; {allowed}")
        for error in errors:
            if error["type"] != "missing":
                self._value_fault(error, found, owner, model)
            data.pop(str(error["loc"][0]), None)
        return _Entry(node, keys, data)

    def _value_fault(self, error: Any, found: Any, owner: str, model: type[BaseModel]) -> None:
        """Note an error of pydantic: what was found, and the description of what is allowed."""
        name, *inside = map(str, error["loc"])
        what, (word, node), known = f"{owner} has", found[name], model.model_fields
        if inside:  # of a memory policy, or a field of a prompt
            what, name, known = f"{what} {name} with", inside[0], Memory.model_fields
            word, node = pairs(node)[name]
        if error["type"] == "extra_forbidden":
            guess = _did_you_mean(name, [*known, "parallel", "repeat"] if model is AgentEntry else list(known))
            self.fault(word, f"{what} the unknown key {quoted(name)}; {guess}allowed are {', '.join(known)}")
            return
        allowed = known[name].description if name in known else TEXT
        if error["type"] == "value_error":
            allowed = str(error["ctx"]["error"])
        elif error["type"] == "literal_error":
            allowed = error["ctx"]["expected"].replace("'", "")
        if "[key]" in inside:
            self.fault(word, f"{what} {quoted(name)}; allowed is {allowed}")
        else:
            self.fault(node, f"{what} {name} {shown(node)}; allowed is {allowed}")

    # ---- stages ----------------------------------------------------------------------------------------------------

    def _stages(self, entry: _Entry, *, repeated: bool = False) -> _Stages:
        """Return what is under "agents" of the chain or of a repeat, repeats expanded."""
        stages: _Stages = []
        for node in self._list(entry, "agents"):
            keys = pairs(node)
            if "parallel" in keys:
                stages.append(self._group(node, repeated))
            elif "repeat" not in keys:
                stages.append([self._agent(node, repeated)])
            elif repeated:
                self.fault(node, "a repeat has a repeat inside it; allowed are agents and parallel groups")
            else:
                stages += self._repeat(node)
        return stages or [[_stand_in(entry)]]

    def _group(self, node: yaml.Node, repeated: bool) -> list[_Member]:
        entry = self._entry(node, "a parallel group", GroupEntry)
        members = []
        for inner in self._list(entry, "parallel"):
            if pairs(inner).keys() & {"parallel", "repeat"}:
                self.fault(inner, "a parallel group has a group or a repeat inside it; allowed are agents")
            else:
                members.append(self._agent(inner, repeated))
        whole = next((member.agent for member in members if not member.faulty), None)
        return [_stand_in(m.entry, whole) if m.faulty else m for m in members] or [_stand_in(entry)]

    def _repeat(self, node: yaml.Node) -> _Stages:
        """Return its stages, so many times; the round goes into the agents' names and into a field."""
        entry = self._entry(node, "a repeat", RepeatEntry)
        stages = self._stages(entry, repeated=True)
        times = entry.data.get("repeat", 0)
        if not times or not self._count(entry.keys["repeat"], (times - 1) * sum(map(len, stages))):
            return [[_stand_in(entry)]]
        return [[_in_round(member, number) for member in stage] for number in range(1, times + 1) for stage in stages]

    def _agent(self, node: yaml.Node, repeated: bool) -> _Member:
        before = len(self.faults)
        _, name = pairs(node).get("name", (None, None))
        owner = f"agent {name.value[:40]!r}" if isinstance(name, yaml.ScalarNode) and name.value else "an agent"
        entry = self._entry(node, owner, AgentEntry, self.defaults)
        output = entry.data.get("output")
        for key, needed in (("latent_steps", "latent"), ("settle", "latent"), ("max_new_tokens", "text")):
            if key in entry.keys and output not in (None, needed):
                message = f"{owner} has {key} and output: {output}; allowed is {key} with output: {needed}"
                self.fault(entry.keys[key], message)
        if "prompt" in entry.data:
            own = pairs(entry.keys.get("fields"))
            known = [*PLACEHOLDERS, *([ROUND] if repeated else []), *self.fields, *own]
            for place in dict.fromkeys(_places(entry.data["prompt"])):
                if place not in known:
                    allowed = ", ".join(f"{{{word}}}" for word in known)
                    found = f"{owner} has {{{place}}} in its prompt; {_did_you_mean(place, known)}allowed are {allowed}"
                    line = _line_of_place(entry.keys["prompt"], place)
                    self.faults.append((line, f"{found} and fields; {{{{{place}}}}} writes it literally"))
        if len(self.faults) == before:
            try:
                return _Member(_agent_of(entry.model, self.enable_thinking), entry)
            except LatentMASError as error:
                self.fault(node, str(error))
        return _stand_in(entry)


def _agent_of(entry: AgentEntry, enable_thinking: bool) -> Agent:
    thinks = entry.output == "latent"
    return Agent(
        entry.name, entry.prompt, latent_steps=entry.latent_steps if thinks else None,
        max_new_tokens=None if thinks else entry.max_new_tokens, system=entry.system or None,
        enable_thinking=enable_thinking or entry.think, settle=entry.settle if thinks else None,
        memory=MemoryPolicy(**entry.memory.model_dump()), model=entry.model or None, fields=entry.fields,
    )  # fmt: skip


def _stand_in(entry: _Entry, beside: Agent | None = None) -> _Member:
    """Return a member for an entry with faults: it writes, gets the question, and agrees with the agent beside it."""
    agent = replace(STAND_IN, name=f"line {line_of(entry.node)}")
    if beside is not None:
        prompt = agent.prompt + ("{notes}" if beside.reads_notes else "")
        agent = replace(agent, prompt=prompt, model=beside.model, memory=beside.memory)
    return _Member(agent, entry, faulty=True)


def _in_round(member: _Member, number: int) -> _Member:
    agent = member.agent
    name, fields = f"{agent.name} {number}", {**agent.fields, ROUND: str(number)}
    return replace(member, agent=replace(agent, name=name, fields=fields))


def _places(text: str) -> list[str]:
    return replace(STAND_IN, prompt=text).placeholders


def _line_of_place(prompt: yaml.Node, place: str) -> int:
    """Return the line of a place in a prompt; the line where the prompt begins, if it is spelled with escapes."""
    return next((number for number, line in source_lines(prompt) if place in _places(line)), line_of(prompt))


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word[:40], known, n=1)
    return f"did you mean {close[0]}? " if close else ""
