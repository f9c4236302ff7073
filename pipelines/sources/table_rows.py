"""Tables of every format by one interface: columns, units, rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from pipelines.samples import Rejected
from pipelines.sources import textual
from pipelines.sources.selectors import Row, parse_selector
from pipelines.sources.table_files import TableFile
from pipelines.sources.units import Column, Unit


def list_columns(file: TableFile, endpoint: str | None) -> list[Column]:
    """Return the columns of a file: for JSON, those of its first rows."""
    if file.format in ("parquet", "arrow"):
        from pipelines.sources import columnar  # pyarrow is loaded only where it is used

        return columnar.columns(file, endpoint)
    return textual.columns(file, endpoint)


def list_units(file: TableFile, endpoint: str | None) -> list[Unit]:
    """Return the parts of a file that tasks read. No row is read."""
    if file.format in ("parquet", "arrow"):
        from pipelines.sources import columnar

        return columnar.units(file, endpoint)
    return textual.units(file, endpoint)


def read_rows(
    unit: Unit, wanted: Callable[[list[str]], list[str]] | None, endpoint: str | None
) -> Iterator[Row | Rejected]:
    """Yield the rows of a unit, and lines that are none. `wanted` chooses among the columns of the file."""
    if unit.file.format in ("parquet", "arrow"):
        from pipelines.sources import columnar

        known = [column.name for column in columnar.columns(unit.file, endpoint)]
        yield from columnar.rows(unit, wanted(known) if wanted else None, endpoint)
    else:
        yield from textual.rows(unit, endpoint)


def wanted_columns(selectors: Iterable[str], known: list[str]) -> list[str]:
    """Return the columns that any of the selectors needs, in the order of the table."""
    paths = (path for selector in selectors for path in parse_selector(selector).paths)
    needed = {name for path in paths for name in path.columns(known)}
    return [name for name in known if name in needed]
