"""A look at a table: format, columns, media, layout, and what its first rows become. Nothing is written.

look_at("products.csv") -> TableLook: what is there, settings that read it, samples, and problems with counts
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from pipelines.config import MediaConfig
from pipelines.errors import BadMedia, UserError
from pipelines.media.signatures import NUM_BYTES, sniff
from pipelines.samples import CellRef, RawSample, Reference, Rejected
from pipelines.sources.presets import PRESETS
from pipelines.sources.references import ReferenceReader
from pipelines.sources.selectors import Row
from pipelines.sources.suggest import suggest_columns, suggest_roots
from pipelines.sources.table import LARGE_UNIT_BYTES, TableReader, open_table
from pipelines.sources.table_config import TableSource
from pipelines.sources.table_files import TableFile, find_table
from pipelines.sources.table_rows import list_columns, list_units, read_rows
from pipelines.sources.units import Unit

MAX_MEDIA = 1000
_MAX_ROWS = 1000
_FIRST_ROWS = 50
_READERS = 16
_MAX_EXAMPLE = 60


@dataclass(slots=True)
class TableLook:
    """What a look at a table has found. `settings` are those of a source of `ingest`, or empty."""

    table: str
    format: str
    files: int
    units: int
    rows: int | None
    columns: list[dict[str, str]]
    preset: str = ""
    about: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    task: str = ""
    rows_read: int = 0
    num_samples: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    media: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    samples: list[RawSample] = field(default_factory=list)
    reader: TableReader | None = None


def look_at(
    table: str,
    *,
    name: str = "mine",
    preset: str | None = None,
    media_root: str | None = None,
    num_samples: int = 3,
    endpoint: str | None = None,
) -> TableLook:
    """Return what is in a table. Up to 1,000 rows are read, and up to 1,000 media looked up.

    Raises `UserError` for a table that is missing or cannot be read. Other faults are `problems`.
    """
    files = find_table(table, endpoint, "table")
    units = list(chain.from_iterable(list_units(file, endpoint) for file in files))
    rows = _first_rows(units, endpoint)
    found = _described(table, files, units, rows, endpoint)
    known = {preset.name: preset for preset in PRESETS}
    columns = [column["name"] for column in found.columns]
    settings: dict[str, Any]
    if preset:
        layout, settings = known.get(preset), {"preset": preset}
    else:
        layout, settings = suggest_columns(columns, rows)
    if not settings:
        found.problems.append("no column says what is a query and what is a positive: write query and positive")
        return found
    if media_root:
        settings["media_root"] = media_root
    elif layout is not None or not preset:
        settings |= suggest_roots(settings, layout, table, units, rows, endpoint)
    found.preset, found.about = (layout.name, layout.about) if layout else ("", "")
    found.settings = {"table": table, **settings}
    try:
        config = TableSource.model_validate(found.settings)
        found.reader = open_table(name, config, endpoint=endpoint)
    except UserError as error:
        found.problems.append(str(error))
        return found
    _read(found, found.reader, num_samples, endpoint)
    return found


def _described(
    table: str, files: Sequence[TableFile], units: Sequence[Unit], rows: Sequence[Row], endpoint: str | None
) -> TableLook:
    counts = [unit.num_rows for unit in units]
    known = [count for count in counts if count is not None]
    columns = [
        {"name": column.name, "type": column.type, "example": _example(column.name, rows)}
        for column in list_columns(files[0], endpoint)
    ]
    total = sum(known) if len(known) == len(counts) else None
    found = TableLook(table, files[0].format, len(files), len(units), total, columns)
    if not rows:
        found.problems.append("has no rows")
    largest = max((unit.num_bytes for unit in units), default=0)
    if files[0].format == "parquet" and largest > LARGE_UNIT_BYTES:
        found.problems.append(f"a row group has {largest / 1e6:,.0f} MB and is read as a whole: write smaller ones")
    return found


def _first_rows(units: Sequence[Unit], endpoint: str | None) -> list[Row]:
    found = (row for unit in units for row in read_rows(unit, None, endpoint) if isinstance(row, Row))
    return list(islice(found, _FIRST_ROWS))


def _example(name: str, rows: Sequence[Row]) -> str:
    value = next((value for row in rows if (value := row.values.get(name)) not in (None, "", [])), None)
    return "" if value is None else _short(value)


def _short(value: Any) -> str:
    """Return a value as people read it: bytes by their number and format."""
    if isinstance(value, bytes):
        kind = sniff(value[:NUM_BYTES])
        return f"{len(value):,} bytes" + (f" of {kind[1][1:]}" if kind else "")
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_short(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list):
        more = ", ..." if len(value) > 1 else ""
        return f"[{_short(value[0])}{more}]" if value else "[]"
    text = " ".join(str(value).split())
    return text if len(text) <= _MAX_EXAMPLE else f"{text[:_MAX_EXAMPLE]}..."


def _read(found: TableLook, reader: TableReader, num_samples: int, endpoint: str | None) -> None:
    """Add samples, rows that are not used, and media that were looked up."""
    found.task = str(reader.mapper.config.task)
    rejected: Counter[str] = Counter()
    samples: list[RawSample] = []
    for item in _limited(reader):
        if isinstance(item, RawSample):
            samples.append(item)
        else:
            rejected[item.reason] += 1
            found.examples.setdefault(item.reason, f"{item.origin}: {item.detail}".removesuffix(": "))
    found.rows_read, found.num_samples = len(samples) + rejected.total(), len(samples)
    found.rejected = dict(rejected.most_common())
    refs = list(islice((ref for raw in samples for ref in raw.files.values()), MAX_MEDIA))
    found.media, bad = _resolved(refs, endpoint)
    good = (raw for raw in samples if not any(ref in bad for ref in raw.files.values()))
    found.samples = list(islice(good, num_samples))
    for reason, count in found.rejected.items():
        found.problems.append(f"{reason} {count:,}, such as {found.examples[reason]}")
    for reason, number in Counter(bad.values()).items():
        first = next(ref.path for ref in bad if bad[ref] == reason)
        found.problems.append(f"{reason} {number:,} of {len(refs):,} media, such as {first}")
    if not samples:
        found.problems.append("no row gives a sample")


def _limited(reader: TableReader) -> Iterator[RawSample | Rejected]:
    return islice(chain.from_iterable(reader.read(unit) for unit in reader.units()), _MAX_ROWS)


def _resolved(refs: Sequence[Reference], endpoint: str | None) -> tuple[dict[str, int], dict[Reference, str]]:
    """Return the number of media of each kind, and the reason for each that cannot be used.

    Bytes in cells are counted as such: they were seen when their row was read.
    """

    def kind_of(ref: Reference) -> tuple[str, str]:
        try:
            with ReferenceReader(MediaConfig(), endpoint) as reader:
                data = reader.read(ref)
        except BadMedia as bad:
            return "", bad.reason
        if isinstance(data, list):
            return "video of pictures", ""
        kind = sniff(data[:NUM_BYTES])
        return (kind[0], "") if kind else ("", "unsupported_format")

    files = [ref for ref in dict.fromkeys(refs) if not isinstance(ref, CellRef)]
    with ThreadPoolExecutor(_READERS) as pool:
        found = dict(zip(files, pool.map(kind_of, files), strict=True))
    kinds = Counter("bytes in a cell" if isinstance(ref, CellRef) else found[ref][0] for ref in refs)
    del kinds[""]
    return dict(kinds.most_common()), {ref: reason for ref, (_, reason) in found.items() if reason}
