"""Candidates of the samples of a few shards: an actor that searches a pool and writes parts of the table.

A part depends on its samples, the pool and the vectors only. So any number of actors writes the same bytes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from jobs.embedding.listings import samples_of
from jobs.mining.pools import NO_ITEM, Pool, Positives, SourceSamples, unique_ids
from jobs.mining.scratch import Scratch
from pipelines.candidates.types import CandidateRows, Int64Array
from pipelines.candidates.write import PartWriter
from pipelines.items.listing import ListedShard
from pipelines.samples import Rejected, Sample
from pipelines.storage.store import Store
from rzen.index.by_id import Ids, VectorIndex
from rzen.neighbors.exact import NONE, Excluded, FloatArray, Neighbors, nearest, pair_scores
from rzen.neighbors.inverted_lists import InvertedLists

_OWNERS_AT_ONCE = 1 << 15  # pairs of queries whose vectors are in memory
Listed = list[tuple[ListedShard, int, Sample | Rejected]]


@dataclass(frozen=True, slots=True)
class Group:
    """Shards that are searched together, all in one pool. `ordinals` are their numbers in their source."""

    pool: int
    shards: tuple[ListedShard, ...]
    ordinals: tuple[int, ...]

    @property
    def num_samples(self) -> int:
        """Return the samples of all shards."""
        return sum(shard.stop - shard.start for shard in self.shards)


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """What an actor has to know. Pickles; large parts are references to Ray's object store."""

    depth: int
    job: str
    scratch: str | None
    listings: Store
    writer: PartWriter
    probes: int | None
    """Lists that are searched; None searches exactly."""


