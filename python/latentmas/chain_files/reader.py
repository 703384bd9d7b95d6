"""Chains as data: agents from a YAML file, or from one of those that come with the package."""

import difflib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.resources import files
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from latentmas.chain.agent import PLACEHOLDERS, Agent
from latentmas.chain.memory_policy import KEEP_ALL, MEMORY_POLICIES, Budget, MemoryPolicy
from latentmas.chain_files import yaml_lines
from latentmas.chain_files.rules import Member, Step, check_chain, check_places
from latentmas.chain_files.yaml_lines import Faults, fault, meant, peek, quoted, shown
from latentmas_kernels.errors import LatentMASError

LIMIT = 1000
"""Agents, groups and repeats of a chain after expansion, at most: aliases and repeats make much of little."""

SHOWN_FAULTS = 50
"""Lines of a message, at most, of faults; the others are counted."""

ROUND = "round"


@dataclass(frozen=True)
class ChainFile:
    """A chain as its file describes it.

    Attributes:
        name: the file's own, or the file's name without its ending.
        agents: in order; a list among them is a group that thinks or writes side by side.
        budget: what the memory may take; None is no limit.
        description: text from the file, or "".
        source: the path or name that it was read from.
    """

    name: str
    agents: list[Agent | list[Agent]]
    budget: Budget | None
    description: str
    source: str


def read_chain(
    source: str | Path,
    *,
    latent_steps: int | None = None,
    max_new_tokens: int | None = None,
    enable_thinking: bool = False,
) -> ChainFile:
    """Read a chain from a file, or where there is no such file, one that comes with the package.

    Args:
        source: a path, or a name of `builtin_chains()`.
        latent_steps, max_new_tokens: in place of the file's defaults; agents with numbers of their own keep them.
        enable_thinking: turn a chat template's thinking switch on for all agents.

    Raises:
        ValueError: for a chain that there is not, or with all faults of the file, a line for each:
            "FILE:LINE: what was found; what is allowed".
        OSError: where the file cannot be read.
    """
    path = Path(source)
    if not path.exists() or path.is_dir():
        if str(source) in builtin_chains():
            return read_builtin(
                str(source), latent_steps=latent_steps, max_new_tokens=max_new_tokens, enable_thinking=enable_thinking
            )
        close = difflib.get_close_matches(path.stem, builtin_chains(), n=1)
        raise LatentMASError(
            f"got chain {str(source)!r}, which is {'a folder' if path.is_dir() else 'no file'}; "
            + (f"did you mean {close[0]}? Give" if close else "give")
            + f" a file, or a chain that comes with the package: {', '.join(builtin_chains())}"
        )
    return _read(path.read_bytes(), str(source), _given(latent_steps, max_new_tokens, enable_thinking))


def read_builtin(
    name: str, *, latent_steps: int | None = None, max_new_tokens: int | None = None, enable_thinking: bool = False
) -> ChainFile:
    """A chain that comes with the package, whatever files there are; arguments as in `read_chain`."""
    data = files("latentmas.chain_files").joinpath(f"{name}.yaml").read_bytes()
    return _read(data, name, _given(latent_steps, max_new_tokens, enable_thinking))


def builtin_chains() -> list[str]:
    """Names of the chains that come with the package."""
    folder = files("latentmas.chain_files")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def serial(agents: Iterable[Agent | list[Agent]]) -> list[Agent]:
    """The agents one after the other: those of a group see the ones before them, as in the published code."""
    return [agent for entry in agents for agent in (entry if isinstance(entry, list) else [entry])]


# ---- values ----------------------------------------------------------------------------------------------------------


def _name(node: yaml.Node, what: str, faults: Faults) -> str | None:
    name = yaml_lines.text(node, what, faults)
    if name is None or name.isprintable():
        return name
    fault(faults, node, f"{what} {shown(node)}; allowed is one line of text")
    return None


