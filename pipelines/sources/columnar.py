"""Parquet and Arrow tables: a unit is a row group or a record batch, and only the columns that are needed are read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import UserError
from pipelines.samples import CellRef
from pipelines.sources.selectors import Row
from pipelines.sources.table_files import TableFile
from pipelines.sources.units import Column, Unit
from pipelines.storage.ranged import open_binary
from pipelines.storage.urls import is_local

_ROWS_AT_ONCE = 256
_ROWS_OF_BYTES_AT_ONCE = 16  # a picture may have several megabytes


def columns(file: TableFile, endpoint: str | None) -> list[Column]:
    """Return the columns of a table in order."""
    with _opened(file.url, endpoint) as table:
        schema = table.schema_arrow if isinstance(table, pq.ParquetFile) else table.schema
        return [Column(field.name, str(field.type)) for field in schema]


def units(file: TableFile, endpoint: str | None) -> list[Unit]:
    """Return the row groups of a Parquet file, the record batches of a local Arrow file, or else the file as one unit.

    The record batches of an Arrow file are as cheap to list only where it can be mapped into memory.
    """
    with _opened(file.url, endpoint) as table:
        if isinstance(table, pq.ParquetFile):
            groups = [table.metadata.row_group(part) for part in range(table.num_row_groups)]
            sizes = [(group.num_rows, group.total_byte_size) for group in groups]
        elif isinstance(table, pa.RecordBatchFileReader) and is_local(file.url):
            batches = (table.get_batch(part) for part in range(table.num_record_batches))
            sizes = [(batch.num_rows, batch.nbytes) for batch in batches]
        else:
            return [Unit(file)]
    found, first_row = [], 0
    for part, (num_rows, num_bytes) in enumerate(sizes):
        if num_rows:
            found.append(Unit(file, part, first_row, num_rows, num_bytes=num_bytes))
        first_row += num_rows
    return found


def rows(unit: Unit, wanted: Sequence[str] | None, endpoint: str | None) -> Iterator[Row]:
    """Yield the rows of a unit with the columns that are `wanted`, of those that the file has."""
    with _opened(unit.file.url, endpoint) as table:
        schema = table.schema_arrow if isinstance(table, pq.ParquetFile) else table.schema
        names = tuple(schema.names)
        kept = [name for name in names if wanted is None or name in wanted]
        number = unit.first_row
        part = None if unit.num_rows is None else unit.part
        at_once = (
            _ROWS_OF_BYTES_AT_ONCE if any(_holds_bytes(schema.field(name).type) for name in kept) else _ROWS_AT_ONCE
        )
        for found, first, batch in _batches(table, part, kept, at_once):
            for index, values in enumerate(batch.to_pylist()):
                number += 1
                yield Row(values, names, f"{unit.file.name}:{number}", unit.file.url, found, first + index)


def _batches(
    table: Any, part: int | None, kept: list[str], at_once: int = _ROWS_AT_ONCE
) -> Iterator[tuple[int, int, pa.RecordBatch]]:
    """Yield rows of a part, or of the whole Arrow file: their part, the first of them in it, and the rows."""
    if isinstance(table, pq.ParquetFile):
        first = 0
        for batch in table.iter_batches(at_once, row_groups=[part], columns=kept, use_threads=False):
            yield part or 0, first, batch
            first += batch.num_rows
        return
    if isinstance(table, pa.RecordBatchFileReader):
        parts = range(table.num_record_batches) if part is None else [part]
        found = ((number, table.get_batch(number)) for number in parts)
    else:
        found = ((number, batch) for number, batch in enumerate(table) if part is None or number == part)
    for number, batch in found:
        for first in range(0, batch.num_rows, at_once):
            yield number, first, batch.select(kept).slice(first, at_once)


def read_cells(url: str, part: int, refs: Sequence[CellRef], endpoint: str | None) -> Iterator[tuple[CellRef, bytes]]:
    """Yield the bytes of cells of one part of a table. Raises `UserError` where the table has others by now."""
    by_row: dict[int, list[CellRef]] = {}
    for ref in refs:
        by_row.setdefault(ref.row, []).append(ref)
    names = sorted({str(ref.column[0]) for ref in refs})
    with _opened(url, endpoint) as table:
        for _, first, batch in _batches(table, part, names, _ROWS_OF_BYTES_AT_ONCE):
            for row in (row for row in range(first, first + batch.num_rows) if row in by_row):
                (values,) = batch.slice(row - first, 1).to_pylist()
                for ref in by_row[row]:
                    yield ref, _value(values, ref)


def _holds_bytes(kind: pa.DataType) -> bool:
    """Return whether values of a type hold bytes, in fields or elements, too."""
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return True
    return any(_holds_bytes(kind.field(number).type) for number in range(kind.num_fields))


def _value(values: Mapping[str, Any], ref: CellRef) -> bytes:
    value: Any = values
    try:
        for step in ref.column:
            value = value[step]
    except (KeyError, IndexError, TypeError):
        value = None
    if not isinstance(value, bytes):
        raise UserError(ref.path, "was replaced while it was read", "run the job again")
    return value


@contextmanager
def _opened(url: str, endpoint: str | None) -> Iterator[Any]:
    """Open a Parquet file, an Arrow file or an Arrow stream, whatever its name. Damage becomes a `UserError`."""
    try:
        with open_binary(url, endpoint, buffered=False) as file:
            start = file.read(6)
            file.seek(0)
            if start.startswith(b"PAR1"):
                with pq.ParquetFile(file, pre_buffer=False) as table:
                    yield table
                return
            source = pa.memory_map(url) if is_local(url) else pa.PythonFile(file, mode="r")
            yield pa.ipc.open_file(source) if start == b"ARROW1" else pa.ipc.open_stream(source)
    except FileNotFoundError as error:
        raise UserError(url, "does not exist any more", "run the job again") from error
    except (pa.ArrowException, OSError, EOFError) as error:  # pyarrow raises OSError for damaged pages, too
        raise UserError(url, f"cannot be read: {error}", "fetch it again") from error
