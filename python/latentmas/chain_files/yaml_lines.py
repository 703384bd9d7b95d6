"""YAML whose values know their line, and typed readers of it that note what is wrong and go on. Nothing is executed.

Values are taken as they are written: what YAML 1.1 would turn into something else (yes, 010, 1_000, 12:30) is a fault.
"""

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Sequence

import yaml

Faults = list[tuple[int, str]]
"""Lines, from 1, and what is wrong with each."""

DEPTH = 20
"""Lists and mappings inside each other, at most."""

DIGITS = 9
"""Of a number, before the point and behind it, at most."""

_TAG = "tag:yaml.org,2002:"
_TAKEN_FOR = {
    "bool": "true or false",
    "int": "a number",
    "float": "a number",
    "timestamp": "a date",
    "map": "a mapping",
    "seq": "a list",
    "merge": "a merge key",
    "value": "a default key",
}
_SCALARS = {"str", "null", *_TAKEN_FOR} - {"map", "seq"}
_REMEDIES = {
    "mapping values are not allowed": 'put text with ": " in it into quotes, or into a block that begins with |-',
    "'\\t'": "indent with spaces, not with tabs",
    "single document": "allowed is one document: take out the line ---",
    "undefined alias": "allowed are anchors (&name) that come before it in the file",
}


def compose(data: bytes, faults: Faults) -> yaml.Node | None:
    """The file's only document; None where it cannot be used, which is noted."""
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        faults.append((line, f"byte 0x{data[error.start]:02x} is not UTF-8; allowed is text saved as UTF-8"))
        return None
    root = _parsed(text, faults)
    if root is not None:
        _check_tree(root, faults, set(), set())
    return None if faults else root


def fault(faults: Faults, node: yaml.Node, message: str) -> None:
    faults.append((line_of(node), message))


BREAKS = "\r\n|[\r\n\x85\u2028\u2029]"
"""Where PyYAML ends a line."""


