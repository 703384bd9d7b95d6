"""The text of single tokens, as far as a vocabulary tells it."""

import re
from functools import cached_property
from typing import Any

SPACE = "␣"
BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")


class Spelling:
    """The text of single tokens, spaces in front included; bytes that are no UTF-8 by themselves are lone surrogates.

    Read from the vocabulary's own entries. `decode([id])` loses what matters here: SentencePiece decoders strip the space
    in front of a first token, and half of a character becomes U+FFFD, whichever half it is.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.known: dict[int, str] = {}

    def __call__(self, token_id: int) -> str:
        if token_id not in self.known:
            self.known[token_id] = self._spell(token_id)
        return self.known[token_id]

    def _spell(self, token_id: int) -> str:
        if token_id in self.added:
            return self.added[token_id]
        try:
            entry = self.tokenizer.convert_ids_to_tokens(token_id)
        except (IndexError, KeyError, ValueError, OverflowError):
            entry = None
        if entry is None:  # models pad their vocabulary
            return f"<no token {token_id}>"
        if isinstance(entry, bytes):
            return entry.decode(errors="surrogateescape")
        if self.byte_level:
            if all(letter in self.bytes for letter in entry):
                return bytes(self.bytes[letter] for letter in entry).decode(errors="surrogateescape")
            return str(entry)
        byte = BYTE_TOKEN.fullmatch(entry)
        if byte is not None:
            return bytes([int(byte[1], 16)]).decode(errors="surrogateescape")
        return str(entry.replace("▁", " "))

    @cached_property
    def added(self) -> dict[int, str]:
        """Return the tokens beside the vocabulary, which are spelled as they are, and the special ones."""
        try:
            return {n: str(token) for n, token in self.tokenizer.added_tokens_decoder.items()}
        except (AttributeError, NotImplementedError):
            return {}

    @cached_property
    def byte_level(self) -> bool:
        """Return whether the vocabulary spells bytes as letters (GPT-2, Llama 3, Qwen), and not spaces as ▁ (SentencePiece)."""
        try:
            return bool(self.tokenizer.convert_tokens_to_string(["Ġ"]) == " ")
        except (AttributeError, NotImplementedError):
            return False

    @cached_property
    def bytes(self) -> dict[str, int]:
        """Return the byte of each letter of a byte-level vocabulary: printable Latin-1 is itself, the rest is from U+0100."""
        itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        rest = sorted(set(range(256)) - set(itself))
        return {chr(byte): byte for byte in itself} | {chr(0x100 + n): byte for n, byte in enumerate(rest)}


def readable(text: str) -> str:
    """Return proper Unicode, with \\xNN for bytes that are no UTF-8 by themselves."""
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")


def printable(text: str) -> str:
    """Return one word of printable characters: as in Python's repr, but for spaces, which show as ␣."""

    def show(letter: str) -> str:
        if letter == " ":
            return SPACE
        if 0xDC80 <= ord(letter) <= 0xDCFF:
            return f"\\x{ord(letter) - 0xDC00:02x}"
        plain = letter.isprintable() and letter not in ("\\", SPACE)
        return letter if plain else letter.encode("unicode_escape").decode()

    return "".join(map(show, text)) or "''"
