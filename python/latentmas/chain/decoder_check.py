"""Checks, before any work, that a decoder can write the texts of a chain."""

from collections.abc import Sequence

from latentmas.backends.base import TextBackend
from latentmas.backends.kv_file import check_transferable
from latentmas.chain.memory_policy import KEEP_ALL, Budget
from latentmas.chain.model_context import ModelContext
from latentmas.chain.stages import Context
from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.models.fingerprint import ModelFingerprint


def check_decoder(
    decoder: TextBackend, model_context: ModelContext, contexts: Sequence[Context], budget: Budget | None
) -> None:
    """Raise LatentMASError where the decoder's answers would not be those of the chain's own engine.

    Args:
        model_context: of the last agent, whose model the decoder must run.
    """
    stamp = ModelFingerprint.of(model_context.model)
    if decoder.stamp != stamp:
        raise LatentMASError(
            f"the decoder runs {decoder.stamp.model} (fingerprint {decoder.stamp.fingerprint[:12]}), the last agent "
            f"{stamp.model} (fingerprint {stamp.fingerprint[:12]}); start it with the last agent's model and dtype"
        )
    if decoder.kv_transfer == "kv":
        check_transferable(model_context.model)
    else:
        check_recomputable(contexts, budget)


def check_recomputable(contexts: Sequence[Context], budget: Budget | None) -> None:
    """Raise LatentMASError where the decoder could not compute a cache again from embeddings; needs no model.

    Embeddings read in one go give the cache back only where each slot was computed in sight of all slots before it.
    """
    model = contexts[-1][-1].model
    for context in contexts:
        for number, stage in enumerate(context):
            if stage.model == model and stage.writes:
                _check_recomputable(context, number, budget)


def _check_recomputable(context: Context, number: int, budget: Budget | None) -> None:
    """Check the cache before one stage."""
    other = "What is left was computed in sight of what was cut, so its embeddings, read again without that, are another memory"
    remedy = "hand keys and values over (kv), which takes any memory as it is"
    reader = context[number]
    # The cache of another model is computed again, in one go.
    begin = max((n for n in range(1, number + 1) if context[n].model != context[n - 1].model), default=0)
    if budget is not None and number > begin:
        raise LatentMASError(
            f"a budget may cut the memory before {reader.names}. {other}; {remedy}, or leave the budget out"
        )
    for stage in context[begin + 1 : number + 1]:
        if stage.memory_policy != KEEP_ALL:
            raise LatentMASError(
                f"the memory is cut before {stage.names}. {other}; {remedy}, or hand on all of it (memory: all)"
            )
    for stage in context[begin:number]:
        if stage.parallel:
            raise LatentMASError(
                f"{stage.names} work side by side, none in sight of the others; their embeddings, read again one behind the "
                f"other, are another memory; {remedy}, or let them work one after the other (--hierarchical serial)"
            )
