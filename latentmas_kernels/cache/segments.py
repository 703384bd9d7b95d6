"""Segments: which agent's prompt, latent steps or text a range of slots holds. Nothing here modifies a cache."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from latentmas_kernels.errors import LatentMASError

Kind = Literal["prompt", "latent", "text"]


@dataclass(frozen=True)
class Segment:
    """A named range of slots: the slots start[b] to stop[b] - 1 of row b."""

    agent: str | None
    kind: Kind
    start: tuple[int, ...]
    stop: tuple[int, ...]

    @property
    def name(self) -> str:
        """ "agent:kind", or ":kind" where no agent is known."""
        return f"{self.agent or ''}:{self.kind}"


def find_segments(segments: Sequence[Segment], name: str) -> list[Segment]:
    """Return the segments of that name, in order: all of an agent's by "agent", or those of one kind by "agent:kind".

    Raises:
        LatentMASError: where there are none; the message lists the names that there are.
    """
    found = [s for s in segments if name in (s.name, s.agent)]
    if not found:
        there = ", ".join(dict.fromkeys(repr(s.name) for s in segments)) or "none"
        raise LatentMASError(
            f'there is no segment {name!r}; there are {there}. Name an agent ("planner"), or one kind of its segments '
            '("planner:latent")'
        )
    return found


def mask_of(segments: Iterable[Segment], batch: int, width: int) -> Tensor:
    """Return bool [B, width] on the CPU: true for the slots that belong to one of the segments."""
    mask = torch.zeros(batch, width, dtype=torch.bool)
    for segment in segments:
        for row, (start, stop) in enumerate(zip(segment.start, segment.stop, strict=True)):
            mask[row, start:stop] = True
    return mask


def segments_before(segments: Iterable[Segment], lengths: Sequence[int]) -> list[Segment]:
    """Return the segments cut to the first lengths[b] slots of each row, without those that become empty."""
    left = [
        replace(s, start=tuple(map(min, s.start, lengths)), stop=tuple(map(min, s.stop, lengths))) for s in segments
    ]
    return [s for s in left if s.start != s.stop]


def segments_after_compaction(segments: Iterable[Segment], kept: Tensor) -> list[Segment]:
    """Return the segments as they are once only the slots `kept` (bool [B, width]) are left and lie side by side, without
    those that become empty."""
    before = torch.nn.functional.pad(kept.long().cumsum(1), (1, 0)).tolist()

    def moved(ends: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(row[min(end, len(row) - 1)] for row, end in zip(before, ends, strict=True))

    left = [replace(s, start=moved(s.start), stop=moved(s.stop)) for s in segments]
    return [s for s in left if s.start != s.stop]


def segments_of_rows(segments: Iterable[Segment], rows: Sequence[int]) -> list[Segment]:
    """Return the segments of a batch that has the given rows in the given order; a row may come more than once."""
    return [
        replace(s, start=tuple(s.start[row] for row in rows), stop=tuple(s.stop[row] for row in rows)) for s in segments
    ]
