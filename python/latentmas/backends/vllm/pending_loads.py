"""What the connector keeps in mind between vLLM's calls, without vLLM: which memory goes to which blocks."""

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
class Load:
    """Slots of a memory that are to be written to blocks before a request's prompt is read.

    Attributes:
        request: its id, for messages.
        handed: the memory; None where the request named none that can be read.
        start, stop: the slots; those before `start` are in vLLM's prefix cache.
        blocks: of the request, in order, from its first slot on.
        fault: what was wrong with the request.
    """

    request: str
    handed: KVFileRow | None
    start: int
    stop: int
    blocks: tuple[int, ...]
    fault: str = ""

    def places(self, block_size: int) -> Tensor:
        """int64 [stop - start], where each slot goes in vLLM's paged memory."""
        slots = torch.arange(self.start, self.stop)
        return torch.tensor(self.blocks)[slots // block_size] * block_size + slots % block_size

    def touched(self, block_size: int) -> set[int]:
        """The blocks that are written to."""
        return set(self.blocks[self.start // block_size : (self.stop - 1) // block_size + 1])


class Ledger:
    """The scheduler's side: which requests were given room in this step.

    vLLM asks for the same request again after it was preempted, when its blocks hold something else: then its memory is loaded
    again, so the file must last until the request has ended.
    """

    def __init__(self) -> None:
        self._loads: list[Load] = []
        self._faults: dict[str, tuple[int, str]] = {}

    def matched(
        self, request: str, params: Mapping[str, Any] | None, salt: str | None, tokens: int, computed: int
    ) -> int:
        """Tokens beyond the `computed` ones that a request brings in its memory.

        A request with a fault brings one, whose load fails, so that vLLM ends it with an error; none where that would leave no
        token to be read.

        Args:
            request: its id.
            params, salt: its kv_transfer_params and cache_salt.
            tokens: of its prompt, placeholders included.
        """
        try:
            handed = _checked(params, salt, tokens)
        except ValueError as error:
            if computed + 1 >= tokens:
                logger.error("request %s is answered without the memory that it names: %s", request, error)
                return 0
            self._faults[request] = computed, str(error)
            return 1
        return 0 if handed is None else max(0, handed.slots - computed)

    def allocated(self, request: str, params: Mapping[str, Any] | None, blocks: Sequence[int], external: int) -> None:
        """Take down that a request has blocks for the `external` tokens that `matched` promised."""
        start, fault = self._faults.pop(request, (0, ""))
        if not external:
            return
        if fault:
            self._loads.append(Load(request, None, start, start + external, tuple(blocks), fault))
            return
        handed = KVFileRow.read(params)
        assert handed is not None, "nothing was promised"
        self._loads.append(Load(request, handed, handed.slots - external, handed.slots, tuple(blocks)))

    def finished(self, request: str) -> None:
        """Forget a request; it may have been aborted before it had any blocks."""
        self._faults.pop(request, None)

    def take(self) -> list[Load]:
        """What is to be loaded before the next forward; forgets it."""
        loads, self._loads = self._loads, []
        return loads


def _checked(params: Mapping[str, Any] | None, salt: str | None, tokens: int) -> KVFileRow | None:
    handed = KVFileRow.read(params)
    if handed is None:
        return None
    if salt != handed.salt:
        raise LatentMASError(
            f"got cache_salt {salt!r}; it must be {handed.salt!r}, or vLLM's prefix cache would take one memory for another"
        )
    if handed.slots >= tokens:
        raise LatentMASError(
            f"got a prompt of {tokens} tokens for {handed.slots} slots; it needs a placeholder for each slot and one token more"
        )
    return handed
