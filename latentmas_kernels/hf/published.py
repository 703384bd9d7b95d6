"""ModelWrapper as the published LatentMAS code has it: loading by name, and attributes with computed defaults."""

import os
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class Default:
    """An attribute that is computed at each access, until one of the same name is set on the object."""

    def __init__(self, compute: Callable[[Any], Any]) -> None:
        self.compute, self.__doc__ = compute, compute.__doc__

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else self.compute(instance)


def is_name(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike))


def is_device(value: Any) -> bool:
    return isinstance(value, (str, int, torch.device))


def load(name: str, device: Any) -> tuple[Any, Any]:
    """Load the model and tokenizer of a folder or hub name as the published code does.

    In bfloat16 where there is a GPU, else float32; in eval mode, and the tokenizer with a padding token. Rows of the
    embedding that no token has are kept; the published code drops them.
    """
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    elif tokenizer.pad_token_id is None:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    place = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
    return model.to(place).eval(), tokenizer
