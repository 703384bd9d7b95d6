"""ModelWrapper's texts by vLLM, through the backend of the latentmas package.

The functions import it: latentmas imports this package, and vLLM is optional.
"""

from collections.abc import Sequence
from typing import Any

import torch

from latentmas_kernels.errors import LatentMASError
from latentmas_kernels.hf.chat import text_ends, without_end

SETTINGS = ("tensor_parallel_size", "gpu_memory_utilization", "enable_prefix_caching")
"""Settings of vLLM's engine, by their names in the published command line."""


def check_vllm() -> None:
    """Raise LatentMASError, with what to do, where vLLM is not installed."""
    from latentmas.backends.vllm.launch import check_installed

    check_installed()


def start_vllm(name: str | None, model: Any, args: Any) -> Any:
    """Start vLLM with the model of that name; return a `latentmas.backends.vllm.engine.Vllm`.

    Args:
        model: the same, as a causal LM of transformers.
        args: a namespace; what it has of SETTINGS goes to vLLM's engine.

    Raises:
        LatentMASError: where vLLM cannot run this.
    """
    from latentmas.backends.vllm.engine import Vllm

    if not name:
        raise LatentMASError(
            "use_vllm=True needs a model that has a name (a folder or one on the hub), which vLLM loads too"
        )
    settings = {key: getattr(args, key) for key in SETTINGS if getattr(args, key, None) is not None}
    return Vllm(name, model, kv_transfer="embeds", settings=settings)


def write_texts(
    vllm: Any,
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> list[str]:
    """Return the text of each prompt (token ids), without special tokens and surrounding blanks. Seeds are drawn from torch's
    generator."""
    from latentmas.backends.base import GenerationRequest

    ends = tuple(text_ends(model, tokenizer))
    seeds = torch.randint(2**31, (len(prompts),)).tolist()
    requests = [
        GenerationRequest(list(prompt), max_new_tokens, ends, temperature=temperature, top_p=top_p, seed=seed)
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    new = [without_end(completion.ids, ends) for completion in vllm.write(None, requests)]
    return [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in new]
