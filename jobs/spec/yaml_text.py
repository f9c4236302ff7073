"""YAML text to plain data with the line of every key, within limits. Every fault is one error with its line.

Scalars are those of YAML 1.2: `no`, `1:30` and `2024-01-01` are texts, and `2e-4` is a number. Tags and merge keys are
errors. Aliases are allowed, as long as the data that they stand for stay small.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import yaml

from pipelines.errors import UserError

Key = tuple[str, ...]
MAX_BYTES = 1 << 20
"""Largest file."""
MAX_VALUES = 20_000
"""Most values of a file, where every alias counts as what it stands for."""
MAX_DEPTH = 64
"""Most mappings and lists inside each other."""

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml is 20 times as fast, and is not everywhere
_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLS = {text: value for value in (True, False) for text in (str(value), str(value).lower(), str(value).upper())}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+)")
_FLOAT = re.compile(r"[-+]?(\.[0-9_]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_OCTAL = re.compile(r"[-+]?0[0-9_]+")
_PREFIX = "tag:yaml.org,2002:"
_MERGE = "<<"


@dataclass(slots=True)
class _Node:
    """A value and where it was written. The `items` of a mapping are key, value, key, value. `size` counts values."""

    line: int
    kind: str
    text: str = ""
    tag: str | None = None
    is_plain: bool = False
    items: list[_Node] = field(default_factory=list)
    size: int = 1
    height: int = 0
    is_open: bool = False


def parse_yaml(text: str, name: str, *, one_line: bool = False) -> tuple[Any, dict[Key, str]]:
    """Return plain data, and key -> `name:line`. With `one_line` every place is `name`. Raises `UserError`."""
    if len(text.encode(errors="replace")) > MAX_BYTES:
        raise UserError(name, f"is larger than {MAX_BYTES:,} bytes", "name the YAML file of a job")
    return _Parser(text, name, one_line).parse()


class _Parser:
    """Parses one text. libyaml yields events; neither it nor this class recurses deeper than `MAX_DEPTH`."""

    def __init__(self, text: str, name: str, one_line: bool) -> None:
        self._text = text
        self._name = name
        self._one_line = one_line
        self._places: dict[Key, str] = {}

    def parse(self) -> tuple[Any, dict[Key, str]]:
        try:
            root = self._compose(yaml.parse(self._text, Loader=_Loader))
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark else 1
            raise self._error(line, f"is not YAML: {error.problem or error.context}", "fix the line") from error
        except yaml.reader.ReaderError as error:
            line = self._text.count("\n", 0, error.position) + 1
            raise self._error(line, f"is not YAML: {error.reason}", "remove the character") from error
        if root is None:
            return None, {(): self._place(1)}
        return self._plain(root, ()), self._places

    def _compose(self, events: Iterable[Any]) -> _Node | None:
        """Return the tree of the only document. Aliases share their nodes, so that nothing is expanded yet."""
        root: _Node | None = None
        anchors: dict[str, _Node] = {}
        inside: list[_Node] = []
        for event in events:
            line = event.start_mark.line + 1
            if isinstance(event, yaml.AliasEvent):
                node = self._aliased(anchors, str(event.anchor), line)
            elif isinstance(event, yaml.ScalarEvent):
                node = _Node(line, "scalar", event.value, event.tag, event.tag is None and event.implicit[0])
            elif isinstance(event, yaml.CollectionStartEvent):
                kind = "mapping" if isinstance(event, yaml.MappingStartEvent) else "sequence"
                node = _Node(line, kind, tag=event.tag, is_open=True)
                inside.append(node)
            elif isinstance(event, yaml.CollectionEndEvent):
                node = inside.pop()
                node.is_open = False
            else:
                if isinstance(event, yaml.DocumentStartEvent) and root is not None:
                    raise self._error(line, "begins a second document", "keep one job in a file")
                continue
            if isinstance(event, yaml.NodeEvent) and event.anchor and not isinstance(event, yaml.AliasEvent):
                anchors[event.anchor] = node
            if node.is_open:
                self._check_depth(len(inside), line)
            elif inside:
                self._add(inside, node, line)
            else:
                root = node
        return root

    def _aliased(self, anchors: dict[str, _Node], anchor: str, line: int) -> _Node:
        node = anchors.get(anchor)
        if node is None:
            raise self._error(line, f"*{anchor} has no anchor &{anchor} before it", "write the anchor first")
        if node.is_open:
            raise self._error(line, f"*{anchor} stands for a value that contains it", "write the value out")
        return node

    def _add(self, inside: list[_Node], node: _Node, line: int) -> None:
        parent = inside[-1]
        parent.items.append(node)
        parent.size += node.size
        parent.height = max(parent.height, node.height + 1)
        if parent.size > MAX_VALUES:
            raise self._error(line, f"stands for more than {MAX_VALUES:,} values", "use fewer values or aliases")
        self._check_depth(len(inside) + node.height, line)

    def _check_depth(self, depth: int, line: int) -> None:
        if depth > MAX_DEPTH:
            raise self._error(line, f"is nested deeper than {MAX_DEPTH} levels", "write fewer brackets")

    def _plain(self, node: _Node, key: Key) -> Any:
        self._places[key] = self._place(node.line)
        self._check_tag(node)
        if node.kind == "scalar":
            return self._scalar(node)
        if node.kind == "sequence":
            return [self._plain(item, (*key, str(position))) for position, item in enumerate(node.items)]
        mapping: dict[str, Any] = {}
        for key_node, value_node in zip(node.items[::2], node.items[1::2], strict=True):
            part = self._key(key_node)
            if part in mapping:
                raise self._error(key_node.line, f"{part!r} is given twice", "keep one of them")
            mapping[part] = self._plain(value_node, (*key, part))
            self._places[*key, part] = self._place(key_node.line)
        return mapping

    def _key(self, node: _Node) -> str:
        self._check_tag(node)
        if node.kind != "scalar" or (node.is_plain and node.text in _NULL):
            raise self._error(
                node.line, f"has a {'null' if node.kind == 'scalar' else node.kind} as a key", "write a name"
            )
        if node.is_plain and node.text == _MERGE:
            raise self._error(node.line, "has a merge key (<<)", "repeat the settings, or name a file as `base`")
        return self._check_text(node)

    def _check_tag(self, node: _Node) -> None:
        if node.tag is not None and node.tag != "!":
            shown = node.tag.replace(_PREFIX, "!!")
            raise self._error(node.line, f"has the tag {shown!r}", "remove it: a job is plain data")

    def _check_text(self, node: _Node) -> str:
        try:
            node.text.encode()
        except UnicodeEncodeError as error:
            raise self._error(node.line, f"{node.text!r} is half of a character", "write the character") from error
        return node.text

    def _scalar(self, node: _Node) -> Any:
        text = self._check_text(node)
        if not node.is_plain:
            return text
        if text in _NULL:
            return None
        if text in _BOOLS:
            return _BOOLS[text]
        if _OCTAL.fullmatch(text):
            problem = f"{text[:40]!r} is octal to some programs and decimal to others"
            raise self._error(node.line, problem, "write it without a leading zero, or in quotes")
        try:
            if _INTEGER.fullmatch(text):
                return int(text.replace("_", ""), 0)
            if _FLOAT.fullmatch(text):
                return _float(text.replace("_", ""))
        except ValueError as error:
            raise self._error(node.line, f"{text[:40]!r} is not a number: {error}", "write a number") from error
        return text

    def _place(self, line: int) -> str:
        return self._name if self._one_line else f"{self._name}:{line}"

    def _error(self, line: int, problem: str, fix: str) -> UserError:
        return UserError(self._place(line), problem, fix)


def _float(text: str) -> float:
    special = text.lower().lstrip("+-")
    if special == ".nan":
        return math.nan
    if special == ".inf":
        return -math.inf if text.startswith("-") else math.inf
    return float(text)
