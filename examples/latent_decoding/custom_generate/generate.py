"""generate() with `latent_steps`, for `model.generate(..., custom_generate=<this folder>, trust_remote_code=True)`."""

import functools
from typing import Any

from transformers import GenerationMixin, StoppingCriteriaList
from transformers.generation import StopStringCriteria

from latentmas_kernels.hf import latent_decode


def generate(
    model: Any,
    *,
    streamer: Any = None,
    tokenizer: Any = None,
    synced_gpus: bool | None = None,
    assistant_model: Any = None,
    **arguments: Any,
) -> Any:
    """Run transformers' generate() with latent_decode as its decoding loop.

    Args:
        model: runs latent steps with greedy decoding or sampling.
        **arguments: of generate(), and latent_steps, aligner, engine, weights as in `latent_decode`.

    Raises:
        ValueError: as `latent_decode`; and for an assistant model, which this loop would not use.
    """
    if assistant_model is not None:
        raise ValueError("got an assistant_model; latent decoding drafts nothing: leave it or custom_generate out")
    # transformers does not pass streamer, synced_gpus and tokenizer to a function.
    decode = functools.partial(latent_decode, streamer=streamer, synced_gpus=bool(synced_gpus))
    stop_strings = _stop_strings(model, arguments)
    if stop_strings and tokenizer is not None:  # without a tokenizer transformers raises an error
        criteria = [*(arguments.get("stopping_criteria") or []), StopStringCriteria(tokenizer, stop_strings)]
        arguments |= {"stopping_criteria": StoppingCriteriaList(criteria), "stop_strings": None}
    return GenerationMixin.generate(model, streamer=streamer, custom_generate=decode, **arguments)


def _stop_strings(model: Any, arguments: dict[str, Any]) -> str | list[str] | None:
    """Return them in transformers' order: an argument, the given configuration, the model's."""
    if "stop_strings" in arguments:
        return arguments["stop_strings"]
    passed = arguments.get("generation_config")
    return getattr(passed, "stop_strings", None) or model.generation_config.stop_strings
