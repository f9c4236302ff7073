"""Values of cells as texts, lists and references of media."""

from __future__ import annotations

import ast
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from pipelines.errors import BadMedia
from pipelines.samples import CellRef, FramesRef, Reference
from pipelines.sources.media_roots import MediaRoots
from pipelines.sources.selectors import Cell, Row
from pipelines.texts import MAX_TEXT_BYTES


@dataclass(frozen=True, slots=True)
class Part:
    """Text and media of one side of a sample."""

    text: str = ""
    media: tuple[Reference, ...] = ()


def text_of(cell: Cell | None, selector: str) -> str:
    """Return the text of a cell, without spaces at its ends. "" for none.

    Raises `BadMedia`: not_text, not_utf8, too_long_text.
    """
    if cell is None or cell.is_empty:
        return ""
    if not isinstance(cell.value, str):
        raise BadMedia("not_text", f"{selector} is {type(cell.value).__name__}")
    try:
        num_bytes = len(cell.value.encode())
    except UnicodeEncodeError as error:  # half of a surrogate pair, as JSON may escape it
        raise BadMedia("not_utf8", f"{selector}: {error.reason}") from error
    if num_bytes > MAX_TEXT_BYTES:
        raise BadMedia("too_long_text", f"{selector}: {num_bytes} bytes, at most {MAX_TEXT_BYTES}")
    return cell.value.strip()


def number_of(cell: Cell | None, selector: str) -> float:
    """Return a finite number. Raises `BadMedia`: not_a_number."""
    value = None if cell is None else cell.value
    try:
        number = math.nan if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise BadMedia("not_a_number", f"{selector} is {str(value)[:40]!r}")
    return number


def media_values(cell: Cell | None, row: Row) -> list[str | CellRef]:
    """Return the path, or the place of the bytes, of each medium in a cell, and nothing for an empty one.

    A cell is a path, bytes, a struct of `bytes` and `path`, or a list of these. Raises `BadMedia`:
    not_a_medium, empty_file.
    """
    if cell is None or cell.is_empty:
        return []
    if cell.is_list:
        return [value for element in cell.elements() for value in media_values(element, row)]
    value = cell.value
    if isinstance(value, Mapping) and ("bytes" in value or "path" in value):
        if value.get("bytes"):
            return media_values(Cell(value["bytes"], (*cell.way, "bytes")), row)
        return media_values(Cell(value.get("path"), (*cell.way, "path")), row)
    if isinstance(value, bytes) and value:
        return [CellRef(row.table, row.part, row.index, cell.way, hashlib.sha256(value).hexdigest())]
    if isinstance(value, str):
        return [value.strip()]
    if isinstance(value, bytes):
        raise BadMedia("empty_file", "its cell holds no bytes")
    raise BadMedia("not_a_medium", f"is {type(value).__name__}, and neither a path nor bytes")


def resolve(value: str | CellRef, roots: MediaRoots, page: int | None = None) -> Reference:
    """Return the reference of a medium, or of one page. Raises `BadMedia`: no_such_page, those of `MediaRoots`."""
    ref = roots.find(value) if isinstance(value, str) else value
    if page is None:
        return ref
    if isinstance(ref, FramesRef):
        raise BadMedia("no_such_page", f"page {page} of a folder of pictures: {ref.path}")
    return replace(ref, page=page)


def page_of(cell: Cell | None, selector: str) -> int | None:
    """Return the number of a page, from zero. None for an empty cell. Raises `BadMedia`: not_a_number."""
    if cell is None or cell.is_empty:
        return None
    number = number_of(cell, selector)
    if number < 0 or number != int(number):
        raise BadMedia("not_a_number", f"{selector} is {number:g}, and no page from zero")
    return int(number)


def parsed(cell: Cell | None, how: Literal["json", "python_list"] | None) -> Cell | None:
    """Return a cell whose text is read as a list. Raises `BadMedia`: bad_list.

    Python lists are read as literals: nothing is evaluated.
    """
    if how is None or cell is None or not isinstance(cell.value, str) or cell.is_empty:
        return cell
    if len(cell.value) > MAX_TEXT_BYTES:
        raise BadMedia("too_long_text", f"a list of {len(cell.value)} characters, at most {MAX_TEXT_BYTES}")
    try:
        value: Any = json.loads(cell.value) if how == "json" else ast.literal_eval(cell.value.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError) as error:
        raise BadMedia("bad_list", f"{cell.value[:60]!r}: {error}") from error
    if not isinstance(value, list):
        raise BadMedia("bad_list", f"{cell.value[:60]!r} is {type(value).__name__}")
    return Cell(value, cell.way)


def draw(seed: int, purpose: str, origin: str) -> int:
    """Return a pseudo-random number of 64 bits that depends on the arguments only."""
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose} {origin}".encode()).digest()[:8])
