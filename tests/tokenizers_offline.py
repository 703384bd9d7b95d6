"""A tokenizer made on the spot: one token per character, so that decoding gives back exactly what was encoded."""

import string
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]  # ids 0 to 3, as in the tiny models
CHARACTERS = string.ascii_letters + string.digits + "\n !'()+,-./:<=>?[]_{|}"


def character_tokenizer(template: str | None = None, *, pad: bool = True) -> Any:
    """Puts <bos> before a text where special tokens are asked for; fits the vocabulary of the tiny models."""
    vocab = {token: index for index, token in enumerate([*SPECIAL, *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    if pad:
        names["pad_token"] = "<pad>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = template
    return tokenizer
