"""Selectors: which value of a row is meant.

    column            a column; a name with dots may be a column as a whole
    column.field      a field of a struct, or of each struct in a list
    column[0]         an element of a list; [-1] is the last, [*] stands for all
    messages[role=user].content    the first element that has this field
    #0  #2..          a column by its place; all columns from a place on
    a | b             the first that is not empty
    name?             may be empty, or missing in the table

There are no expressions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Annotated, Any

from pydantic import AfterValidator

_HEAD = re.compile(r"#(?P<place>\d+)(?P<rest>\.\.)?|(?P<column>[^.\[\]|?#\s](?:[^.\[\]|?]*[^.\[\]|?\s])?)")
_STEP = re.compile(
    r"\.(?P<field>[^.\[\]|?\s]+)|\[(?P<index>-?\d+)\]|\[(?P<all>\*)\]|\[(?P<key>\w+)=(?P<value>[^\]|]+)\]"
)
_EXAMPLES = "'caption', 'image.bytes', 'messages[-1].content', '#0', 'title | name' or 'note?'"


@dataclass(frozen=True, slots=True)
class Step:
    """One step from a value to a value in it: a field, a position, all elements, or the one with a key of a value."""

    field: str = ""
    index: int | None = None
    key: str = ""
    value: str = ""


@dataclass(frozen=True, slots=True)
class Path:
    """One alternative of a selector. `text` is as it was written, without the question mark."""

    text: str
    column: str
    place: int | None
    is_rest: bool
    steps: tuple[Step, ...]

    def columns(self, known: Sequence[str]) -> list[str]:
        """Return the columns that it needs, of those that a table has."""
        if self.text in known:
            return [self.text]
        if self.place is not None:
            return list(known[self.place :] if self.is_rest else known[self.place : self.place + 1])
        return [self.column] if self.column in known else []


@dataclass(frozen=True, slots=True)
class Selector:
    """A parsed selector."""

    paths: tuple[Path, ...]
    is_optional: bool


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table: its values, all columns of the table in order, and where it is."""

    values: Mapping[str, Any]
    columns: Sequence[str]
    origin: str
    table: str = ""
    part: int = 0
    index: int = 0


@dataclass(frozen=True, slots=True)
class Cell:
    """A value of a row, and the way to it. Values from several places are `parts`, with a way each."""

    value: Any
    way: tuple[str | int, ...]
    parts: tuple[Cell, ...] | None = field(default=None)

    @property
    def is_list(self) -> bool:
        """Return whether the value is a list."""
        return self.parts is not None or isinstance(self.value, list | tuple)

    def elements(self) -> list[Cell]:
        """Return the elements of a list, or the value itself."""
        if self.parts is not None:
            return list(self.parts)
        if isinstance(self.value, list | tuple):
            return [Cell(value, (*self.way, number)) for number, value in enumerate(self.value)]
        return [self]

    @property
    def is_empty(self) -> bool:
        """Return whether there is nothing: null, a text of spaces, or a list of nothing."""
        if self.is_list:
            return all(part.is_empty for part in self.elements())
        return self.value is None or (isinstance(self.value, str) and not self.value.strip())


@cache
def parse_selector(text: str) -> Selector:
    """Return the parsed selector. Raises `ValueError` that shows how to write one."""
    paths = []
    for part in text.split("|"):
        written = part.strip().removesuffix("?").strip()
        head = _HEAD.match(written)
        if not head:
            raise ValueError(f"{text!r} is not a selector; write one like {_EXAMPLES}")
        position, steps = head.end(), []
        while position < len(written):
            found = _STEP.match(written, position)
            if not found:
                raise ValueError(f"{text!r}: {written[position:]!r} is not a step; write one like {_EXAMPLES}")
            index = int(found["index"]) if found["index"] else None
            steps.append(Step(found["field"] or "", index, found["key"] or "", found["value"] or ""))
            position = found.end()
        place = int(head["place"]) if head["place"] else None
        paths.append(Path(written, head["column"] or "", place, bool(head["rest"]), tuple(steps)))
    return Selector(tuple(paths), any(part.strip().endswith("?") for part in text.split("|")))


def _checked(text: str) -> str:
    parse_selector(text)
    return text


SelectorText = Annotated[str, AfterValidator(_checked)]
"""A selector in a spec."""


def find(selector: str, row: Row) -> Cell | None:
    """Return the value of the first alternative that is not empty. None if all are."""
    for path in parse_selector(selector).paths:
        cell = _found(path, row)
        if cell is not None and not cell.is_empty:
            return cell
    return None


def _found(path: Path, row: Row) -> Cell | None:
    if path.text in row.values:
        return Cell(row.values[path.text], (path.text,))
    if path.is_rest:
        cells = [Cell(row.values.get(name), (name,)) for name in path.columns(row.columns)]
        return Cell(None, (), tuple(cell for cell in cells if not cell.is_empty))
    names = path.columns(row.columns)
    if not names or names[0] not in row.values:
        return None
    return _walk(Cell(row.values[names[0]], (names[0],)), path.steps)


def _walk(cell: Cell, steps: Sequence[Step]) -> Cell | None:
    for number, step in enumerate(steps):
        maps = step == Step() or (step.field and cell.is_list)
        if maps:
            rest = steps[number + 1 :] if step == Step() else steps[number:]
            walked = [_walk(element, rest) for element in cell.elements()] if cell.is_list else []
            return Cell(None, cell.way, tuple(found for found in walked if found is not None))
        found = next(_stepped(cell, step), None)
        if found is None:
            return None
        cell = found
    return cell


def _stepped(cell: Cell, step: Step) -> Iterator[Cell]:
    if step.field:
        if isinstance(cell.value, Mapping) and step.field in cell.value:
            yield Cell(cell.value[step.field], (*cell.way, step.field))
    elif cell.is_list:
        elements = cell.elements()
        if step.index is None:
            yield from (
                one for one in elements if isinstance(one.value, Mapping) and one.value.get(step.key) == step.value
            )
        elif -len(elements) <= step.index < len(elements):
            yield elements[step.index]
