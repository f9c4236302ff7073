"""Scores that are kept, by the contents of a pair. No pair that has one is judged again.

    {scores}/{config}/             answers of an endpoint, all together
    {scores}/{shard}/{config}/     scores of a checkpoint, by the shard of the samples
    {scores}/repeated/{config}/    those of queries that several shards have, so that each shard finds them

A job looks at a few shards at a time. So it needs the memory of their scores, and of those in `repeated`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.embedding.vectors import VectorCache, write_part
from jobs.judging.pairs import Int64Array, Keys, query_number
from pipelines.items.listing import ListedShard, read_listing
from pipelines.samples import Sample
from pipelines.storage.store import Store

REPEATED = "repeated"
Scores = npt.NDArray[np.float32]


class KeptScores:
    """The scores of a judge in a store. `config` identifies the judge."""

    def __init__(self, store: Store, config: Mapping[str, Any], *, by_shard: bool) -> None:
        self._store, self._config, self._by_shard = store, config, by_shard
        self._common = VectorCache(store.child(REPEATED) if by_shard else store, config)

    def cache_of(self, shard: ListedShard) -> VectorCache:
        """Return where new scores of a shard are written."""
        return VectorCache(self._store.child(shard.digest), self._config) if self._by_shard else self._common

    def missing(self, cache: VectorCache, keys: Keys) -> Keys:
        """Return those of a shard's keys that have no score."""
        found: Keys = keys[cache.missing(keys) & self._common.missing(keys)]
        return found

    def share(self, shards: Iterable[tuple[VectorCache, Keys]]) -> None:
        """Let all shards find the scores of these keys, as far as the shards have them. Look for new scores."""
        for cache, keys in shards:
            cache.refresh()
            new = keys[self._common.missing(keys) & ~cache.missing(keys)]
            if len(new):
                ids, scores = _load(cache, new)
                write_part(self._common.store, [id.decode() for id in ids.tolist()], scores[:, None])
        self._common.refresh()

    def load(self, cache: VectorCache, keys: Keys) -> tuple[Keys, Scores]:
        """Return those of a shard's keys that have a score, sorted, and the scores. Equal pairs have equal ones."""
        common, some = _load(self._common, keys)
        own, others = _load(cache, keys[self._common.missing(keys)])
        ids = np.concatenate([common, own])
        order = np.argsort(ids)
        return ids[order], np.concatenate([some, others])[order]


def repeated_queries(shards: Iterable[ListedShard], listings: Store, *, instructions: bool) -> Int64Array:
    """Return the numbers of the queries that several shards have, sorted. It needs 8 bytes a sample."""
    found = [np.zeros(0, np.int64)]
    for shard in shards:
        samples = (sample for sample in read_listing(shard, listings) if isinstance(sample, Sample))
        found.append(np.unique(np.fromiter((query_number(one, instructions) for one in samples), np.int64)))
    numbers, counts = np.unique(np.concatenate(found), return_counts=True)
    several: Int64Array = numbers[counts > 1]
    return several


def _load(cache: VectorCache, keys: Keys) -> tuple[Keys, Scores]:
    with tempfile.TemporaryDirectory(prefix="rzen-scores-") as scratch:
        kept = cache.load(keys, Path(scratch) / "scores.npy")
        scores = np.array(kept.rows[:, 0]) if len(kept.ids) else np.empty(0, np.float32)
    return kept.ids, scores
