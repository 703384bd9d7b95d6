"""SlotMapping: the slots and positions that one forward writes."""

from typing import NamedTuple, Self

import torch
from torch import Tensor


class SlotMapping(NamedTuple):
    """The slots that one forward writes. Inputs are left-padded to [B, T]; row b brings counts[b] of them.

    rows, columns, slots: index of each real input, and the slot that it is written to. [N], on the cache's device.
    positions: [B, T], position of each input; padding repeats the row's first.
    width: slots that the longest row has after this forward.
    stop: [B], each row's length after this forward, on the cache's device.
    ragged: whether some row has fewer than `width` slots, or some input is padding.
    """

    rows: Tensor
    columns: Tensor
    slots: Tensor
    positions: Tensor
    width: int
    stop: Tensor
    ragged: bool

    @classmethod
    def plan(cls, lengths: Tensor, next_position: Tensor, counts: Tensor, columns: int, device: torch.device) -> Self:
        """Map counts[b] inputs of row b, in the last of `columns` columns, to the slots behind lengths[b].

        Args:
            lengths, next_position, counts: int64 [B] on the CPU.
            device: of the result.
        """
        padding = (columns - counts)[:, None]
        column = torch.arange(columns)[None, :]
        offset = (column - padding).clamp_min(0)
        # A row that brings nothing repeats its last position, which is inside every table of positions.
        positions = next_position[:, None] + torch.where(counts[:, None] > 0, offset, -1)
        rows, cols = (column >= padding).nonzero(as_tuple=True)
        slots = (lengths[:, None] + offset)[rows, cols]
        stop = lengths + counts
        width = int(stop.max())
        ragged = bool((stop != width).any() or (counts != columns).any())
        rows, cols, slots, positions, stop = (t.to(device) for t in (rows, cols, slots, positions, stop))
        return cls(rows, cols, slots, positions, width, stop, ragged)
