"""Whether a decoder can write for a chain; known before any work."""

from collections.abc import Sequence

from latentmas.backends.base import TextBackend
from latentmas.backends.kv_file import check_transferable
from latentmas.chain.memory_policy import KEEP_ALL, Budget
from latentmas.chain.model_context import Seat
from latentmas.chain.stages import Stretch
from latentmas_kernels.cache.file import ModelFingerprint
from latentmas_kernels.errors import LatentMASError


def check_decoder(decoder: TextBackend, seat: Seat, stretches: Sequence[Stretch], budget: Budget | None) -> None:
    """Raise ValueError where the answers would not be those of the chain's own engine.

    Args:
        seat: of the last agent, whose texts the decoder is to write.
    """
    stamp = ModelFingerprint.of(seat.model)
    if decoder.stamp != stamp:
        raise LatentMASError(
            f"the decoder runs {decoder.stamp.model} (fingerprint {decoder.stamp.fingerprint[:12]}), the last agent "
            f"{stamp.model} (fingerprint {stamp.fingerprint[:12]}); start it with the last agent's model and dtype"
        )
    if decoder.kv_transfer == "kv":
        check_transferable(seat.model)
    else:
        check_linear(stretches, budget)


def check_linear(stretches: Sequence[Stretch], budget: Budget | None) -> None:
    """Raise ValueError for chains whose memories cannot be handed over as embeddings; needs no model."""
    name = stretches[-1][-1].model
    for stretch in stretches:
        for number, stage in enumerate(stretch):
            if stage.model == name and stage.writes:
                _check_linear(stretch, number, budget)


def _check_linear(stretch: Stretch, number: int, budget: Budget | None) -> None:
    """Embeddings read in one go are the memory only where each of them was computed behind all those before it."""
    remedy = "hand keys and values over (kv), which takes any memory as it is"
    reader = stretch[number]
    # What comes from another model is read anew, in one go.
    begin = max((n for n in range(1, number + 1) if stretch[n].model != stretch[n - 1].model), default=0)
    if budget is not None and number > begin:
        raise LatentMASError(
            f"a budget may cut the memory before {reader.names}. What is left was computed in sight of what was cut, so its "
            f"embeddings, read again without that, are another memory; {remedy}, or leave the budget out"
        )
    for stage in stretch[begin + 1 : number + 1]:
        if stage.memory != KEEP_ALL:
            raise LatentMASError(
                f"the memory is cut before {stage.names}. What is left was computed in sight of what was cut, so its "
                f"embeddings, read again without that, are another memory; {remedy}, or hand on all of it (memory: all)"
            )
    for stage in stretch[begin:number]:
        if stage.parallel:
            raise LatentMASError(
                f"{stage.names} work side by side, none in sight of the others; their embeddings, read again one behind the "
                f"other, are another memory; {remedy}, or let them work one after the other (--hierarchical serial)"
            )
