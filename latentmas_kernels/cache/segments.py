"""Segments: which agent's prompt, latent steps or text a run of slots holds, and how to name it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from latentmas_kernels.errors import LatentMASError

Kind = Literal["prompt", "latent", "text"]


@dataclass(frozen=True)
class Segment:
    """A named run of slots: row b holds it in the slots start[b] to stop[b] - 1."""

    agent: str | None
    kind: Kind
    start: tuple[int, ...]
    stop: tuple[int, ...]

    @property
    def name(self) -> str:
        """ "agent:kind", or ":kind" where no agent is known."""
        return f"{self.agent or ''}:{self.kind}"


def named(segments: Sequence[Segment], name: str) -> list[Segment]:
    """The segments of that name, in order: all of an agent's by "agent", or those of one kind by "agent:kind".

    Raises:
        ValueError: where there are none; says which there are.
    """
    found = [s for s in segments if name in (s.name, s.agent)]
    if not found:
        there = ", ".join(dict.fromkeys(repr(s.name) for s in segments)) or "none"
        raise LatentMASError(
            f'there is no segment {name!r}; there are {there}. Name an agent ("planner"), or one kind of its segments '
            '("planner:latent")'
        )
    return found


def slots_of(segments: Iterable[Segment], batch: int, width: int) -> Tensor:
    """bool [B, width] on the CPU: the slots that belong to one of the segments."""
    held = torch.zeros(batch, width, dtype=torch.bool)
    for segment in segments:
        for row, (start, stop) in enumerate(zip(segment.start, segment.stop, strict=True)):
            held[row, start:stop] = True
    return held


def segments_after_compaction(segments: Iterable[Segment], kept: Tensor) -> list[Segment]:
    """What is left of the segments where only the slots `kept` (bool [B, width]) stay and move together."""
    before = torch.nn.functional.pad(kept.long().cumsum(1), (1, 0)).tolist()

    def moved(ends: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(row[min(end, len(row) - 1)] for row, end in zip(before, ends, strict=True))

    left = [replace(s, start=moved(s.start), stop=moved(s.stop)) for s in segments]
    return [s for s in left if s.start != s.stop]


def up_to(segments: Iterable[Segment], lengths: Sequence[int]) -> list[Segment]:
    """What is left of the segments where row b ends at lengths[b]."""
    left = [
        replace(s, start=tuple(map(min, s.start, lengths)), stop=tuple(map(min, s.stop, lengths))) for s in segments
    ]
    return [s for s in left if s.start != s.stop]
