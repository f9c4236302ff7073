"""What a candidate table holds: its manifest, the candidates of a shard's samples, and what a plan needs.

Shapes: N samples of a shard, M candidates of all of them, P samples of a source that are dropped or in a cluster.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field

from pipelines.samples import MODALITIES, Modality

FORMAT_VERSION = 1
KIND = "candidates"
"""What the mark of a table's folder says."""
MANIFEST = "candidates.json"
PARTS, PLAN = "parts", "plan"
"""Folders of a table."""
Stage = Literal["mine", "judge", "select", "cluster", "curate"]
NO_CLUSTER = -1
UNKNOWN = -1
"""Code of a modality that is not known."""
ID_CHARS = 16
"""Digits of a hash that are a content id."""

Int64Array = npt.NDArray[np.int64]
Int8Array = npt.NDArray[np.int8]
FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]
_Count = Annotated[int, Field(ge=0)]


def content_id(sha256: str) -> int:
    """Return the first 8 bytes of a hash as a signed number: the id of a content, as training has it."""
    return int.from_bytes(bytes.fromhex(sha256[:ID_CHARS]), signed=True)


def modality_code(modality: Modality) -> int:
    """Return the number that stands for a modality in a table."""
    return MODALITIES.index(modality)


@dataclass(frozen=True, slots=True)
class PartInfo:
    """One part: the candidates of the samples of a shard. `path` is relative to the table."""

    path: str
    sha256: str
    num_samples: _Count
    num_candidates: _Count
    num_dropped: _Count = 0
    num_clustered: _Count = 0


@dataclass(frozen=True, slots=True)
class PlanInfo:
    """The file of a source that a plan reads: samples that are dropped or in a cluster."""

    path: str
    sha256: str
    num_dropped: _Count
    num_clustered: _Count


@dataclass(frozen=True, slots=True)
class Pool:
    """A source whose targets are candidates. `root` is None for the dataset that the table is of, which may move."""

    split: str
    source: str
    fingerprint: str
    num_samples: _Count
    root: str | None = None


@dataclass(frozen=True, slots=True)
class TableData:
    """The samples that the rows of a table are: a split, and the fingerprint of each of its sources in the table.

    `root` is where the dataset was. Readers take it from their own settings.
    """

    root: str
    split: str
    sources: dict[str, str]


@dataclass(frozen=True, slots=True)
class CandidateManifest:
    """The manifest of a table. Candidate n is the n-th sample of the pools, laid one after the other."""

    stage: Stage
    data: TableData
    pools: tuple[Pool, ...] = ()
    parts: dict[str, tuple[PartInfo, ...]] = field(default_factory=dict)
    """Source -> its parts, one a shard in the order of the manifest of the data. Empty for a table of drops only."""
    plan: dict[str, PlanInfo] = field(default_factory=dict)
    """Source -> its plan file. A source without one has no drops and no clusters."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the job that made the table."""
    made_from: dict[str, str] = field(default_factory=dict)
    """Stage -> fingerprint of the table or model that this one was made from."""
    counts: dict[str, Any] = field(default_factory=dict)
    """What the job counted, for reports."""
    format_version: _Count = FORMAT_VERSION

    @property
    def pool_starts(self) -> Int64Array:
        """Return the number of each pool's first candidate, and the number of all: `[pools + 1]`."""
        return np.cumsum([0, *(pool.num_samples for pool in self.pools)], dtype=np.int64)

    def locate(self, candidates: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Return the pool of each candidate number, and the index of its sample in the source of that pool."""
        starts = self.pool_starts
        pool = np.searchsorted(starts, candidates, side="right") - 1
        return pool, candidates - starts[pool]


@dataclass(frozen=True, slots=True, eq=False)
class CandidateRows:
    """The candidates of the N samples of a shard, best first. Those of sample i are at `bounds[i]:bounds[i + 1]`.

    `recall` is the cosine of the model that mined, `teacher` the score of a judge. NaN is unknown. `owner` is the
    cosine of the sample's query and the query of the candidate's own sample. A modality is a place in `MODALITIES`.
    """

    key: list[str]
    """`[N]`, keys of the samples. Empty for a sample that cannot be read."""
    bounds: Int64Array
    """`[N + 1]`."""
    candidate: Int64Array
    """`[M]`, numbers of the candidates."""
    id: Int64Array
    """`[M]`, their content ids."""
    recall: FloatArray
    """`[M]`."""
    teacher: FloatArray
    """`[M]`."""
    owner: FloatArray
    """`[M]`."""
    candidate_modality: Int8Array
    """`[M]`."""
    query: Int64Array
    """`[N]`, content ids of the queries. 0 is unknown."""
    positive_recall: FloatArray
    """`[N]`, the same of the sample's own positive."""
    positive_teacher: FloatArray
    """`[N]`."""
    modality: Int8Array
    """`[N]`, modality of the positive."""
    keep: BoolArray
    """`[N]`, false for samples that training leaves out."""
    cluster: Int64Array
    """`[N]`, number of the cluster in the source, or `NO_CLUSTER`."""

    @classmethod
    def of(cls, key: Sequence[str], counts: Sequence[int] | Int64Array, **columns: npt.ArrayLike) -> Self:
        """Return rows with `counts[i]` candidates of sample i. Columns that are not given are unknown.

        Without `keep`, all samples are kept.
        """
        bounds = np.concatenate([[0], np.cumsum(np.asarray(counts, np.int64))]).astype(np.int64)
        defaults: dict[str, Any] = {"keep": True, "cluster": NO_CLUSTER, "modality": UNKNOWN}
        defaults |= {"candidate_modality": UNKNOWN, "candidate": 0, "id": 0, "query": 0}
        arrays: dict[str, Any] = {}
        for name, kind in {**_OF_SAMPLE, **_OF_CANDIDATE}.items():
            length = len(key) if name in _OF_SAMPLE else int(bounds[-1])
            found = columns.pop(name, None)
            arrays[name] = (
                np.full(length, defaults.get(name, np.nan), kind) if found is None else np.asarray(found, kind)
            )
            if arrays[name].shape != (length,):
                raise ValueError(f"{name} has shape {arrays[name].shape}, not ({length},)")
        if columns or len(bounds) != len(key) + 1:
            raise ValueError(f"{len(key)} keys, {len(bounds) - 1} counts, unknown columns {sorted(columns)}")
        return cls(key=list(key), bounds=bounds, **arrays)

    def __len__(self) -> int:
        return len(self.key)

    @property
    def counts(self) -> Int64Array:
        """Return how many candidates each sample has, `[N]`."""
        return np.diff(self.bounds)

    @property
    def sample(self) -> Int64Array:
        """Return the sample of each candidate, `[M]`."""
        return np.repeat(np.arange(len(self)), self.counts)

    def span(self, row: int) -> slice:
        """Return where the candidates of a sample are."""
        return slice(int(self.bounds[row]), int(self.bounds[row + 1]))

    def part(self, start: int, stop: int) -> Self:
        """Return the samples `start` to `stop` as rows of their own."""
        first, last = int(self.bounds[start]), int(self.bounds[stop])
        columns: dict[str, Any] = {name: getattr(self, name)[start:stop] for name in _OF_SAMPLE}
        columns |= {name: getattr(self, name)[first:last] for name in _OF_CANDIDATE}
        bounds = self.bounds[start : stop + 1] - first
        return replace(self, key=self.key[start:stop], bounds=bounds, **columns)

    def take(self, places: Int64Array) -> Self:
        """Return the rows with these candidates only, by their places in `candidate`, in the order given.

        The places must be sample by sample.
        """
        counts = np.bincount(self.sample[places], minlength=len(self))
        columns = {name: getattr(self, name)[places] for name in _OF_CANDIDATE}
        return replace(self, bounds=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), **columns)