def _memory(node: yaml.Node, what: str, faults: Faults) -> MemoryPolicy | None:
    if isinstance(node, yaml.MappingNode):
        before = len(faults)
        keys = yaml_lines.mapping(node, f"{what}, which", faults, tuple(_MEMORY)) or {}
        values = {key: _MEMORY[key](value, f"{what} with {key}", faults) for key, value in keys.items()}
        return MemoryPolicy(**values) if len(faults) == before else None
    if isinstance(node, yaml.ScalarNode) and node.value in MEMORY_POLICIES:
        return MEMORY_POLICIES[node.value]
    allowed = yaml_lines.listed([*MEMORY_POLICIES, "{agents: all|last, kinds: all|latent, slots: N}"])
    fault(faults, node, f"{what} {shown(node)}; allowed is {allowed}")
    return None


def _budget(node: yaml.Node, what: str, faults: Faults) -> Budget | None:
    try:
        return Budget.parse(node.value if isinstance(node, yaml.ScalarNode) else "")
    except (ValueError, OverflowError):  # the latter for numbers beyond a float
        allowed = 'sizes like "64 MB" (KB, MB, GB) and numbers like "512 slots"'
        fault(faults, node, f"{what} {shown(node)}; allowed are {allowed}")
        return None


def _fields(node: yaml.Node, what: str, faults: Faults) -> dict[str, str] | None:
    """Text by name. A value with a fault is kept empty, so that its places are not faults as well."""
    keys = yaml_lines.mapping(node, f"{what}, which", faults)
    if keys is None:
        return None
    fields: dict[str, str] = {}
    for key, value in keys.items():
        if key in (*PLACEHOLDERS, ROUND):
            fault(faults, value, f"{what} with {key}, which the chain fills in; allowed are other names")
        elif not key.isidentifier():
            fault(
                faults, value, f"{what} with {quoted(key)}; allowed are names of letters, digits and _, no digit first"
            )
        else:
            fields[key] = yaml_lines.text_or_number(value, f"{what} with {key}", faults) or ""
    return fields


_Reader = Callable[[yaml.Node, str, Faults], Any]
_MEMORY: dict[str, _Reader] = {
    "agents": partial(yaml_lines.choice, options=("all", "last")),
    "kinds": partial(yaml_lines.choice, options=("all", "latent")),
    "slots": partial(yaml_lines.integer, least=1),
}
_DEFAULTS: dict[str, _Reader] = {
    "latent_steps": partial(yaml_lines.integer, least=0),
    "max_new_tokens": partial(yaml_lines.integer, least=1),
    "system": partial(yaml_lines.text, empty=True),
    "settle": partial(yaml_lines.decimal, low=-1, high=1),
    "memory": _memory,
    "fields": _fields,
}
"""What an agent may say for itself, and the file for all of them."""
_CHAIN: dict[str, _Reader] = {
    "name": _name,
    "description": partial(yaml_lines.text, empty=True),
    **_DEFAULTS,
    "budget": _budget,
}
_AGENT: dict[str, _Reader] = {
    "name": _name,
    "prompt": yaml_lines.text,
    "output": partial(yaml_lines.choice, options=("latent", "text")),
    **_DEFAULTS,
    "model": _name,
    "think": yaml_lines.boolean,
}
_NEEDED = ("name", "prompt", "output")


def _values(keys: dict[str, yaml.Node], readers: dict[str, _Reader], owner: str, faults: Faults) -> dict[str, Any]:
    """The values that can be read."""
    values = {key: readers[key](node, f"{owner} has {key}", faults) for key, node in keys.items() if key in readers}
    return {key: value for key, value in values.items() if value is not None}


# ---- the file --------------------------------------------------------------------------------------------------------


