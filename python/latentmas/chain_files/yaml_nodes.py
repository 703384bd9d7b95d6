"""YAML as nodes, which know their lines, and the values of nodes. Nothing is executed.

A value is taken as it is written: what YAML 1.1 would turn into something else (yes, 010, 1_000, 12:30) stays a node.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml
from yaml.composer import ComposerError

from latentmas.characters import BOM, SURROGATE, quoted, short

Faults = list[tuple[int, str]]
"""Lines, from 1, and what is wrong with each."""

DEPTH = 20
"""Lists and mappings inside each other, at most."""

DIGITS = 9
"""Of a number, before the point and behind it, at most."""

NUMBER = re.compile(rf"[+-]?(0|[1-9][0-9]{{0,{DIGITS - 1}}})(\.[0-9]{{0,{DIGITS}}})?|[+-]?\.[0-9]{{1,{DIGITS}}}")
"""Plain decimal digits, which all YAML versions and readers take alike."""

BREAKS = "\r\n|[\r\n\x85\u2028\u2029]"
"""Where PyYAML ends a line."""

TAG = "tag:yaml.org,2002:"
TYPES = {
    yaml.ScalarNode: ("str", "null", "bool", "int", "float", "timestamp", "merge", "value"),
    yaml.MappingNode: ("map",),
    yaml.SequenceNode: ("seq",),
}
REMEDIES = {
    "mapping values are not allowed": 'put text with ": " in it into quotes, or into a block that begins with |-',
    "'\\t'": "indent with spaces, not with tabs",
    "single document": "allowed is one document: take out the line ---",
    "undefined alias": "allowed are anchors (&name) that come before it in the file",
}


class _Refused(ComposerError):
    """YAML that is none of a chain: `problem` is the whole message."""


class _Loader(yaml.SafeLoader):
    """Composes plain data of limited depth."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.anchors_around: list[str | None] = []

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event, around = self.peek_event(), self.anchors_around
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in around:
                self._refuse(
                    self.anchors[event.anchor],
                    "what begins here holds itself by an alias; allowed are aliases of other parts",
                )
            return super().compose_node(parent, index)
        if isinstance(event, yaml.CollectionStartEvent) and len(around) == DEPTH:  # the composer recurses
            self._refuse(event, f"more than {DEPTH} lists and mappings inside each other; allowed are {DEPTH}")
        around.append(event.anchor)
        node = super().compose_node(parent, index)
        around.pop()
        if _type(node) not in TYPES[type(node)]:
            tag = quoted(node.tag.replace(TAG, "!!"))
            self._refuse(event, f"the tag {tag} is not read; allowed is plain data without tags")
        if isinstance(node, yaml.ScalarNode) and SURROGATE.search(node.value):
            self._refuse(event, "half a surrogate pair is no character; allowed is \\U with eight digits")
        return node

    def _refuse(self, event: yaml.Event | yaml.Node, message: str) -> None:
        raise _Refused(None, None, message, event.start_mark)


def compose(data: bytes, faults: Faults) -> yaml.Node | None:
    """Return the root of the file's only document; None where it cannot be used, which is noted."""
    data = data.removeprefix(BOM)
    try:
        text = data.decode()
        root = yaml.compose(text, Loader=_Loader)
        if root is not None:
            return root
        fault = (1, "the file is empty; allowed is a mapping (key: value)")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        fault = (line, f"byte 0x{data[error.start]:02x} is not UTF-8; allowed is text saved as UTF-8")
    except _Refused as error:
        fault = (error.problem_mark.line + 1, error.problem)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        if error.context_mark is not None and mark.index >= len(text):  # what is never closed is named where it opens
            mark = error.context_mark
        problem = " ".join(f"{error.context or ''} {error.problem or ''}".split())
        remedy = next((remedy for sign, remedy in REMEDIES.items() if sign in problem), "allowed is YAML 1.1")
        line = min(mark.line, text.rstrip().count("\n")) + 1  # the end of the file is not behind its last line
        fault = (line, f"this is not YAML that can be read ({problem}); {remedy}")
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        fault = (line, f"character U+{error.character:04X} is not allowed in YAML; take it out")
    except (ValueError, OverflowError):  # the scanner hands what follows a backslash to chr()
        line = next((n for n, row in enumerate(text.split("\n"), 1) if re.search(r"\\U(?!000|0010)", row)), 1)
        fault = (line, "an escape is no character of Unicode; allowed is up to \\U0010FFFF")
    faults.append(fault)
    return None


def line_of(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def source_lines(node: yaml.Node) -> Iterator[tuple[int, str]]:
    """Return the lines that a value is written in, with their numbers."""
    written = node.start_mark.buffer[node.start_mark.pointer : node.end_mark.pointer]
    return enumerate(re.split(BREAKS, written), start=line_of(node))


def shown(node: yaml.Node) -> str:
    """Return a value as a message shows it: short, on one line, text in quotes."""
    if _type(node) == "str":
        return quoted(node.value)
    _, written = next(source_lines(node))
    written = short(written.strip()) or "(empty)"
    return written if written.isprintable() else written.encode("unicode_escape").decode()


def pairs(
    node: yaml.Node | None, owner: str = "", faults: Faults | None = None
) -> dict[str, tuple[yaml.Node, yaml.Node]]:
    """Return the nodes of keys and values by key, without keys that are no words or come twice, which are noted."""
    faults = [] if faults is None else faults
    found: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        if not isinstance(key, yaml.ScalarNode) or not key.value:
            faults.append((line_of(key), f"{owner} has the key {shown(key)}; allowed are words as keys"))
        elif key.value in found:
            first = f"after line {line_of(found[key.value][0])}"
            faults.append((line_of(key), f"{owner} has {quoted(key.value)} again, {first}; allowed is one"))
        else:
            found[key.value] = (key, value)
    return found


def plain(node: yaml.Node, *, numbers_as_text: bool = False) -> Any:
    """Return the value of text, true, false and numbers in plain digits; any other node as it is."""
    if _type(node) == "str":
        return node.value
    if _type(node) == "bool" and node.value.lower() in ("true", "false"):
        return node.value.lower() == "true"
    if _type(node) not in ("int", "float") or not NUMBER.fullmatch(node.value):
        return node
    return node.value if numbers_as_text else float(node.value) if "." in node.value else int(node.value)


def _type(node: yaml.Node) -> str:
    return node.tag.removeprefix(TAG)
