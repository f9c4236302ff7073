"""JSON lines, JSON, CSV and TSV as rows. A bad line is one `Rejected`, and never the end of the file.

Every cell of CSV and TSV is a text: `007` keeps its zeros, and `NA` is no missing value. Only the readers of large
libraries would convert them.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from pipelines.errors import UserError
from pipelines.samples import Rejected
from pipelines.sources.selectors import Row
from pipelines.sources.table_files import TableFile
from pipelines.sources.units import Column, Unit
from pipelines.storage.location import open_object
from pipelines.storage.ranged import open_binary
from pipelines.texts import MAX_TEXT_BYTES, bounded_lines, encoding_of

UNIT_BYTES = 4 << 20  # of lines: a group of units takes lines from several places of a file
_MAX_JSON_BYTES = 2 << 30
_SAMPLED_ROWS = 200
KEY = "_key"
"""Column with the names of the objects, in a JSON object of objects."""


def columns(file: TableFile, endpoint: str | None) -> list[Column]:
    """Return the columns of the first 200 rows, in order of appearance. Types are those of the first value."""
    found: dict[str, str] = {}
    if file.format in ("csv", "tsv"):
        with _text(file, endpoint) as lines:
            header = next(_csv(file, lines), [])
        return [Column(name, "string") for name in header]
    for number, row in enumerate(rows(Unit(file), endpoint)):
        if number == _SAMPLED_ROWS:
            break
        for name, value in row.values.items() if isinstance(row, Row) else ():
            if found.get(name, "null") in ("null", "list"):  # an empty list does not say of what
                found[name] = _type_of(value)
    return [Column(name, kind) for name, kind in found.items()]


def units(file: TableFile, endpoint: str | None, unit_bytes: int = UNIT_BYTES) -> list[Unit]:
    """Return 4 MB of JSON lines each, and other files as one unit."""
    store, path = open_object(file.url, endpoint)
    size = store.size(path)
    if file.format != "jsonl" or file.url.endswith(".gz"):
        return [Unit(file, num_bytes=size)]
    starts = range(0, size, unit_bytes)
    return [
        Unit(file, part, start=start, end=min(size, start + unit_bytes), num_bytes=min(unit_bytes, size - start))
        for part, start in enumerate(starts)
    ]


def rows(unit: Unit, endpoint: str | None) -> Iterator[Row | Rejected]:
    """Yield the rows of a unit. Reasons of `Rejected`: bad_json, bad_row, too_long_text."""
    read = {"jsonl": _lines, "json": _json, "csv": _table, "tsv": _table}[unit.file.format]
    try:
        yield from read(unit, endpoint)
    except FileNotFoundError as error:
        raise UserError(unit.file.url, "does not exist any more", "run the job again") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(unit.file.url, f"is damaged: {error}", "fetch it again") from error


def _lines(unit: Unit, endpoint: str | None) -> Iterator[Row | Rejected]:
    """Yield the lines that begin in the bytes of the unit."""
    file, number = unit.file, 0
    with _bytes(file, endpoint) as lines:
        _check_encoding(file, lines)
        if unit.start:  # the line around the first byte belongs to the unit before
            lines.seek(unit.start - 1)
            next(bounded_lines(lines), None)
        position = lines.tell()
        for line in bounded_lines(lines):
            if unit.end is not None and position >= unit.end:
                return
            number += 1
            origin = f"{file.name}@{position}" if unit.start else f"{file.name}:{number}"
            position = lines.tell()
            if line is None:
                yield Rejected(origin, "too_long_text", f"a line of more than {MAX_TEXT_BYTES} bytes")
            elif line.strip():
                yield _row(file, origin, line.removeprefix(codecs.BOM_UTF8))


def _row(file: TableFile, origin: str, line: bytes) -> Row | Rejected:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Rejected(origin, "bad_json", str(error))
    if not isinstance(values, dict):
        return Rejected(origin, "bad_json", f"is no object but {type(values).__name__}")
    return Row(values, tuple(values), origin, file.url)


def _json(unit: Unit, endpoint: str | None) -> Iterator[Row | Rejected]:
    file = unit.file
    with _bytes(file, endpoint) as data:
        content = data.read(_MAX_JSON_BYTES + 1)
    if len(content) > _MAX_JSON_BYTES:
        raise UserError(file.url, f"has more than {_MAX_JSON_BYTES >> 30} GB", "convert it to JSON lines: jq -c '.[]'")
    try:
        table = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(file.url, f"is not JSON: {error}", "repair the file") from error
    if isinstance(table, dict):
        table = [value | {KEY: key} if isinstance(value, dict) else value for key, value in table.items()]
    if not isinstance(table, list):
        raise UserError(file.url, "is neither a list of objects nor an object of objects", "convert it to JSON lines")
    for number, values in enumerate(table, start=1):
        origin = f"{file.name}:{number}"
        if isinstance(values, dict):
            yield Row(values, tuple(values), origin, file.url)
        else:
            yield Rejected(origin, "bad_json", f"is no object but {type(values).__name__}")


def _table(unit: Unit, endpoint: str | None) -> Iterator[Row | Rejected]:
    file = unit.file
    with _text(file, endpoint) as lines:
        reader = _csv(file, lines)
        header = tuple(next(reader, []))
        if len(set(header)) < len(header):
            raise UserError(file.url, "has two columns of one name", "rename one of them")
        number = 1
        while True:
            number += 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                yield Rejected(f"{file.name}:{number}", "bad_row", str(error))
                continue
            except UnicodeDecodeError as error:
                raise UserError(file.url, f"is not in UTF-8: {error}", "convert it, as with iconv -t utf-8") from error
            if cells is None:
                return
            if len(cells) == len(header):
                yield Row(dict(zip(header, cells, strict=True)), header, f"{file.name}:{number}", file.url)
            elif cells:
                detail = f"{len(cells)} cells, the header has {len(header)}"
                yield Rejected(f"{file.name}:{number}", "bad_row", detail)


def _csv(file: TableFile, lines: Iterator[str]) -> Iterator[list[str]]:
    csv.field_size_limit(MAX_TEXT_BYTES)
    if file.format == "tsv":
        return csv.reader(lines, delimiter="\t")
    return csv.reader(lines)


@contextmanager
def _bytes(file: TableFile, endpoint: str | None) -> Iterator[BinaryIO]:
    with open_binary(file.url, endpoint) as raw:
        if not file.url.endswith(".gz"):
            yield raw
            return
        with gzip.open(raw) as unpacked:
            yield unpacked  # type: ignore[misc]


@contextmanager
def _text(file: TableFile, endpoint: str | None) -> Iterator[io.TextIOWrapper]:
    with _bytes(file, endpoint) as raw:
        _check_encoding(file, raw)
        with io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as lines:
            yield lines


def _check_encoding(file: TableFile, raw: BinaryIO) -> None:
    encoding = encoding_of(raw.read(4))
    raw.seek(0)
    if not encoding.startswith("utf-8"):
        raise UserError(file.url, f"is in {encoding.upper()}", f"convert it: iconv -f {encoding} -t utf-8")


def _type_of(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "bool"
        case int() | float():
            return "number"
        case str():
            return "string"
        case list():
            return f"list<{_type_of(value[0])}>" if value else "list"
    return f"struct<{', '.join(f'{name}: {_type_of(inner)}' for name, inner in value.items())}>"