@dataclass
class _Reading:
    """What is known while a file is read: defaults of its agents, faults so far, and entries that were counted."""

    defaults: dict[str, Any]
    faults: Faults = field(default_factory=list)
    counted: int = 0

    def fault(self, node: yaml.Node, message: str) -> None:
        fault(self.faults, node, message)

    def count(self, node: yaml.Node, more: int = 1) -> bool:
        """Whether there is room for so many more entries."""
        if self.counted <= LIMIT < self.counted + more:
            self.fault(node, f"the chain grows beyond {LIMIT} agents, groups and repeats here; allowed are {LIMIT}")
        self.counted += more
        return self.counted <= LIMIT

    def entries(self, node: yaml.Node, what: str, least: int = 1) -> Iterator[yaml.Node]:
        """Entries of a list, up to the limit."""
        return takewhile(self.count, yaml_lines.items(node, what, self.faults, least) or [])


def _given(latent_steps: int | None, max_new_tokens: int | None, enable_thinking: bool) -> dict[str, Any]:
    """Defaults that the caller sets."""
    given: dict[str, Any] = {"think": enable_thinking}
    for name, value, least in (("latent_steps", latent_steps, 0), ("max_new_tokens", max_new_tokens, 1)):
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise LatentMASError(f"{name} must be an integer of {least} or more; got {value!r}")
            given[name] = value
    return given


def _read(data: bytes, source: str, given: dict[str, Any]) -> ChainFile:
    reading = _Reading({"latent_steps": 10, "max_new_tokens": 256})
    values: dict[str, Any] = {}
    steps: list[Step] = []
    root = yaml_lines.compose(data, reading.faults)
    keys = None if root is None else yaml_lines.mapping(root, "the chain", reading.faults, (*_CHAIN, "agents"))
    if keys is not None:
        values = _values(keys, _CHAIN, "the chain", reading.faults)
        reading.defaults |= {key: value for key, value in values.items() if key in _DEFAULTS} | given
        steps = _steps(root, keys, "the chain", reading)
        check_chain(steps, reading.faults)
    if reading.faults:
        told = sorted(set(reading.faults))
        if len(told) > SHOWN_FAULTS:
            more = (
                told[SHOWN_FAULTS][0],
                f"and {len(told) - SHOWN_FAULTS:,} more faults from here on; mend those above first",
            )
            told = [*told[:SHOWN_FAULTS], more]
        raise LatentMASError("\n".join(f"{source}:{line}: {message}" for line, message in told))
    groups = [[member.agent for member in step if member] for step in steps]
    agents = [group[0] if len(group) == 1 else group for group in groups]
    name, description = values.get("name", Path(source).stem), values.get("description", "").strip()
    return ChainFile(name, agents, values.get("budget"), description, source)


def _steps(
    node: yaml.Node, keys: dict[str, yaml.Node], owner: str, reading: _Reading, *, repeated: bool = False
) -> list[Step]:
    """What is under "agents" of the chain or of a repeat, repeats expanded."""
    if "agents" not in keys:
        reading.fault(node, f"{owner} has no agents; allowed is a list of them")
        return []
    steps: list[Step] = []
    for entry in reading.entries(keys["agents"], f"{owner} has agents"):
        if peek(entry, "parallel") is not None:
            steps.append(_group(entry, reading, repeated))
        elif peek(entry, "repeat") is None:
            steps.append([_agent(entry, reading, repeated)])
        elif repeated:
            reading.fault(entry, "a repeat has a repeat inside it; allowed are agents and parallel groups")
        else:
            steps += _repeat(entry, reading)
    return steps or [[None]]


def _group(node: yaml.Node, reading: _Reading, repeated: bool) -> Step:
    keys = yaml_lines.mapping(node, "a parallel group", reading.faults, ("parallel",)) or {}
    members: Step = []
    for entry in reading.entries(keys["parallel"], "a parallel group has parallel", least=2):
        if peek(entry, "parallel") is not None or peek(entry, "repeat") is not None:
            reading.fault(entry, "a parallel group has a group or a repeat inside it; allowed are agents")
        else:
            members.append(_agent(entry, reading, repeated))
    return members or [None]


