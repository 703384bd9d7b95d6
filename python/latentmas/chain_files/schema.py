"""The keys of a chain file and the types of their values, as pydantic models.

A description, or the message of a validator's ValueError, ends the sentence "found ...; allowed is ...". Models are strict:
`latentmas.chain_files.parser` gives them Python values only where YAML leaves no doubt, and a `yaml.Node`, which no type
takes, for everything else.
"""

from dataclasses import asdict
from functools import partial
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from latentmas.chain.agent import LATENT_STEPS, MAX_NEW_TOKENS, PLACEHOLDERS
from latentmas.chain.memory_policy import MEMORY_POLICIES, Budget, PolicyAgents, PolicyKinds
from latentmas.chain_files.yaml_nodes import DIGITS

ROUND = "round"
"""Field that a repeat fills in: the number of the round, from 1."""


def _one_line(name: str) -> str:
    if not name.isprintable():
        raise ValueError("one line of text")
    return name


def _agent_name(name: str) -> str:
    # "name:kind" names a segment of the cache, "one + other" what agents of a parallel group read together.
    if ":" in name or " + " in name:
        raise ValueError('a name without ":" and " + "')
    return name


def _field_name(name: str) -> str:
    if name in (*PLACEHOLDERS, ROUND):
        raise ValueError("a name that the chain does not fill in itself")
    if not name.isidentifier():
        raise ValueError("a name of letters, digits and _, no digit first")
    return name


def _policy(value: Any) -> Any:
    """Replace the name of a memory policy by its fields."""
    return asdict(MEMORY_POLICIES[value]) if isinstance(value, str) and value in MEMORY_POLICIES else value


def _budget(value: Any) -> Budget:
    try:
        return Budget.parse(value)
    except (TypeError, ValueError):
        raise ValueError('a size like "64 MB" (KB, MB, GB), or a number like "512 slots"') from None


def _check_list(node: yaml.Node, least: int) -> yaml.Node:
    if not isinstance(node, yaml.SequenceNode) or len(node.value) < least:
        raise ValueError(f"a list of {least} or more")
    return node


def _integer(least: int) -> Any:
    return Field(ge=least, description=f"an integer of {least} or more (plain digits, at most {DIGITS}, no quotes)")


TEXT = "text (in quotes, where YAML takes it for something else)"
Text = Annotated[str, Field(description=TEXT)]
Filled = Annotated[str, Field(pattern=r"\S", description=TEXT)]
Name = Annotated[Filled, AfterValidator(_one_line)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True)


class Memory(_Model):
    """A memory policy that is written out (latentmas.chain.memory_policy.MemoryPolicy)."""

    agents: PolicyAgents = "all"
    kinds: PolicyKinds = "all"
    slots: Annotated[int | None, _integer(1)] = None


Policy = Annotated[
    Memory,
    BeforeValidator(_policy),
    Field(description=f"{', '.join(MEMORY_POLICIES)} or {{agents: all|last, kinds: all|latent, slots: N}}"),
]


class _Defaults(_Model):
    """Keys of an agent that the chain may set for all of its agents."""

    latent_steps: Annotated[int, _integer(0)] = LATENT_STEPS
    max_new_tokens: Annotated[int, _integer(1)] = MAX_NEW_TOKENS
    system: Text = ""
    settle: Annotated[
        float | None,
        Field(ge=-1, le=1, description=f"a number from -1 to 1 (plain digits, at most {DIGITS}, no quotes)"),
    ] = None
    memory: Policy = Memory()
    fields: Annotated[
        dict[Annotated[str, AfterValidator(_field_name)], str], Field(description="a mapping (key: value)")
    ] = {}


class ChainEntry(_Defaults):
    """A chain file."""

    name: Name = ""
    description: Text = ""
    budget: Annotated[Budget | None, BeforeValidator(_budget)] = None
    agents: Annotated[yaml.Node, BeforeValidator(partial(_check_list, least=1))]


class AgentEntry(_Defaults):
    """An agent."""

    name: Annotated[Name, AfterValidator(_agent_name)]
    prompt: Filled
    output: Literal["latent", "text"]
    model: Name = ""
    think: Annotated[bool, Field(description="true or false")] = False


class GroupEntry(_Model):
    """Agents that run in parallel."""

    parallel: Annotated[yaml.Node, BeforeValidator(partial(_check_list, least=2))]


class RepeatEntry(_Model):
    """Agents and groups that run several times over."""

    repeat: Annotated[int, _integer(1)]
    agents: Annotated[yaml.Node, BeforeValidator(partial(_check_list, least=1))]
