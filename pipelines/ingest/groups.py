"""Groups: the parts of a table that are planned together. Each is read once, and only if it is not stored yet.

    units of a table -> those of stored groups stay together -> the others are shuffled and cut into groups

A group has up to 16 units that lie apart, so that a table that is sorted by class is mixed. Its id changes with
whatever changes its shards. A table with one group is planned as a whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path

from pipelines.ingest.settings import IngestSettings
from pipelines.samples import RawSample, Rejected
from pipelines.sources.archives import is_archive
from pipelines.sources.media_roots import MediaRoots
from pipelines.sources.table import TableReader
from pipelines.sources.table_config import FromPrompts
from pipelines.sources.table_files import absolute
from pipelines.sources.table_rows import list_units
from pipelines.sources.units import Unit
from pipelines.storage.location import open_object
from pipelines.storage.urls import is_local

SHORT_ID = 8  # hex digits of a group, in names of shards and keys
_MAX_UNITS = 16
_MAX_ROWS = 1 << 18  # a sample takes 1.3 KB while its group is planned
_MAX_BYTES = 1 << 30  # media in cells are copied to a scratch file while their group is planned
_LINE_BYTES = 256  # of a row of text, where nothing says how many rows a unit has
_LISTERS = 16

StoredGroups = Mapping[str, Mapping[str, Sequence[str]]]
"""Source -> group -> ids of its units, of the dataset that is published."""


@dataclass(frozen=True)
class ListedTable:
    """A table and its units, in order."""

    reader: TableReader
    units: tuple[Unit, ...]


@dataclass(frozen=True)
class TableGroup:
    """Units that are planned together, in the order of the table. `is_whole` says that the table has no others."""

    id: str
    reader: TableReader = field(repr=False)
    units: tuple[Unit, ...]
    unit_ids: tuple[str, ...]
    is_whole: bool

    @property
    def source(self) -> str:
        """Name of the source in the spec."""
        return self.reader.name

    @property
    def name(self) -> str:
        """What names of shards and keys carry: nothing for a whole table."""
        return "" if self.is_whole else self.id[:SHORT_ID]

    @property
    def root(self) -> Path | None:
        """Folder to which paths of media are relative: for a whole table, the one that its samples share."""
        return None if self.is_whole else _media_folder(self.reader)

    @property
    def num_rows(self) -> int:
        """Rows, where that is known, and an estimate by the bytes elsewhere. At most the `limit` of the table."""
        rows = sum(map(estimated_rows, self.units))
        return min(rows, self.reader.mapper.config.limit or rows)

    def read(self) -> Iterator[RawSample | Rejected]:
        """Yield the samples of all units. A `limit` is drawn from a whole table."""
        if self.is_whole:
            yield from self.reader.read_all()
        else:
            for unit in self.units:
                yield from self.reader.read(unit)


def list_table(reader: TableReader) -> ListedTable:
    """Return a table with its units. Files are opened several at a time, and no row is read."""
    with ThreadPoolExecutor(_LISTERS) as pool:
        found = pool.map(lambda file: list_units(file, reader.endpoint), reader.files)
        return ListedTable(reader, tuple(unit for units in found for unit in units))


def form_groups(table: ListedTable, stored: StoredGroups, settings: IngestSettings) -> list[TableGroup]:
    """Return the groups of a table, by id. Groups of the published dataset stay if all of their units are there.

    A `limit` is drawn from all samples, so that such a table is one group.
    """
    reader = table.reader
    places = {reader.unit_id(unit): place for place, unit in enumerate(table.units)}
    attached = _attached(reader)

    def made(unit_ids: Sequence[str], is_whole: bool = False) -> TableGroup:
        ids = sorted(unit_ids, key=places.__getitem__)
        limit = str(reader.mapper.config.limit)
        id = settings.group_id([reader.name, str(is_whole), limit, *attached, *ids])
        units = tuple(table.units[places[unit_id]] for unit_id in ids)
        # Of many files, only those of its units travel with a group.
        return TableGroup(id, reader if is_whole else replace(reader, files=()), units, tuple(ids), is_whole)

    if reader.mapper.config.limit is not None:
        return [made(list(places), is_whole=True)]
    kept = []
    for id, unit_ids in stored.get(reader.name, {}).items():
        if places.keys() >= set(unit_ids) and made(unit_ids).id == id:
            kept.append(made(unit_ids))
    known = {unit_id for group in kept for unit_id in group.unit_ids}
    new = [unit_id for unit_id in places if unit_id not in known]
    cut = list(_cut(new, {unit_id: table.units[places[unit_id]] for unit_id in new}, settings.seed))
    if not kept and len(cut) == 1:
        return [made(cut[0], is_whole=True)]
    return sorted([*kept, *map(made, cut)], key=lambda group: group.id)


def _cut(unit_ids: Sequence[str], units: Mapping[str, Unit], seed: int) -> Iterator[list[str]]:
    """Yield groups of units: those of a small table in order, and of a large one shuffled."""
    if len(unit_ids) > _MAX_UNITS or _is_large(units.values()):
        unit_ids = sorted(unit_ids, key=lambda unit_id: sha256(f"{seed} units {unit_id}".encode()).digest())
    group: list[str] = []
    for unit_id in unit_ids:
        together = [units[other] for other in (*group, unit_id)]
        if group and (len(together) > _MAX_UNITS or _is_large(together)):
            yield group
            group = []
        group.append(unit_id)
    if group:
        yield group


def _is_large(units: Iterable[Unit]) -> bool:
    found = list(units)
    return sum(map(estimated_rows, found)) > _MAX_ROWS or sum(unit.num_bytes for unit in found) > _MAX_BYTES


def estimated_rows(unit: Unit) -> int:
    """Return the rows of a unit, or an estimate by its bytes."""
    return unit.num_bytes // _LINE_BYTES if unit.num_rows is None else unit.num_rows


def _attached(reader: TableReader) -> list[str]:
    """Return files that belong to a table, with their tags: archives of media, and prompts. Their bytes may change."""
    urls = [url for roots in _all_roots(reader) for url in roots.urls if is_archive(url)]
    instruction = reader.mapper.config.instruction
    if isinstance(instruction, FromPrompts):
        urls.append(absolute(instruction.mbeir))
    opened = ((url, *open_object(url, reader.endpoint)) for url in dict.fromkeys(urls))
    return [f"{url} {store.tag(path)}" for url, store, path in opened]


def _media_folder(reader: TableReader) -> Path:
    urls = [url for roots in _all_roots(reader) for url in roots.urls if is_local(url)]
    return Path(os.path.commonpath(urls)) if urls else Path("/")


def _all_roots(reader: TableReader) -> list[MediaRoots]:
    pool = reader.mapper.pool
    return [reader.mapper.roots, *([pool.roots] if pool else [])]