_OF_SAMPLE = {
    "query": np.int64,
    "positive_recall": np.float32,
    "positive_teacher": np.float32,
    "modality": np.int8,
    "keep": np.bool_,
    "cluster": np.int64,
}
_OF_CANDIDATE = {
    "candidate": np.int64,
    "id": np.int64,
    "recall": np.float32,
    "teacher": np.float32,
    "owner": np.float32,
    "candidate_modality": np.int8,
}
SAMPLE_COLUMNS, CANDIDATE_COLUMNS = tuple(_OF_SAMPLE), tuple(_OF_CANDIDATE)
assert {item.name for item in fields(CandidateRows)} == {"key", "bounds", *SAMPLE_COLUMNS, *CANDIDATE_COLUMNS}


@dataclass(frozen=True, slots=True, eq=False)
class PlanRows:
    """Samples of a source that are dropped (`keep` is false), in a cluster or weighted, ascending. Arrays are `[P]`.

    `weight` is the share of the epochs that take a sample, above 0. It is 1 for most.
    """

    sample: Int64Array
    keep: BoolArray
    cluster: Int64Array
    weight: FloatArray

    @classmethod
    def of(cls, keep: BoolArray, cluster: Int64Array, start: int = 0, weight: FloatArray | None = None) -> Self:
        """Return what a plan needs of adjacent samples of a source. The first is sample `start` of it."""
        weight = np.ones(len(keep), np.float32) if weight is None else weight
        sample = np.flatnonzero(~keep | (cluster != NO_CLUSTER) | (weight < 1))
        return cls(sample + start, keep[sample], cluster[sample], weight[sample])

    @classmethod
    def join(cls, parts: Sequence[PlanRows]) -> Self:
        """Return the rows of several stretches of a source, which are in order."""
        empty = cls(np.zeros(0, np.int64), np.zeros(0, np.bool_), np.zeros(0, np.int64), np.zeros(0, np.float32))
        return cls(*(np.concatenate([getattr(part, item.name) for part in (empty, *parts)]) for item in fields(cls)))

    def __len__(self) -> int:
        return len(self.sample)

    @property
    def num_dropped(self) -> int:
        """Return how many samples are dropped."""
        return int((~self.keep).sum())

    @property
    def num_clustered(self) -> int:
        """Return how many samples are in a cluster."""
        return int((self.cluster != NO_CLUSTER).sum())


def fingerprint_of(manifest: bytes) -> str:
    """Return what identifies a table: the SHA-256 of its manifest, which has the hash of every file."""
    return hashlib.sha256(manifest).hexdigest()


def iter_parts(manifest: CandidateManifest) -> Iterator[tuple[str, int, PartInfo]]:
    """Yield source, ordinal of the shard and part, in order."""
    for source, parts in manifest.parts.items():
        for ordinal, part in enumerate(parts):
            yield source, ordinal, part
