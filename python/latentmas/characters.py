"""Text of users and errors: UTF-8, surrogates without their other half, control characters, and what a message shows of it."""

import json
import re
from collections.abc import Sequence

from latentmas_kernels.errors import LatentMASError

BOM = b"\xef\xbb\xbf"
SURROGATE = re.compile("[\ud800-\udfff]")
# C0 and C1 controls but for the tab and the line feed, and what turns the direction of the text around it.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def check_characters(text: str, owner: str) -> None:
    """Raise LatentMASError, which begins with `owner`, where text holds what no tokenizer takes."""
    found = SURROGATE.search(text)
    if found:
        raise LatentMASError(
            f"{owner} holds {found[0]!a} at character {found.start() + 1}, half a surrogate pair or a byte that is not "
            "UTF-8; supported is Unicode text: write the character itself, or save the text as UTF-8"
        )


def visible(text: str) -> str:
    """Return text as it can be printed: control characters as in Python's repr, so that none of them reaches a terminal."""
    return CONTROL.sub(lambda found: ascii(found[0])[1:-1], text.replace("\r\n", "\n"))


def short(text: str) -> str:
    """Return text of 40 characters at most."""
    return text if len(text) <= 40 else text[:37] + "..."


def quoted(text: str) -> str:
    """Return text in quotes, shortened; with escapes where it would not stay on its line."""
    return json.dumps(short(text), ensure_ascii=not text.isprintable())


def shortened(faults: Sequence[str], most: int) -> list[str]:
    """Return the first `most` faults; where there are others, "and 12 more" follows."""
    left = len(faults) - most
    return [*faults[:most], *([f"and {left:,} more"] if left > 0 else [])]


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text; the name of its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def without_mark(data: bytes, owner: str) -> bytes:
    """Return UTF-8 without its byte-order mark; raise LatentMASError, which begins with `owner`, for UTF-16 and UTF-32."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or data[:2].count(0) == 1:
        raise LatentMASError(f"{owner} is UTF-16 or UTF-32; save it as UTF-8")
    return data.removeprefix(BOM)


def decoded(data: bytes, owner: str) -> str:
    """Return UTF-8 as text; raise LatentMASError, which begins with `owner`, for other bytes."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise LatentMASError(
            f"{owner} is not UTF-8 (byte 0x{data[error.start]:02x} in line {line}); save it as UTF-8"
        ) from error
