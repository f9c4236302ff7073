"""Targets that rows name by an id: a second table, joined in memory, without the bytes of its media."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from pipelines.errors import BadMedia, UserError
from pipelines.samples import CellRef, Rejected
from pipelines.sources.media_roots import MediaRoots
from pipelines.sources.selectors import Row, find
from pipelines.sources.table_config import Pool
from pipelines.sources.table_files import TableFile
from pipelines.sources.table_rows import list_units, read_rows, wanted_columns
from pipelines.sources.values import Part, media_values, page_of, resolve, text_of

_Entry = tuple[str, tuple[str | CellRef, ...], int | None]
_loaded: dict[str, dict[str, _Entry]] = {}


@dataclass(frozen=True)
class PoolReader:
    """The rows of a pool by their ids. Each process reads the table once, on first use."""

    files: tuple[TableFile, ...]
    config: Pool
    roots: MediaRoots
    endpoint: str | None

    def get(self, id: str) -> Part:
        """Return text and media of a row. Raises `BadMedia`: missing_id, and the reasons of its media."""
        entry = self.entries().get(id)
        if entry is None:
            raise BadMedia("missing_id", f"{id[:100]!r} is not in the pool")
        text, values, page = entry
        return Part(text, tuple(resolve(value, self.roots, page) for value in values))

    def entries(self) -> dict[str, _Entry]:
        """Return id -> text, paths or cells of the media, and page. Of two rows with one id, the first counts."""
        key = repr((self.files, self.config, self.endpoint))
        if key not in _loaded:
            found: dict[str, _Entry] = {}
            selector = self.config.id or ""
            for row in self._rows(selector):
                if id := find(selector, row):
                    found.setdefault(str(id.value), self._entry(row))
            if not found:
                raise UserError("pool", f"has no row with {selector!r}", "correct pool.id")
            _loaded[key] = found
        return _loaded[key]

    def _rows(self, id: str) -> Iterator[Row]:
        selectors = [id, *filter(None, (self.config.text, self.config.page)), *self._media()]
        wanted = partial(wanted_columns, selectors)
        for file in self.files:
            for unit in list_units(file, self.endpoint):
                yield from (row for row in read_rows(unit, wanted, self.endpoint) if not isinstance(row, Rejected))

    def _media(self) -> list[str]:
        media = self.config.media
        return [media] if isinstance(media, str) else list(media or ())

    def _entry(self, row: Row) -> _Entry:
        cell = find(self.config.text, row) if self.config.text else None
        values = [value for selector in self._media() for value in media_values(find(selector, row), row)]
        page = page_of(find(self.config.page, row), self.config.page) if self.config.page else None
        return text_of(cell, self.config.text or ""), tuple(values), page
