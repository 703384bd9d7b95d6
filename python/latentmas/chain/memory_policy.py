"""What an agent gets of the KV cache before it, and how much keys and values may take: memory policies and the budget."""

import re
from dataclasses import dataclass
from typing import Literal, get_args

from latentmas_kernels.errors import LatentMASError

PolicyAgents = Literal["all", "last"]
PolicyKinds = Literal["all", "latent"]
UNITS = {"KB": 2**10, "MB": 2**20, "GB": 2**30}


def is_integer(value: object, least: int) -> bool:
    """Return whether a value is an integer of `least` or more; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclass(frozen=True)
class MemoryPolicy:
    """The part of the cache before an agent that it gets. The other slots are cut out, and those that stay move together. The
    first slot stays in any case (see latentmas.chain.plan.SINK_SLOTS).

    Attributes:
        agents: slots of all agents before it, or of the last one only (of the last stage, where agents run in parallel).
        kinds: prompts, latent steps and texts, or latent steps only.
        slots: at most so many, the first and the latest; None is all.
    """

    agents: PolicyAgents = "all"
    kinds: PolicyKinds = "all"
    slots: int | None = None

    def __post_init__(self) -> None:
        if self.agents not in get_args(PolicyAgents):
            raise LatentMASError(f"agents of a memory policy must be 'all' or 'last'; got {self.agents!r}")
        if self.kinds not in get_args(PolicyKinds):
            raise LatentMASError(f"kinds of a memory policy must be 'all' or 'latent'; got {self.kinds!r}")
        if self.slots is not None and not is_integer(self.slots, least=1):
            raise LatentMASError(f"slots of a memory policy must be an integer of 1 or more; got {self.slots!r}")


KEEP_ALL = MemoryPolicy()
MEMORY_POLICIES = {"all": KEEP_ALL, "last": MemoryPolicy(agents="last"), "latent": MemoryPolicy(kinds="latent")}
"""By name: everything; the last agent only; latent steps only."""


@dataclass(frozen=True)
class Budget:
    """A limit of the keys and values of a chain at any time: bytes of all KV buffers together, or slots of each question.

    Of what does not fit, the oldest slots but the first are cut out.
    """

    bytes: int | None = None
    slots: int | None = None

    def __post_init__(self) -> None:
        if (self.bytes is None) == (self.slots is None):
            raise LatentMASError(f"a budget is either bytes or slots; got bytes={self.bytes}, slots={self.slots}")
        amount = self.bytes if self.bytes is not None else self.slots
        if not is_integer(amount, least=1):
            raise LatentMASError(f"a budget must be an integer of 1 or more; got {amount!r}")

    def __str__(self) -> str:
        return f"{self.slots} slots" if self.bytes is None else f"{self.bytes / UNITS['MB']:,.1f} MB"

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Return the budget of a text: "64 MB" (KB, MB, GB: powers of 1024) or "512 slots"."""
        found = re.fullmatch(r"\s*([0-9]{1,12}(?:\.[0-9]{1,6})?)\s*(KB|MB|GB|slots)\s*", text)
        amount = float(found[1]) * UNITS.get(found[2], 1) if found else 0.0
        if not found or amount < 1 or (found[2] == "slots" and amount != int(amount)):
            raise LatentMASError(
                f'got a budget of {text!r}; supported are sizes like "64 MB" and numbers like "512 slots"'
            )
        return cls(slots=int(amount)) if found[2] == "slots" else cls(bytes=int(amount))
