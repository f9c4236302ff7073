"""Rows of a plan to stored samples: one ranged read for each run of adjacent rows."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from threading import Lock

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from pipelines.errors import BadMedia, UserError
from pipelines.plan.types import Row
from pipelines.samples import Members, Sample
from pipelines.shards.index import ShardIndex, read_shard_index
from pipelines.shards.manifest import Manifest, ShardInfo, SourceInfo, manifest_path, source_info
from pipelines.shards.mapping import SourceMapping
from pipelines.shards.read import (
    Parser,
    check_length,
    external_sample_parser,
    parse_native_sample,
    read_samples,
    shard_file,
)
from pipelines.storage.store import Store
from pipelines.stored_json import explain

_RANGE_BYTES = 64 << 20  # a longer run is read in parts
_INDEX_BYTES = 256 << 20  # of shard indices that a process keeps in memory

StoredSample = tuple[Sample, Members] | BadMedia
"""What was read for a row."""


class RowReader:
    """Reads rows of one split. Every method raises `UserError` for data that are missing or out of reach."""

    def __init__(self, store: Store, manifest: Manifest, endpoint: str | None) -> None:
        self._store = store
        self.manifest = manifest
        self._endpoint = endpoint
        self._sources: dict[str, _Source] = {}
        self._checked: set[str] = set()
        self.indices = _IndexCache(store)

    def read(self, rows: Iterable[Row]) -> Iterator[tuple[Row, StoredSample]]:
        """Yield each row with what was read for it, in order, with one run of adjacent rows in memory."""
        for run in self.runs(rows):
            yield from zip(run, self.read_run(run), strict=True)

    def origin(self, row: Row) -> str:
        """Return URL of the shard and key of a row, for messages."""
        source, position = row
        ordinal, within = self._source(source).locate(position)
        shard = self._source(source).shards[ordinal]
        store, path = shard_file(self._store, shard, self._endpoint)
        return f"{store.url}/{path} key {self.indices.get(shard).keys[within]}"

    def runs(self, rows: Iterable[Row]) -> Iterator[list[Row]]:
        """Cut rows into those that one ranged read gives. A run of the plan stays whole, unless it crosses shards."""
        run: list[Row] = []
        for row in rows:
            if run and not self._extends(run, row):
                yield run
                run = []
            run.append(row)
        if run:
            yield run

    def _extends(self, run: Sequence[Row], row: Row) -> bool:
        (source, first), (_, last) = run[0], run[-1]
        if row != (source, last + 1):
            return False
        shard, begin = self._source(source).locate(first)
        next_shard, end = self._source(source).locate(last + 1)
        if shard != next_shard:
            return False
        _, length = self.indices.get(self._source(source).shards[shard]).span(begin, end)
        return length <= _RANGE_BYTES

    def read_run(self, run: Sequence[Row]) -> Sequence[StoredSample]:
        """Return what is read for a run of `runs`. Several threads may call it at a time."""
        name, first = run[0]
        source = self._source(name)
        ordinal, begin = source.locate(first)
        shard = source.shards[ordinal]
        store, path = shard_file(self._store, shard, self._endpoint)
        rows = range(begin, begin + len(run))
        try:
            found = read_samples(store, path, self.indices.get(shard), rows, source.parse, shard.tag)
            if any(isinstance(item, BadMedia) for item in found):
                self._check_once(store, path, shard)
        except FileNotFoundError as error:
            place = f"{store.url}/{path}"
            raise UserError(place, "is named in the manifest but missing", shard.remedy) from error
        return found

    def _check_once(self, store: Store, path: str, shard: ShardInfo) -> None:
        """Raise `UserError` where bad samples show that a shard was replaced: one of another length."""
        if shard.path not in self._checked:
            check_length(store, path, shard)
            self._checked.add(shard.path)

    def _source(self, name: str) -> _Source:
        if name not in self._sources:
            info = source_info(self._store, self.manifest, name)
            starts = np.cumsum([0, *(shard.num_samples for shard in info.shards)], dtype=np.int64)
            if starts[-1] != info.num_samples:
                place = f"{self._store.url}/{manifest_path(self.manifest.split)} sources.{name}"
                problem = f"num_samples={info.num_samples}, but its shards have {starts[-1]}"
                raise UserError(place, problem, "run the job again that wrote it")
            parse: Parser = parse_native_sample
            if info.mapping is not None:
                parse = external_sample_parser(name, self._mapping(name, info))
            self._sources[name] = _Source(info.shards, starts, parse)
        return self._sources[name]

    def _mapping(self, name: str, info: SourceInfo) -> SourceMapping:
        try:
            return SourceMapping.model_validate(info.mapping)
        except ValidationError as error:
            place = f"{self._store.url}/{manifest_path(self.manifest.split)} sources.{name}.mapping"
            raise UserError(place, explain(error), "run the index job again") from error


@dataclass(frozen=True, slots=True)
class _Source:
    """A source of the manifest. Of S shards, s holds positions `starts[s]` .. `starts[s + 1] - 1` (int64 [S + 1])."""

    shards: tuple[ShardInfo, ...]
    starts: npt.NDArray[np.int64]
    parse: Parser

    def locate(self, position: int) -> tuple[int, int]:
        """Return the ordinal of the shard that holds a position, and the row within it."""
        if not 0 <= position < self.starts[-1]:
            raise IndexError(f"sample {position} is outside 0..{self.starts[-1] - 1}")
        ordinal = int(np.searchsorted(self.starts, position, side="right")) - 1
        return ordinal, position - int(self.starts[ordinal])


class _IndexCache:
    """Shard indices, read when first needed. The least recently used are dropped beyond `_INDEX_BYTES`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._kept: OrderedDict[str, ShardIndex] = OrderedDict()
        self._lock = Lock()
        self.num_bytes = 0

    def get(self, shard: ShardInfo) -> ShardIndex:
        """Return the index of a shard. Raises `UserError` if it is missing or not the manifest's."""
        with self._lock:
            return self._get(shard)

    def _get(self, shard: ShardInfo) -> ShardIndex:
        if shard.index_path in self._kept:
            self._kept.move_to_end(shard.index_path)
            return self._kept[shard.index_path]
        index = read_shard_index(self._store, shard)
        self._kept[shard.index_path] = index
        self.num_bytes += index.num_bytes
        while self.num_bytes > _INDEX_BYTES and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self.num_bytes -= dropped.num_bytes
        return index
