"""A stage whose texts the chain's decoder writes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from latentmas.backends.base import Completion, GenerationRequest, TextBackend
from latentmas.chain.plan import Plan
from latentmas.chain.progress import Laps
from latentmas.chain.stage_run import StageRun
from latentmas_kernels import LatentCache

if TYPE_CHECKING:
    from latentmas.chain.run import Run


class DecodedStage(StageRun):
    """Texts come from the decoder, all at the same time; where the memory goes on, it is then brought up to date here.

    Attributes:
        memory: as of any stage; None where the decoder keeps all of it to itself.
        writers: those of the agents that write, by number.
    """

    def __init__(
        self, run: "Run", plan: Plan, number: int, prompts: list[list[list[int]]], decoder: TextBackend
    ) -> None:
        super().__init__(run, plan, number, prompts)
        self.decoder = decoder
        self.writers = [number for number, agent in enumerate(self.agents) if not agent.thinks]
        self._texts: dict[tuple[int, int], Completion] = {}
        self._read_again: list[int] = []  # of each question, slots that the decoder is fed again

    def run(self) -> None:
        self.begin()
        tell, lap = self._teller(self.writers), Laps()
        written = self.decoder.write(self.given, self.requests(), tell)
        seconds = lap() / len(self.writers)
        for number in self.writers:
            self.tallies[number].seconds[2] += seconds
        self.take(written)

    @property
    def given(self) -> LatentCache | None:
        """The memory that the agents go on from, where there is anything in it."""
        return self.memory if self.memory is not None and bool(self.memory.lengths.any()) else None

    def requests(self) -> list[GenerationRequest]:
        """Of each question the writers' texts, behind the memory as `begin` left it."""
        given, temperature = self.given, self.whole.temperature
        shared = self.plan.shared if given is not None and self.number == 0 else 0
        fed = [self._fed_again(q) for q in range(len(self.rows))]
        self._read_again = [len(slots) for slots in fed]
        return [
            GenerationRequest(
                self.ids[q][number][shared:], self.agents[number].max_new_tokens or 0, self.ends,
                row=None if given is None else q, fed=fed[q], temperature=temperature, top_p=self.whole.top_p,
                seed=int(torch.randint(2**31, ())) if temperature else 0,
            )
            for q in range(len(self.rows))
            for number in self.writers
        ]  # fmt: skip

    def take(self, written: Sequence[Completion]) -> None:
        """Take down the texts, in the order of the requests, and end the stage."""
        places = [(q, number) for q in range(len(self.rows)) for number in self.writers]
        self._texts = dict(zip(places, written, strict=True))
        self.end()

    def _fed_again(self, q: int) -> list[int | torch.Tensor]:
        """What the decoder reads in place of a memory: of thoughts, the embeddings of its own model."""
        if self.given is None or self.decoder.kv_transfer != "embeds":
            return []
        return [slot if isinstance(slot, int) else slot[self.seat.name] for slot in self.rows[q].fed]

    def _begin(self) -> LatentCache | None:
        # A first stage that nothing goes on from: nobody here needs what it reads.
        return None if self.last and self.number == 0 else super()._begin()

    def _go_on(self) -> None:
        if not self.last:
            super()._go_on()
            return
        for (q, number), text in self._texts.items():
            self.tallies[number].read += self._read_again[q]
            self.tallies[number].computed += text.computed_tokens
            self._take_text(q, number, text.ids, text.finish_reason)
        self.caches = [] if self.memory is None else [self.memory]

    def _write(self, cache: LatentCache, numbers: list[int], ids: list[list[int]]) -> None:
        """Bring the texts into the memory that goes on from them."""
        texts = []
        for r, prompt in enumerate(ids):
            q, number = r // len(numbers), numbers[r % len(numbers)]
            text = self._texts[q, number]
            self._take_text(q, number, text.ids, text.finish_reason)
            texts.append(text.ids if self._followed(number) else text.ids[:-1])
            self._feed(self.sayings[q][number].fed, [*prompt, *texts[-1]])
        self._extend(cache, ids, "prompt")
        if any(texts):
            self._extend(cache, texts, "text")
