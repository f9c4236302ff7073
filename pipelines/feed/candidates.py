"""Candidates of a table as negatives: which ones a row takes, and their samples, each read once.

Which candidates a row takes depends on the table, the row, the epoch and the seed only.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TypeVar

import numpy as np

from pipelines.candidates.table import CandidateTable
from pipelines.candidates.types import CandidateRows, Int64Array, Pool, content_id
from pipelines.errors import BadMedia, UserError
from pipelines.feed.rows import RowReader, StoredSample
from pipelines.plan.subset import seed_of_name
from pipelines.plan.types import CANDIDATE_STREAM, NO_SAMPLES, Row, SourceTable
from pipelines.shards.manifest import Manifest, read_manifest
from pipelines.storage.location import open_store
from pipelines.storage.store import Store

T = TypeVar("T")
R = TypeVar("R")
_READERS = 16  # requests at a time: a store answers each in tens of milliseconds
_PART_BYTES = 256 << 20  # of parts of the table that a process keeps in memory
_FIX = "mine again"


def with_plan_rows(
    table: SourceTable, source: str, candidates: CandidateTable | None, curation: Sequence[CandidateTable]
) -> SourceTable:
    """Return what a plan has to know of a source: the clusters of a table, and the drops and weights of all tables.

    Weights of several tables are multiplied.
    """
    tables = [*([candidates] if candidates else []), *curation]
    plans = [some.plan_rows(source) for some in tables]
    dropped = [rows.sample[~rows.keep] for rows in plans]
    if dropped:
        table = replace(table, dropped=np.unique(np.concatenate(dropped)))
    weighted = np.unique(np.concatenate([NO_SAMPLES, *(rows.sample[rows.weight < 1] for rows in plans)]))
    weighted = np.setdiff1d(weighted, table.dropped)
    if len(weighted):
        weights = np.ones(len(weighted))
        for rows in plans:
            places = np.searchsorted(weighted, rows.sample)
            known = np.append(weighted, -1)[places] == rows.sample
            weights[places[known]] *= rows.weight[known]
        table = replace(table, weighted=weighted, weights=weights)
    if candidates:
        is_clustered = plans[0].cluster >= 0
        table = replace(table, clustered=plans[0].sample[is_clustered], clusters=plans[0].cluster[is_clustered])
    return table


@dataclass(frozen=True, slots=True)
class Chosen:
    """The candidates that a row takes, in their order in the table."""

    numbers: tuple[int, ...]
    ids: tuple[int, ...]
    teacher: tuple[float, ...]
    """Teacher's score of each; NaN where unknown."""
    positive_teacher: float
    """Teacher's score of the row's own positive."""


