"""YAML as it is written: the scalars of YAML 1.2's core schema, every key once, nothing that grows
without end.

PyYAML reads YAML 1.1, where `yes` is a boolean, `010` is 8, `1:30` is 90 and a second `train:`
silently replaces the first. Its scanner and parser are used here; what a scalar means is decided
below.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.parser import Parser
from yaml.reader import Reader
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from lidit.errors import one_line

# No recipe comes near these; hostile ones are refused before anything of their size is built.
MAX_DEPTH, MAX_VALUES, MAX_CHARACTERS, MAX_DIGITS = 32, 100_000, 4_000_000, 400
PLAIN = "plain"  # the tag of a scalar without quotes and without a tag of its own
CORE_TAGS = {PLAIN, *(f"tag:yaml.org,2002:{name}" for name in ("str", "seq", "map"))}
NULLS = {"", "~", "null", "Null", "NULL"}
BOOLEANS = {
    "true": True,
    "True": True,
    "TRUE": True,
    "false": False,
    "False": False,
    "FALSE": False,
}
INTEGER = re.compile(r"[-+]?[0-9]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


class YamlError(Exception):
    """Why a text is not read, in one line; `line` counts from 1."""

    def __init__(self, reason: str, line: int) -> None:
        super().__init__(reason)
        self.line = line


def read_yaml(text: str) -> Any:
    """The value of one YAML document, of dicts, lists and plain values; keys are always texts.
    Raises YamlError.
    """
    try:
        node = _Tree(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError(
            one_line(error.problem or error.context), mark.line + 1 if mark else 1
        ) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(
            f"the character {error.character:#x} is not allowed in YAML", line
        ) from None
    if node is None:
        return None
    _Sizes().measure(node)
    return _value(node)


class _Tree(Reader, Scanner, Parser, Composer, BaseResolver):
    """Text to nodes, without a meaning for scalars and without Python's own limit on depth."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        BaseResolver.__init__(self)
        self.depth = 0

    def fetch_flow_collection_start(self, token: Any) -> None:
        # the scanner looks far ahead, in time that grows with the square of the depth
        if self.flow_level >= MAX_DEPTH:
            raise YamlError(f"nested more than {MAX_DEPTH} deep", self.line + 1)
        super().fetch_flow_collection_start(token)

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise YamlError(
                f"nested more than {MAX_DEPTH} deep", self.peek_event().start_mark.line + 1
            )
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def resolve(self, kind: type[Node], value: Any, implicit: Any) -> str:
        return (
            PLAIN
            if kind is ScalarNode and implicit[0]
            else str(super().resolve(kind, value, implicit))
        )


class _Sizes:
    """How much a document becomes once every alias is written out: each node is visited once,
    aliases are added up.
    """

    def __init__(self) -> None:
        self.known: dict[int, tuple[int, int, int]] = {}
        self.open: set[int] = set()

    def measure(self, node: Node) -> tuple[int, int, int]:
        """(values, characters, depth) of a node. Raises YamlError beyond the limits."""
        if id(node) in self.known:
            return self.known[id(node)]
        if id(node) in self.open:
            raise YamlError("an alias stands for what it is part of", _line(node))
        self.open.add(id(node))
        values, characters, depth = 1, len(node.value) if isinstance(node, ScalarNode) else 0, 1
        for child in _children(node):
            more, longer, deeper = self.measure(child)
            values, characters, depth = values + more, characters + longer, max(depth, deeper + 1)
        if values > MAX_VALUES or characters > MAX_CHARACTERS or depth > MAX_DEPTH:
            raise YamlError(
                "too large once its aliases are written out; write a shorter document", _line(node)
            )
        self.open.remove(id(node))
        self.known[id(node)] = (values, characters, depth)
        return self.known[id(node)]


def _children(node: Node) -> list[Node]:
    if isinstance(node, MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, SequenceNode) else []


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1


def _value(node: Node) -> Any:
    """A node as Python values. What an alias stands for is made anew: a change of one must not
    change the other.
    """
    if node.tag not in CORE_TAGS:
        name = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise YamlError(
            f"the tag {name} is not read; write the plain value, or text in quotes", _line(node)
        )
    if isinstance(node, SequenceNode):
        return [_value(child) for child in node.value]
    if isinstance(node, MappingNode):
        return _mapping(node)
    return _scalar(_text(node), _line(node)) if node.tag == PLAIN else _text(node)


def _mapping(node: MappingNode) -> dict[str, Any]:
    """A mapping whose keys differ; `<<` puts the keys of another mapping, or of several, under its
    own.
    """
    lines: dict[str, int] = {}
    own: dict[str, Any] = {}
    merged: dict[str, Any] = {}
    for key, child in node.value:
        if not isinstance(key, ScalarNode):
            raise YamlError("a key must be a word, not a list or a mapping", _line(key))
        name = _text(key)
        if name in lines:
            raise YamlError(
                f"{name!r} is there twice, first in line {lines[name]}; keep one", _line(key)
            )
        lines[name] = _line(key)
        if name == "<<" and key.tag == PLAIN:
            others = child.value if isinstance(child, SequenceNode) else [child]
            if not all(isinstance(other, MappingNode) for other in others):
                raise YamlError("<< takes a mapping, or a list of mappings", _line(key))
            for other in reversed(others):  # the first one wins
                merged |= _mapping(other)
        else:
            own[name] = _value(child)
    return merged | own


def _text(node: Node) -> str:
    text = str(node.value)
    if "\0" in text or (
        not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)
    ):
        raise YamlError("a value holds a NUL byte or bytes that are no text", _line(node))
    return text


def _scalar(text: str, line: int) -> str | int | float | bool | None:
    """What a scalar without quotes means in YAML 1.2. Its hexadecimal, octal, .inf and .nan stay
    text.
    """
    if text in NULLS:
        return None
    if text in BOOLEANS:
        return BOOLEANS[text]
    if not FLOAT.fullmatch(text):
        return text
    if len(text) > MAX_DIGITS:
        raise YamlError(f"a number of {len(text):,} characters; write text in quotes", line)
    if INTEGER.fullmatch(text):
        return int(text)
    number = float(text)
    if not math.isfinite(number):
        raise YamlError(f"{text} is larger than any number; write text in quotes", line)
    return number
