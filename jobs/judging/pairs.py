"""The pairs of a part of a table, and how they are divided into units of work. Pure functions of the table.

A unit is decoded and judged together. Pairs that share the input which is dearer to decode follow each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from pipelines.candidates.types import CandidateManifest, CandidateRows, content_id
from pipelines.items.listing import ListedShard
from pipelines.items.types import as_ids
from pipelines.items.units import COSTS, UNIT_COST
from pipelines.samples import MODALITIES, Modality, Rejected, Sample

Int64Array = npt.NDArray[np.int64]
Keys = npt.NDArray[np.bytes_]
OWN = -1
"""Pool of the samples of the part itself."""
_QUERY_DIGITS = 32  # of the hash of a query's text and media, in the keys of its pairs
MAX_PAIRS = 1024
"""Pairs of a unit, at most."""
PAIRS_AT_ONCE = 200_000
"""Pairs of one Ray job. More would cost the driver too much memory, fewer would load the model more often."""
_COST_OF: dict[Modality, int] = {
    "text": 1,
    "image": COSTS["image"],
    "page": COSTS["document"],
    "video": COSTS["video"],
}
_CODE_COSTS = np.array([*(_COST_OF[modality] for modality in MODALITIES), COSTS["image"]])  # the last one: unknown


class PairUnit(Protocol):
    """Pairs that are decoded and scored together. Pickles."""

    @property
    def pairs(self) -> Int64Array:
        """Places of query and document among those of the unit, `[P, 2]`."""

    @property
    def keys(self) -> Keys:
        """Identity of the contents of each pair, `[P]`."""

    def __len__(self) -> int:
        """Return the number of pairs."""

    def only(self, left: Int64Array) -> Self:
        """Return a unit of these pairs of it."""


AnyUnit = TypeVar("AnyUnit", bound=PairUnit)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Unit:
    """Pairs of a table that are judged together. It pickles.

    `queries` `[Q]` are samples of the part's source. `documents` `[D, 2]` are pool and index of targets. `pairs`
    `[P, 2]` are places in both. `keys` identify the contents of each pair.
    """

    source: str
    queries: Int64Array
    documents: Int64Array
    pairs: Int64Array
    keys: Keys

    def __len__(self) -> int:
        return len(self.pairs)

    def only(self, left: Int64Array) -> Unit:
        """Return a unit of these pairs of it."""
        queries, documents, pairs = compact(self.pairs[left])
        return Unit(self.source, self.queries[queries], self.documents[documents], pairs, self.keys[left])


@dataclass(frozen=True, slots=True, eq=False)
class PartPairs:
    """All pairs of a part. Equal contents have equal keys.

    `candidate_keys` `[M]` and `positive_keys` `[N]` are those of the candidates and of the samples. They are empty
    where nothing is judged. `repeated` are those of queries that other shards have, too, each once.
    """

    candidate_keys: Keys
    positive_keys: Keys
    units: list[Unit]
    repeated: Keys

    @property
    def keys(self) -> Keys:
        """Return the key of each pair once, sorted."""
        both: Keys = np.unique(np.concatenate([self.candidate_keys, self.positive_keys]))
        found: Keys = both[both != b""]
        return found


def pairs_of(
    rows: CandidateRows,
    samples: Sequence[Sample | Rejected],
    shard: ListedShard,
    table: CandidateManifest,
    top_k: int | None,
    instructions: bool,
    repeated: Int64Array,
) -> PartPairs:
    """Return the pairs of a part: each kept sample with its first `top_k` candidates and with its own positive.

    `repeated` are the numbers of queries that several shards have.
    """
    asked = np.array([keep and isinstance(sample, Sample) for keep, sample in zip(rows.keep, samples, strict=True)])
    asked = asked.astype(np.bool_)
    query_ids = [_query_id(one, instructions) if asked[i] else b"" for i, one in enumerate(samples)]
    numbers = np.array([_number(id) for id in query_ids], np.int64)
    positive_ids = [content_id(one.target_sha256) if isinstance(one, Sample) else 0 for one in samples]
    wanted = np.flatnonzero(asked[rows.sample] & judged_candidates(rows, top_k))

    sample_of = np.concatenate([rows.sample[wanted], np.flatnonzero(asked)])
    ids = np.concatenate([rows.id[wanted], np.array(positive_ids, np.int64)[asked]])
    pool, index = table.locate(rows.candidate[wanted])
    own = np.flatnonzero(asked)
    documents = np.concatenate(
        [np.stack([pool, index], axis=1), np.stack([np.full(len(own), OWN), own + shard.start], axis=1)]
    ).astype(np.int64)
    costs = _CODE_COSTS[np.concatenate([rows.candidate_modality[wanted], rows.modality[own]])]
    keys = as_ids(_pair_key(query_ids[i], id) for i, id in zip(sample_of.tolist(), ids.tolist(), strict=True))

    candidate_keys = np.zeros(len(rows.candidate), keys.dtype)
    candidate_keys[wanted] = keys[: len(wanted)]
    positive_keys = np.zeros(len(rows), keys.dtype)
    positive_keys[own] = keys[len(wanted) :]
    _, first = np.unique(keys, return_index=True)
    query_costs = np.array([_query_cost(sample) for sample in samples], np.int64)
    table_of = _Pairs(shard, sample_of, documents, ids, keys, query_costs, costs)
    shared = np.unique(keys[np.isin(numbers[sample_of], repeated)])
    return PartPairs(candidate_keys, positive_keys, table_of.units(first), shared)


def query_number(sample: Sample, instructions: bool) -> int:
    """Return a number for the content of a query and its instruction."""
    return _number(_query_id(sample, instructions))


def judged_candidates(rows: CandidateRows, top_k: int | None) -> npt.NDArray[np.bool_]:
    """Return which candidates are judged, `[M]`: the first `top_k` of each sample that is kept."""
    place = np.arange(len(rows.candidate)) - rows.bounds[rows.sample]
    chosen: npt.NDArray[np.bool_] = rows.keep[rows.sample] & (place < (top_k or len(place)))
    return chosen


def missing_of(units: Sequence[AnyUnit], missing: Keys) -> list[AnyUnit]:
    """Return the units with only those pairs whose keys are in `missing`. Empty ones are left out."""
    if not units:
        return []
    # All keys at once: each look-up sorts `missing`.
    is_missing = np.isin(np.concatenate([unit.keys for unit in units]), missing)
    ends = np.cumsum([len(unit) for unit in units])
    found = []
    for unit, chosen in zip(units, np.split(is_missing, ends[:-1]), strict=True):
        left = np.flatnonzero(chosen)
        if len(left):
            found.append(unit.only(left))
    return found


def windows(some: Iterable[T], num_pairs: Callable[[T], int], most: int) -> Iterator[list[T]]:
    """Yield what has pairs in order, with at most `most` pairs at a time, or a single one that has more."""
    window: list[T] = []
    room = most
    for one in some:
        needed = num_pairs(one)
        if window and needed > room:
            yield window
            window, room = [], most
        window.append(one)
        room -= needed
    if window:
        yield window


def compact(pairs: Int64Array) -> tuple[Int64Array, Int64Array, Int64Array]:
    """Return the distinct queries and the distinct documents of pairs `[P, 2]`, and the pairs by places in these."""
    queries, query = np.unique(pairs[:, 0], return_inverse=True)
    documents, document = np.unique(pairs[:, 1], return_inverse=True)
    return queries, documents, np.stack([query, document], axis=1)


def divide_pairs(pairs: Int64Array, costs: Int64Array) -> list[Int64Array]:
    """Return places of pairs `[P, 2]` in units of limited cost, in an order that depends on the pairs only.

    `pairs` are numbers of the query and of the document. `costs` `[P, 2]` are what it takes to decode them, the same
    for equal numbers. Pairs that share the dearer input follow each other.
    """
    if not len(pairs):
        return []
    query, document = costs.mean(axis=0)
    order = np.lexsort((pairs[:, 0], pairs[:, 1]) if document >= query else (pairs[:, 1], pairs[:, 0]))
    units: list[list[int]] = []
    room = 0
    seen: set[tuple[int, int]] = set()
    for place in order.tolist():
        inputs = dict(zip(enumerate(pairs[place].tolist()), costs[place].tolist(), strict=True))
        if not units or len(units[-1]) == MAX_PAIRS or sum(c for i, c in inputs.items() if i not in seen) > room:
            units.append([])
            room, seen = UNIT_COST, set()
        units[-1].append(place)
        room -= sum(cost for given, cost in inputs.items() if given not in seen)
        seen |= inputs.keys()
    return [np.array(unit) for unit in units]


@dataclass(frozen=True, slots=True)
class _Pairs:
    """All pairs of a part, column by column. Rows of equal keys are equal pairs."""

    shard: ListedShard
    sample: Int64Array
    documents: Int64Array
    ids: Int64Array
    keys: Keys
    query_costs: Int64Array
    document_costs: Int64Array

    def units(self, chosen: Int64Array) -> list[Unit]:
        """Divide the chosen pairs into units of limited cost, in an order that depends on the pairs only."""
        pairs = np.stack([self.sample, self.ids], axis=1)[chosen]
        costs = np.stack([self.query_costs[self.sample], self.document_costs], axis=1)[chosen]
        return [self._unit(chosen[places]) for places in divide_pairs(pairs, costs)]

    def _unit(self, chosen: Int64Array) -> Unit:
        samples, query = np.unique(self.sample[chosen], return_inverse=True)
        _, first, document = np.unique(self.ids[chosen], return_index=True, return_inverse=True)
        return Unit(
            self.shard.source,
            samples + self.shard.start,
            self.documents[chosen][first],
            np.stack([query, document], axis=1),
            self.keys[chosen],
        )


def _query_id(sample: Sample | Rejected, instructions: bool) -> bytes:
    assert isinstance(sample, Sample)
    return f"{sample.query_sha256[:_QUERY_DIGITS]} {sample.instruction if instructions else ''}".encode()


def _number(query_id: bytes) -> int:
    return int.from_bytes(hashlib.sha256(query_id).digest()[:8], signed=True)


def _query_cost(sample: Sample | Rejected) -> int:
    return sum(COSTS[media.kind] for media in sample.query.media) or 1 if isinstance(sample, Sample) else 0


def _pair_key(query_id: bytes, document_id: int) -> str:
    """Return 32 hex digits for the contents of a query, its instruction, and a document."""
    return hashlib.sha256(document_id.to_bytes(8, signed=True) + query_id).hexdigest()[:32]