class CandidateReader:
    """Candidates of one table, read by one process. `rows` reads the split that the table is of."""

    def __init__(
        self, table: CandidateTable, store: Store, data: Manifest, rows: RowReader, endpoint: str | None
    ) -> None:
        table.check_data(data)
        self._table = table
        self._data = data
        self._store = store
        self._endpoint = endpoint
        self._readers = {(store.url, data.split): rows}
        self._parts = _PartCache(table)
        self._starts: dict[str, Int64Array] = {}
        self._pools = table.manifest.pools
        for pool in self._pools:
            self._check_pool(pool)

    def chosen(self, row: Row, count: int, draw: Sequence[int] | None) -> Chosen:
        """Return up to `count` candidates of a row: the first ones, or random ones by the numbers `draw`."""
        source, index = row
        if not self._table.has_rows(source):
            return Chosen((), (), (), np.nan)
        starts = self._starts_of(source)
        shard = int(np.searchsorted(starts, index, side="right")) - 1
        rows, at = self._parts.get(source, shard), index - int(starts[shard])
        places = np.arange(*rows.span(at).indices(len(rows.candidate))[:2])
        if draw is not None:
            rng = np.random.default_rng([*draw, CANDIDATE_STREAM, seed_of_name(source), index])
            places = np.sort(rng.permutation(places)[:count])
        places = places[:count]
        return Chosen(
            tuple(rows.candidate[places].tolist()),
            tuple(rows.id[places].tolist()),
            tuple(rows.teacher[places].tolist()),
            float(rows.positive_teacher[at]),
        )

    def is_own(self, number: int, source: str) -> bool:
        """Return whether a candidate is in a source of the split that is trained on."""
        pool = self._pools[self._pool_of(number)]
        return (pool.root, pool.split, pool.source) == (None, self._data.split, source)

    def read(self, ids: Mapping[int, int]) -> Iterator[tuple[int, StoredSample, str]]:
        """Yield number, stored sample and origin of each candidate of `ids`, which has the content id of each number.

        Adjacent ones are read at once, several stretches at a time. Raises `UserError` for another content.
        """
        numbers = sorted(ids)
        work = []
        for pool, members in groupby(numbers, key=self._pool_of):
            info = self._pools[pool]
            start = int(self._table.manifest.pool_starts[pool])
            reader = self._reader(info)
            runs = reader.runs([(info.source, number - start) for number in members])
            work += [(reader, run, start) for run in runs]
        for (reader, run, start), found in _ahead(work, lambda some: some[0].read_run(some[1])):
            for row, item in zip(run, found, strict=True):
                number = start + row[1]
                if not isinstance(item, BadMedia):
                    self._check_content(item[0].target_sha256, ids[number], reader.origin(row))
                yield number, item, reader.origin(row)

    def _check_content(self, sha256: str, expected: int, origin: str) -> None:
        if (found := content_id(sha256)) != expected:
            problem = f"says that the content of {origin} has the id {expected}, and its id is {found}"
            raise UserError(self._table.store.url, problem, _FIX)

    def _pool_of(self, number: int) -> int:
        return int(np.searchsorted(self._table.manifest.pool_starts, number, side="right")) - 1

    def _reader(self, pool: Pool) -> RowReader:
        store = self._store if pool.root is None else open_store(pool.root, self._endpoint)
        place = (store.url, pool.split)
        if place not in self._readers:
            self._readers[place] = RowReader(store, read_manifest(store, pool.split), self._endpoint)
        return self._readers[place]

    def _check_pool(self, pool: Pool) -> None:
        reader = self._reader(pool)
        found = reader.manifest.sources.get(pool.source)
        if found is None or found.fingerprint != pool.fingerprint:
            where = f"{pool.root or self._store.url} {pool.split}"
            has = "does not have it" if found is None else f"has {found.fingerprint[:12]}"
            problem = f"takes candidates from {pool.source} {pool.fingerprint[:12]} of {where}, which {has}"
            raise UserError(self._table.store.url, problem, _FIX)

    def _starts_of(self, source: str) -> Int64Array:
        if source not in self._starts:
            sizes = [part.num_samples for part in self._table.manifest.parts[source]]
            self._starts[source] = np.cumsum([0, *sizes], dtype=np.int64)
        return self._starts[source]


class _PartCache:
    """Parts of a table, read when first needed. The least recently used are dropped beyond `_PART_BYTES`."""

    def __init__(self, table: CandidateTable) -> None:
        self._table = table
        self._kept: OrderedDict[tuple[str, int], CandidateRows] = OrderedDict()
        self._num_bytes = 0

    def get(self, source: str, shard: int) -> CandidateRows:
        place = (source, shard)
        if place not in self._kept:
            self._kept[place] = self._table.rows(source, shard)
            self._num_bytes += _bytes_of(self._kept[place])
            while self._num_bytes > _PART_BYTES and len(self._kept) > 1:
                self._num_bytes -= _bytes_of(self._kept.popitem(last=False)[1])
        self._kept.move_to_end(place)
        return self._kept[place]


def _bytes_of(rows: CandidateRows) -> int:
    return 30 * len(rows.candidate) + 150 * len(rows)  # a key is a Python string


def _ahead(work: Sequence[T], call: Callable[[T], R]) -> Iterator[tuple[T, R]]:
    """Yield each piece of work and its result, in order, while threads do the next ones."""
    if not work:
        return
    waiting: deque[tuple[T, Future[R]]] = deque()
    with ThreadPoolExecutor(_READERS) as pool:
        for some in work:
            waiting.append((some, pool.submit(call, some)))
            if len(waiting) == _READERS:
                done, result = waiting.popleft()
                yield done, result.result()
        for done, result in waiting:
            yield done, result.result()
