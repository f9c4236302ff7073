"""What a mining job knows of all samples: contents, items and modalities, as arrays in the memory of the driver.

The cost is about 90 bytes a sample. Texts and media stay in the listings.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from jobs.embedding.listings import samples_of
from pipelines.candidates.types import UNKNOWN, BoolArray, Int8Array, Int64Array, content_id, modality_code
from pipelines.items.listing import ListedShard, row_item
from pipelines.items.types import Item, as_ids
from pipelines.samples import Rejected, Sample
from pipelines.storage.store import Store
from rzen.index.by_id import Ids, VectorIndex

NO_ITEM = b""
"""Item of an input that there is not, such as the query of an uncaptioned medium."""


@dataclass(frozen=True, slots=True, eq=False)
class SourceSamples:
    """The N samples of a source, in order. Samples that cannot be read have no items."""

    target: Int64Array
    """`[N]`, content ids of the targets."""
    query: Int64Array
    """`[N]`, content ids of the queries."""
    target_item: Ids
    """`[N]`, ids of their vectors."""
    query_item: Ids
    """`[N]`"""
    modality: Int8Array
    """`[N]`, of the targets."""

    @classmethod
    def of(cls, samples: Iterable[tuple[ListedShard, int, Sample | Rejected]]) -> SourceSamples:
        """Take what is needed of listed samples."""
        rows = [_row(shard, index, sample) for shard, index, sample in samples]
        columns = zip(*rows, strict=True) if rows else [()] * 5
        target, query, target_item, query_item, modality = columns
        return cls(
            np.array(target, np.int64),
            np.array(query, np.int64),
            as_ids(target_item),
            as_ids(query_item),
            np.array(modality, np.int8),
        )

    @classmethod
    def join(cls, parts: Sequence[SourceSamples]) -> SourceSamples:
        """Return adjacent samples as one."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__slots__))

    def __len__(self) -> int:
        return len(self.target)


def read_source(shards: Sequence[ListedShard], listings: Store) -> SourceSamples:
    """Return the samples of a source by the listings of its shards, one shard in memory at a time."""
    empty = SourceSamples.of(())
    return SourceSamples.join([empty, *(SourceSamples.of(samples_of([shard], listings)) for shard in shards)])


def has_query(sample: Sample) -> bool:
    """Return whether a sample asks anything: an uncaptioned medium does not."""
    return bool(sample.query.text or sample.query.media)


def items_of(shards: Iterable[ListedShard], listings: Store, queries: bool, targets: bool) -> Iterator[Item]:
    """Yield what is embedded of the samples of these shards."""
    for shard, index, sample in samples_of(shards, listings):
        if isinstance(sample, Rejected):
            continue
        if queries and has_query(sample):
            yield row_item(shard, index, sample, "query")
        if targets:
            yield row_item(shard, index, sample, "positive")


def _row(shard: ListedShard, index: int, sample: Sample | Rejected) -> tuple[int, int, str, str, int]:
    if isinstance(sample, Rejected):
        return 0, 0, "", "", UNKNOWN
    query = row_item(shard, index, sample, "query").id if has_query(sample) else ""
    target = row_item(shard, index, sample, "positive").id
    ids = content_id(sample.target_sha256), content_id(sample.query_sha256)
    return (*ids, target, query, modality_code(sample.positive.modality))


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """U candidates that are searched together: different contents, each with a vector, in the order of their numbers.

    Of several samples with one content, the first counts.
    """

    number: Int64Array
    """`[U]`, number of each candidate in the table."""
    content: Int64Array
    """`[U]`"""
    item: Ids
    """`[U]`, id of its vector."""
    owner: Ids
    """`[U]`, id of the vector of its own query, or `NO_ITEM`."""
    modality: Int8Array
    """`[U]`"""
    by_content: Int64Array = field(repr=False)
    """`[U]`, rows in the order of their contents."""

    @classmethod
    def of(cls, parts: Sequence[tuple[int, SourceSamples]], vectors: VectorIndex, owners: bool) -> Pool:
        """Join the samples of sources. Each comes with the number of its first candidate."""
        samples = SourceSamples.join([some for _, some in parts])
        number = np.concatenate([start + np.arange(len(some)) for start, some in parts])
        usable = np.flatnonzero((samples.target_item != NO_ITEM) & ~vectors.missing(samples.target_item))
        _, first = np.unique(samples.target[usable], return_index=True)
        rows = usable[np.sort(first)]
        owner = samples.query_item[rows]
        known = owners & (owner != NO_ITEM) & ~vectors.missing(owner)
        content = samples.target[rows]
        return cls(
            number=number[rows],
            content=content,
            item=samples.target_item[rows],
            owner=np.where(known, owner, NO_ITEM),
            modality=samples.modality[rows],
            by_content=np.argsort(content),
        )

    def __len__(self) -> int:
        return len(self.number)

    def rows_of(self, contents: Int64Array) -> tuple[Int64Array, BoolArray]:
        """Return the row of each content, and whether the pool has it."""
        if not len(self):
            return np.zeros(len(contents), np.int64), np.zeros(len(contents), np.bool_)
        found = np.searchsorted(self.content, contents, sorter=self.by_content)
        rows = self.by_content[np.minimum(found, len(self) - 1)]
        return rows, np.asarray(self.content[rows] == contents)


@dataclass(frozen=True, slots=True, eq=False)
class Positives:
    """Which contents answer which queries, over all samples: pairs in the order of the queries, each once, `[P]`."""

    query: Int64Array
    target: Int64Array

    @classmethod
    def of(cls, parts: Sequence[SourceSamples]) -> Positives:
        """Take the pairs of all samples that ask something."""
        samples = SourceSamples.join(parts)
        asked = samples.query_item != NO_ITEM
        pairs = np.stack([samples.query[asked], samples.target[asked]], axis=1)
        pairs = np.unique(pairs, axis=0)
        return cls(np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1]))

    def of_queries(self, queries: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return pairs of a place in `queries`, ascending, and a content that answers this query."""
        first, last = np.searchsorted(self.query, queries, "left"), np.searchsorted(self.query, queries, "right")
        counts = last - first
        place = np.repeat(np.arange(len(queries)), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return place, self.target[np.repeat(first, counts) + within]


def unique_ids(ids: Ids) -> tuple[Ids, npt.NDArray[np.intp]]:
    """Return the distinct ids that are items, and the place of each id among them (of `NO_ITEM`: 0)."""
    found = np.unique(ids[ids != NO_ITEM])
    return found, np.minimum(np.searchsorted(found, ids), max(0, len(found) - 1))
