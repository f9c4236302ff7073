"""Vectors of the samples that earlier rules have kept, by the engine that embeds for all jobs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from jobs.curation.specs import CurateSpec
from jobs.embedding.engine import embed_items
from jobs.embedding.listings import list_shards, samples_of
from jobs.embedding.settings import EmbedderSettings, settings_of_job
from jobs.embedding.vectors import VectorCache
from jobs.runtime.progress import Bars
from pipelines.curate.samples import POSITIVE, QUERY
from pipelines.curate.tables import Bools
from pipelines.items.listing import row_item
from pipelines.items.types import ID, Item, Role
from pipelines.samples import Rejected
from pipelines.storage.store import Store

_ROLES: tuple[Role, Role] = ("query", "positive")
_CHUNK = 1 << 14  # pairs whose vectors are in memory at once
FloatArray = npt.NDArray[np.float32]


def model_settings(spec: CurateSpec) -> EmbedderSettings:
    """Return how the model of the job embeds."""
    assert spec.model is not None
    return settings_of_job("curate", spec, spec.model, [spec.data.split])


@dataclass(frozen=True, slots=True)
class _Embedded:
    """Vectors of inputs. `ids` are those of query and target of each sample, `[N, 2]`, empty without a vector."""

    ids: npt.NDArray[np.bytes_]
    distinct: npt.NDArray[np.bytes_]
    """`[M]`, sorted."""
    rows: FloatArray
    """`[M, D]`, memory-mapped."""

    def places(self, role: int) -> npt.NDArray[np.int64]:
        """Return the row of each sample's vector, and -1 where there is none."""
        mine = np.ascontiguousarray(self.ids[:, role])
        return np.where(mine != b"", np.searchsorted(self.distinct, mine), -1).astype(np.int64)


class SampleVectors:
    """Embeds queries and targets of samples, and keeps their vectors in the cache of the job."""

    def __init__(self, spec: CurateSpec, settings: EmbedderSettings, cache: Store, scratch: Path, bars: Bars) -> None:
        self._spec, self._settings, self._bars, self._scratch = spec, settings, bars, scratch
        self._vectors = VectorCache(cache.child("vectors"), settings.config)
        self._listings = cache.child("listings")
        self._shards = list_shards(spec.data, [spec.data.split], self._listings, spec.cpus_per_task)

    def cosines(self, keep: Bools) -> FloatArray:
        """Return the cosine of query and target of each sample that is kept, `[N]`. Others have NaN."""
        embedded = self._embed(keep, (QUERY, POSITIVE))
        query, target = embedded.places(QUERY), embedded.places(POSITIVE)
        found = np.full(len(keep), np.nan, np.float32)
        both = np.flatnonzero((query >= 0) & (target >= 0))
        for start in range(0, len(both), _CHUNK):
            some = both[start : start + _CHUNK]
            found[some] = np.einsum("nd,nd->n", embedded.rows[query[some]], embedded.rows[target[some]])
        return found

    def targets(self, keep: Bools) -> FloatArray:
        """Return the vector of the target of each sample that is kept, `[N, D]`, memory-mapped. Others have zeros."""
        embedded = self._embed(keep, (POSITIVE,))
        place = embedded.places(POSITIVE)
        shape = (len(keep), embedded.rows.shape[1])
        found: FloatArray = np.lib.format.open_memmap(self._scratch / "targets.npy", "w+", np.float32, shape)
        known = np.flatnonzero(place >= 0)
        for start in range(0, len(known), _CHUNK):
            some = known[start : start + _CHUNK]
            found[some] = embedded.rows[place[some]]
        return found

    def _embed(self, keep: Bools, roles: Sequence[int]) -> _Embedded:
        ids = np.zeros((len(keep), 2), ID)
        on_progress = partial(self._bars.update, "embed", unit="inputs")
        items = (item for *_, item in self._items(keep, roles))
        (bad,) = embed_items(items, [(self._settings, self._vectors)], self._spec, on_progress)
        for number, role, item in self._items(keep, roles):
            if item.id not in bad:
                ids[number, role] = item.id.encode()
        distinct = np.unique(ids[ids != b""])
        loaded = self._vectors.load(distinct, self._scratch / "vectors.npy")
        return _Embedded(ids, distinct, loaded.rows)

    def _items(self, keep: Bools, roles: Sequence[int]) -> Iterator[tuple[int, int, Item]]:
        for number, (shard, index, sample) in enumerate(samples_of(self._shards, self._listings)):
            if keep[number] and not isinstance(sample, Rejected):
                for role in roles:
                    yield number, role, row_item(shard, index, sample, _ROLES[role])
