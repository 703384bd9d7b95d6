"""Tokenizers made on the spot: one token per character, so that decoding gives back exactly what was encoded."""

import string
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
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


def with_tokens(tokenizer: Any, *tokens: str, special: bool = True) -> Any:
    """The same tokenizer with tokens of their own for these texts, which it shows when it decodes if they are not special."""
    tokenizer.add_tokens(
        [AddedToken(token, special=special, normalized=False) for token in tokens], special_tokens=special
    )
    return tokenizer


SENTENCEPIECE = {
    "llama 2, mistral v1": (normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None),
    "mistral v3": (None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "t5": (None, pre_tokenizers.Metaspace(prepend_scheme="always")),
    "no space in front": (None, pre_tokenizers.Metaspace(prepend_scheme="never")),
}
"""How converted SentencePiece tokenizers put a space in front of a text: normalizer and pre-tokenizer."""


def sentencepiece_tokenizer(kind: str, template: str | None = None) -> Any:
    """One token per character, but for letters with a space in front of them; what it does not know is bytes."""
    letters = string.ascii_letters
    known = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", *CHARACTERS.replace(" ", "").replace("\n", "")]
    vocab = {token: index for index, token in enumerate([*SPECIAL, *known, *(f"▁{letter}" for letter in letters)])}
    backend = Tokenizer(
        models.BPE(vocab, [("▁", letter) for letter in letters], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    normalizer, pre_tokenizer = SENTENCEPIECE[kind]
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>"
    )
    tokenizer.chat_template = template
    return tokenizer
