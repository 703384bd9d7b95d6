"""Pending KV loads, tracked between calls of vLLM's scheduler. Imports nothing of vLLM."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentmas.backends.kv_file import KVFileRow
from latentmas_kernels.errors import LatentMASError

logger = logging.getLogger("vllm.latentmas")


@dataclass(frozen=True)
class PendingLoad:
    """Slots of a KV file that are to be written to vLLM's blocks before a request's prompt is prefilled.

    Attributes:
        request: its id, for messages.
        source: row of the file; None where the request named none that can be read.
        start, stop: slots of the row; those before `start` are in vLLM's prefix cache.
        blocks: all block ids of the request, in order.
        fault: what is wrong with the request, where `source` is None.
    """

    request: str
    source: KVFileRow | None
    start: int
    stop: int
    blocks: tuple[int, ...]
    fault: str = ""

    def slot_mapping(self, block_size: int) -> Tensor:
        """Return int64 [stop - start], the slot in vLLM's paged cache for each slot of the row."""
        slots = torch.arange(self.start, self.stop)
        return torch.tensor(self.blocks)[slots // block_size] * block_size + slots % block_size

    def block_ids(self, block_size: int) -> set[int]:
        """Return the blocks that are written to."""
        return set(self.blocks[self.start // block_size : (self.stop - 1) // block_size + 1])


class PendingLoads:
    """The loads of the requests that were scheduled in this step.

    A preempted request comes again, with blocks that hold something else by then: its KV is loaded again, so the file must last
    until the request has ended.
    """

    def __init__(self) -> None:
        self._loads: list[PendingLoad] = []
        self._faults: dict[str, tuple[int, str]] = {}

    def num_new_matched_tokens(
        self, request: str, params: Mapping[str, Any] | None, salt: str | None, tokens: int, computed: int
    ) -> int:
        """Return the number of tokens beyond the `computed` ones that come from a request's KV file.

        A request with a fault gets one, whose load fails, so that vLLM ends the request with an error; none where that would
        leave no token to prefill.

        Args:
            request: its id.
            params, salt: its kv_transfer_params and cache_salt.
            tokens: length of its prompt, with placeholders.
            computed: tokens found in vLLM's prefix cache.
        """
        try:
            source = _read_source(params, salt, tokens)
        except LatentMASError as error:
            if computed + 1 >= tokens:
                logger.error("request %s is answered without the memory that it names: %s", request, error)
                return 0
            self._faults[request] = computed, str(error)
            return 1
        return 0 if source is None else max(0, source.slots - computed)

    def add(self, request: str, params: Mapping[str, Any] | None, blocks: Sequence[int], external: int) -> None:
        """Add the load of a request whose blocks were allocated.

        Args:
            external: tokens that `num_new_matched_tokens` returned for it.
        """
        start, fault = self._faults.pop(request, (0, ""))
        if not external:
            return
        if fault:
            self._loads.append(PendingLoad(request, None, start, start + external, tuple(blocks), fault))
            return
        source = KVFileRow.read(params)
        assert source is not None, "no external tokens without a KV file"
        self._loads.append(PendingLoad(request, source, source.slots - external, source.slots, tuple(blocks)))

    def discard(self, request: str) -> None:
        """Forget a request that has ended, perhaps before it had any blocks."""
        self._faults.pop(request, None)

    def pop_all(self) -> list[PendingLoad]:
        """Remove and return the loads that are due before the next forward."""
        loads, self._loads = self._loads, []
        return loads


def _read_source(params: Mapping[str, Any] | None, salt: str | None, tokens: int) -> KVFileRow | None:
    source = KVFileRow.read(params)
    if source is None:
        return None
    if salt != source.salt:
        raise LatentMASError(
            f"got cache_salt {salt!r}; it must be {source.salt!r}, or vLLM's prefix cache would take one memory for another"
        )
    if source.slots >= tokens:
        raise LatentMASError(
            f"got a prompt of {tokens} tokens for {source.slots} slots; it needs a placeholder for each slot and one token more"
        )
    return source