class SearchGroups:
    """Searches the groups that it is given, one after the other, and writes a part for each of their shards."""

    def __init__(
        self, settings: SearchSettings, groups: Sequence[Group], pools: Sequence[Any], positives: Any, vectors: Any
    ) -> None:
        self._settings, self._groups, self._pools = settings, groups, pools
        self._positives: Positives = fetched(positives)
        self._vectors: VectorIndex = fetched(vectors)
        self._scratch = Scratch(settings.scratch, settings.job)
        self._searched: tuple[int, PoolVectors] | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Search one group. Return how many samples and candidates there were."""
        group = self._groups[int(row["group"])]
        pool = self._pool(group.pool)
        listed = [*samples_of(group.shards, self._settings.listings)]
        rows = self._rows(listed, pool)
        start = 0
        for shard, ordinal in zip(group.shards, group.ordinals, strict=True):
            stop = start + shard.stop - shard.start
            self._settings.writer.write(shard.source, ordinal, rows.part(start, stop))
            start = stop
        return {"num_samples": len(rows), "num_candidates": len(rows.candidate)}

    def _pool(self, number: int) -> PoolVectors:
        if self._searched is None or self._searched[0] != number:
            self._searched = None
            pool = PoolVectors(number, fetched(self._pools[number]), self._vectors, self._scratch, self._settings)
            self._searched = number, pool
        return self._searched[1]

    def _rows(self, listed: Listed, searched: PoolVectors) -> CandidateRows:
        samples, pool = SourceSamples.of(listed), searched.pool
        with tempfile.TemporaryDirectory(prefix="rzen-queries-") as folder:
            queries_ND, asks = self._load(samples.query_item, Path(folder, "queries.npy"))
            targets_ND, has_target = self._load(samples.target_item, Path(folder, "targets.npy"))
            asked = np.flatnonzero(asks)
            queries_QD = queries_ND[asked]
            found = searched.nearest(queries_QD, excluded_rows(samples, asked, pool, self._positives))
            positive_recall = np.full(len(samples), np.nan, np.float32)
            both = asks & has_target
            positive_recall[both] = pair_scores(queries_ND[both], targets_ND[both])
        is_there = found.rows != NONE
        counts = np.zeros(len(samples), np.int64)
        counts[asked] = is_there.sum(axis=1)
        candidate = found.rows[is_there]
        return CandidateRows.of(
            ["" if isinstance(sample, Rejected) else sample.key for _, _, sample in listed],
            counts,
            candidate=pool.number[candidate],
            id=pool.content[candidate],
            recall=found.scores[is_there],
            owner=searched.owner_scores(queries_QD, np.nonzero(is_there)[0], candidate),
            candidate_modality=pool.modality[candidate],
            query=samples.query,
            positive_recall=positive_recall,
            modality=samples.modality,
        )

    def _load(self, items: Ids, path: Path) -> tuple[FloatArray, Any]:
        """Return a vector for each item, and whether it has one. Equal items are read once."""
        distinct, place = unique_ids(items)
        distinct_lacks = self._vectors.missing(distinct)
        found = (items != NO_ITEM) & ~(distinct_lacks[place] if len(distinct) else True)
        loaded = self._vectors.load(distinct, path)
        vectors_ND = np.zeros((len(items), self._vectors.width), np.float32)
        if len(loaded.ids):
            vectors_ND[found] = loaded.rows[np.searchsorted(loaded.ids, items[found])]
        return vectors_ND, found


class PoolVectors:
    """A pool with its vectors on this node."""

    def __init__(
        self, number: int, pool: Pool, vectors: VectorIndex, scratch: Scratch, settings: SearchSettings
    ) -> None:
        self.pool = pool
        self._settings = settings
        self.vectors_UD = scratch.array(f"pool-{number}", lambda path: _write(vectors, pool.item, path))
        self._owners, self._owner_U = unique_ids(pool.owner)
        self._owners_OD = scratch.array(f"owners-{number}", lambda path: _write(vectors, self._owners, path))
        self._number = number
        self._lists: InvertedLists | None = None

    def nearest(self, queries_QD: FloatArray, excluded: Excluded) -> Neighbors:
        """Return the candidates of each query, by their rows in the pool."""
        settings = self._settings
        if settings.probes is None or not len(self.pool):
            return nearest(queries_QD, self.vectors_UD, settings.depth, excluded=excluded)
        if self._lists is None:
            data = settings.writer.store.read(index_path(settings.job, self._number))
            self._lists = InvertedLists.from_bytes(np.frombuffer(data, np.uint8))
        return self._lists.nearest(queries_QD, self.vectors_UD, settings.depth, settings.probes, excluded)

    def owner_scores(self, queries_QD: FloatArray, query: Any, candidate: Any) -> FloatArray:
        """Return the cosine of queries and the queries of candidates' own samples. NaN where there is none."""
        scores = np.full(len(candidate), np.nan, np.float32)
        known = np.flatnonzero(self.pool.owner[candidate] != NO_ITEM)
        for start in range(0, len(known), _OWNERS_AT_ONCE):
            some = known[start : start + _OWNERS_AT_ONCE]
            owners = self._owner_U[candidate[some]]
            scores[some] = pair_scores(queries_QD[query[some]], self._owners_OD[owners])
        return scores


def index_path(job: str, pool: int) -> str:
    """Return where the inverted lists of a pool are, below the table."""
    return f"unfinished/{job}-ivf/{pool}.faiss"


def excluded_rows(samples: SourceSamples, asked: Int64Array, pool: Pool, positives: Positives) -> Excluded:
    """Return which rows of the pool are no candidates: what answers an equal query, and what shows the query itself."""
    place, content = positives.of_queries(samples.query[asked])
    place = np.concatenate([place, np.arange(len(asked))])
    content = np.concatenate([content, samples.query[asked]])
    row, is_there = pool.rows_of(content)
    pairs = np.unique(np.stack([place[is_there], row[is_there]], axis=1), axis=0)
    return Excluded(np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1]))


def _write(vectors: VectorIndex, items: Ids, path: Path) -> None:
    """Write the vectors of these items, all of which have one, in their order."""
    if not len(items):
        np.save(path, np.zeros((0, vectors.width), np.float32))
        return
    vectors.load(items, path)


def fetched(value: Any) -> Any:
    """Return what a reference of Ray is to, and any other value itself."""
    return ray.get(value) if isinstance(value, ray.ObjectRef) else value
