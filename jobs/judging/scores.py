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
                write_part(self._common.store, [key.decode() for key in new.tolist()], scores_of(cache, new)[:, None])
        self._common.refresh()

    def scores(self, cache: VectorCache, keys: Keys) -> Scores:
        """Return the scores of a shard's keys, NaN where there is none. Equal pairs have equal ones."""
        found = scores_of(self._common, keys)
        others = self._common.missing(keys)
        found[others] = scores_of(cache, keys[others])
        return found


def repeated_queries(shards: Iterable[ListedShard], listings: Store, *, instructions: bool) -> Int64Array:
    """Return the numbers of the queries that several shards have, sorted. It needs 8 bytes a sample."""
    found = [np.zeros(0, np.int64)]
    for shard in shards:
        samples = (sample for sample in read_listing(shard, listings) if isinstance(sample, Sample))
        found.append(np.unique(np.fromiter((query_number(one, instructions) for one in samples), np.int64)))
    numbers, counts = np.unique(np.concatenate(found), return_counts=True)
    several: Int64Array = numbers[counts > 1]
    return several


def scores_of(cache: VectorCache, keys: Keys, scratch: str | None = None) -> Scores:
    """Return the score of each key, in the shape of `keys`. It is NaN where there is none, such as for an empty key.

    `scratch` is a folder for temporary files.
    """
    scores = np.full(keys.shape, np.nan, np.float32)
    known = ~cache.missing(keys)
    if known.any():
        with tempfile.TemporaryDirectory(prefix="rzen-scores-", dir=scratch) as folder:
            scores[known] = cache.load(keys[known], Path(folder) / "scores.npy").rows[:, 0]
    return scores