def _repeat(node: yaml.Node, reading: _Reading) -> list[Step]:
    """Its steps, so many times; the round goes into the agents' names and into a field."""
    keys = yaml_lines.mapping(node, "a repeat", reading.faults, ("repeat", "agents")) or {}
    times = yaml_lines.integer(keys["repeat"], "a repeat has repeat", reading.faults, least=1)
    steps = _steps(node, keys, "a repeat", reading, repeated=True)
    if times is None or not reading.count(keys["repeat"], (times - 1) * sum(map(len, steps))):
        return [[None]]
    return [[_in_round(member, number) for member in step] for number in range(1, times + 1) for step in steps]


def _in_round(member: Member | None, number: int) -> Member | None:
    if member is None:
        return None
    name, fields = f"{member.agent.name} {number}", {**member.agent.fields, ROUND: str(number)}
    return replace(member, agent=replace(member.agent, name=name, fields=fields))


# ---- an agent --------------------------------------------------------------------------------------------------------


def _agent(node: yaml.Node, reading: _Reading, repeated: bool) -> Member | None:
    before = len(reading.faults)
    if isinstance(node, yaml.MappingNode) and all(peek(node, key) is None for key in _NEEDED):
        found = next((str(key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)), "")
        guess = meant(found, ("parallel", "repeat"))
        allowed = f"allowed are agents ({', '.join(_NEEDED)}), parallel and repeat"
        reading.fault(node, f"an entry of agents begins with {quoted(found)}; {guess}{allowed}")
        return None
    name = peek(node, "name")
    owner = f"agent {name.value[:40]!r}" if isinstance(name, yaml.ScalarNode) and name.value else "an agent"
    keys = yaml_lines.mapping(node, owner, reading.faults, tuple(_AGENT)) or {}
    values = _values(keys, _AGENT, owner, reading.faults)
    _check_agent(node, keys, values, owner, reading)
    if "prompt" in values:
        fields = {**reading.defaults.get("fields", {}), **values.get("fields", {})}
        known = [*PLACEHOLDERS, *([ROUND] if repeated else []), *fields]
        check_places(keys["prompt"], values["prompt"], known, owner, reading.faults)
    if len(reading.faults) > before:
        return None
    try:
        return Member(_built(values, reading.defaults), node, keys)
    except ValueError as error:
        reading.fault(node, str(error))
        return None


def _check_agent(
    node: yaml.Node, keys: dict[str, yaml.Node], values: dict[str, Any], owner: str, reading: _Reading
) -> None:
    missing = [key for key in _NEEDED if key not in keys]
    if isinstance(node, yaml.MappingNode) and missing:
        reading.fault(node, f"{owner} has no {' and no '.join(missing)}; allowed are agents with {', '.join(_NEEDED)}")
    for mark in (":", " + "):  # "name:kind" is a segment, "one + other" what agents side by side read together
        if mark in values.get("name", ""):
            reading.fault(keys["name"], f'{owner} has "{mark}" in its name; allowed are names without it')
    output = values.get("output")
    others = {"text": ("latent_steps", "settle"), "latent": ("max_new_tokens",)}
    for key in others.get(str(output), ()):
        if key in keys:
            other = "latent" if output == "text" else "text"
            reading.fault(keys[key], f"{owner} has {key} and output: {output}; allowed is {key} with output: {other}")


def _built(values: dict[str, Any], defaults: dict[str, Any]) -> Agent:
    """The agent, with the defaults for what it does not say itself."""
    thinks = values["output"] == "latent"
    said = defaults | values
    return Agent(
        said["name"],
        said["prompt"],
        latent_steps=said["latent_steps"] if thinks else None,
        max_new_tokens=None if thinks else said["max_new_tokens"],
        system=said.get("system") or None,
        enable_thinking=defaults["think"] or said["think"],
        settle=said.get("settle") if thinks else None,
        memory=said.get("memory", KEEP_ALL),
        model=said.get("model"),
        fields={**defaults.get("fields", {}), **values.get("fields", {})},
    )