def line_of(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def source_lines(node: yaml.Node) -> Iterator[tuple[int, str]]:
    """The lines that a value is written in, with their numbers."""
    written = node.start_mark.buffer[node.start_mark.pointer : node.end_mark.pointer]
    return enumerate(re.split(BREAKS, written), start=line_of(node))


def shown(node: yaml.Node) -> str:
    """A value as a message shows it: short, on one line."""
    if _kind(node) == "str":
        return quoted(node.value)
    _, written = next(source_lines(node))
    written = _short(written.strip()) or "(empty)"
    return written if written.isprintable() else written.encode("unicode_escape").decode()


def peek(node: yaml.Node, key: str) -> yaml.Node | None:
    """The value of a key, where there is one; notes nothing."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return next((value for word, value in pairs if word.value == key), None)


def listed(words: Iterable[str]) -> str:
    """ "one, two or three"."""
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last


def meant(word: str, allowed: Sequence[str]) -> str:
    """ "did you mean prompt? ", where an allowed word is close."""
    close = difflib.get_close_matches(word[:40], allowed, n=1)
    return f"did you mean {close[0]}? " if close else ""


def quoted(text: str) -> str:
    """Text in quotes, shortened; with escapes where it would not stay on its line."""
    return json.dumps(_short(text), ensure_ascii=not text.isprintable())


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."


# ---- readers: the value, or None with a fault noted ------------------------------------------------------------------
# `what` begins the message: "agent 'critic' has latent_steps".


def mapping(
    node: yaml.Node, owner: str, faults: Faults, allowed: Sequence[str] | None = None
) -> dict[str, yaml.Node] | None:
    """Values by key, those of unknown and repeated keys left out; `allowed` of None allows every key."""
    if not isinstance(node, yaml.MappingNode):
        fault(faults, node, f"{owner} is {shown(node)}; allowed is a mapping (key: value)")
        return None
    keys: dict[str, yaml.Node] = {}
    lines: dict[str, int] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode) or not key.value:
            fault(faults, key, f"{owner} has the key {shown(key)}; allowed are words as keys")
        elif key.value in lines:
            fault(faults, key, f"{owner} has {quoted(key.value)} again, after line {lines[key.value]}; allowed is one")
        elif allowed is not None and key.value not in allowed:
            known = f"{meant(key.value, allowed)}allowed {'are' if len(allowed) > 1 else 'is'} {', '.join(allowed)}"
            fault(faults, key, f"{owner} has the unknown key {quoted(key.value)}; {known}")
        else:
            keys[key.value], lines[key.value] = value, line_of(key)
    return keys


def items(node: yaml.Node, what: str, faults: Faults, least: int = 1) -> list[yaml.Node] | None:
    """Entries of a list of at least so many."""
    if isinstance(node, yaml.SequenceNode) and len(node.value) >= least:
        return node.value
    found = f"with {len(node.value) or 'no'} entry" if isinstance(node, yaml.SequenceNode) else shown(node)
    fault(faults, node, f"{what} {found}; allowed is a list of {least} or more")
    return None


def text(node: yaml.Node, what: str, faults: Faults, *, empty: bool = False) -> str | None:
    if _kind(node) == "str" and (empty or node.value.strip()):
        return node.value
    taken_for = _TAKEN_FOR.get(_kind(node))
    allowed = "allowed is text" + (": put it into quotes" if taken_for else "")
    found = shown(node) + (f", which YAML takes for {taken_for}" if taken_for else "")
    fault(faults, node, f"{what} {found}; {allowed}")
    return None


def text_or_number(node: yaml.Node, what: str, faults: Faults) -> str | None:
    """As it is written, in plain digits if it is a number."""
    return node.value if _digits(node) else text(node, what, faults, empty=True)


def choice(node: yaml.Node, what: str, faults: Faults, *, options: Sequence[str]) -> str | None:
    if _kind(node) == "str" and node.value in options:
        return node.value
    fault(faults, node, f"{what} {shown(node)}; allowed is {listed(options)}")
    return None


def boolean(node: yaml.Node, what: str, faults: Faults) -> bool | None:
    """true or false; yes, no, on and off are text in YAML 1.2, so they are neither here."""
    if _kind(node) == "bool" and node.value.lower() in ("true", "false"):
        return node.value.lower() == "true"
    fault(faults, node, f"{what} {shown(node)}; allowed is true or false")
    return None


def integer(node: yaml.Node, what: str, faults: Faults, *, least: int) -> int | None:
    if _digits(node) and "." not in node.value and int(node.value) >= least:
        return int(node.value)
    fault(faults, node, f"{what} {shown(node)}; allowed is an integer of {least} or more{_how(node)}")
    return None


def decimal(node: yaml.Node, what: str, faults: Faults, *, low: float, high: float) -> float | None:
    if _digits(node) and low <= float(node.value) <= high:
        return float(node.value)
    fault(faults, node, f"{what} {shown(node)}; allowed is a number from {low:g} to {high:g}{_how(node)}")
    return None


# ---- the tree --------------------------------------------------------------------------------------------------------


def _parsed(text: str, faults: Faults) -> yaml.Node | None:
    try:
        depth = 0
        # The parser keeps a stack of its own, the composer recurses.
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEPTH:
                line = event.start_mark.line + 1
                faults.append((line, f"more than {DEPTH} lists and mappings inside each other; allowed are {DEPTH}"))
                return None
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        if error.context_mark is not None and mark.index >= len(text):  # what is never closed is named where it opens
            mark = error.context_mark
        problem = " ".join(f"{error.context or ''} {error.problem or ''}".split())
        remedy = next((remedy for sign, remedy in _REMEDIES.items() if sign in problem), "allowed is YAML 1.1")
        line = min(mark.line, text.rstrip().count("\n")) + 1  # the end of the file is not behind its last line
        faults.append((line, f"this is not YAML that can be read ({problem}); {remedy}"))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        faults.append((line, f"character U+{error.character:04X} is not allowed in YAML; take it out"))
    except (ValueError, OverflowError):  # the scanner hands what follows a backslash to chr()
        line = next((n for n, row in enumerate(text.split("\n"), 1) if re.search(r"\\U(?!000|0010)", row)), 1)
        faults.append((line, "an escape is no character of Unicode; allowed is up to \\U0010FFFF"))
    else:
        if root is not None:
            return root
        faults.append((1, "the file is empty; allowed is a mapping (key: value)"))
    return None


def _check_tree(node: yaml.Node, faults: Faults, path: set[int], seen: set[int]) -> None:
    """Note tags that mean more than data, lone surrogates, and what holds itself; each node is looked at once."""
    if id(node) in path:
        fault(faults, node, "what begins here holds itself by an alias; allowed are aliases of other parts")
    if id(node) in path or id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        right = _kind(node) in _SCALARS
        if any("\ud800" <= letter <= "\udfff" for letter in node.value):
            fault(faults, node, "half a surrogate pair is no character; allowed is \\U with eight digits")
        inside = []
    elif isinstance(node, yaml.MappingNode):
        right, inside = _kind(node) == "map", [part for pair in node.value for part in pair]
    else:
        right, inside = _kind(node) == "seq", node.value
    if not right:
        tag = quoted(node.tag.replace(_TAG, "!!"))
        fault(faults, node, f"the tag {tag} is not read; allowed is plain data without tags")
    for part in inside:
        _check_tree(part, faults, path | {id(node)}, seen)


def _kind(node: yaml.Node) -> str:
    return node.tag.removeprefix(_TAG)


def _digits(node: yaml.Node) -> bool:
    """Whether it is a number in plain decimal digits, which all YAML versions and readers take alike."""
    plain = rf"[+-]?(0|[1-9][0-9]{{0,{DIGITS - 1}}})(\.[0-9]{{0,{DIGITS}}})?|[+-]?\.[0-9]{{1,{DIGITS}}}"
    return _kind(node) in ("int", "float") and re.fullmatch(plain, node.value) is not None


def _how(node: yaml.Node) -> str:
    """How a number is written, for one that is written otherwise."""
    if _digits(node) or not isinstance(node, yaml.ScalarNode) or not re.search("[0-9]", node.value):
        return ""
    return ", without quotes" if node.style in ("'", '"') else f", in at most {DIGITS} plain digits"
