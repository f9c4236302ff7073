"""Measures kinds of index over the same vectors: recall against exact search, bytes, build time, time of a query."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.storage.store import LocalStore, Store
from rzen.evaluation.vectors import StoredArray
from rzen.index.build import build_index, check_index, delete_unused, open_index
from rzen.index.exact import ExactIndex
from rzen.index.kinds import LOCAL_KINDS, IndexKind
from rzen.index.parts import VECTOR, Parts, vectors_of
from rzen.index.types import KEY, CorpusIndex, IndexEntry, Row

_NAMES = "0" * 16  # of configuration and version: the folder is a temporary one
_WARM_UP = 5  # queries that are not timed


@dataclass(frozen=True, slots=True)
class Truth:
    """`queries` `[Q, D]`, the target that each one is, and the k nearest others by exact search."""

    queries: StoredArray
    keys: list[str]
    nearest: list[set[str]]
    k: int


@dataclass(frozen=True, slots=True)
class IndexScore:
    """What one kind of index costs and finds. Times of a query are in milliseconds, one query at a time."""

    kind: IndexKind
    num_vectors: int
    recall: float
    """Mean share of the k nearest targets that are found."""
    bytes: int | None
    """Size of the index with its own fp32 vectors, without the Parquet files of the corpus. None for one on a
    server."""
    build_s: float
    p50_ms: float
    p95_ms: float


def measure(
    parts: Parts,
    kinds: Sequence[IndexKind],
    *,
    num_queries: int = 200,
    k: int = 10,
    on_progress: Callable[[str], None] = lambda text: None,
) -> Iterator[IndexScore]:
    """Yield the score of each kind. Queries are vectors of the corpus, and none counts as its own neighbor.

    Indices are built in a temporary folder, and a collection of a server is deleted again. Raises `UserError` for a
    library or a server that is missing, before it measures anything.
    """
    for kind in kinds:
        check_index(kind, parts.store)
    on_progress("exact search")
    truth = find_truth(parts, num_queries, k)
    num_vectors = sum(len(table) for table in parts.read_all([KEY]))
    for kind in kinds:
        on_progress(kind)
        with tempfile.TemporaryDirectory(prefix="rzen-index-bench-") as scratch:
            store = LocalStore(Path(scratch))
            try:
                entry, build_s = timed_build(kind, parts, store)
                recall, times_ms = score(open_index(entry, parts, root=store), truth)
                size = num_bytes(store) if kind in LOCAL_KINDS else None
            finally:
                delete_unused(store, [])  # what is on a server does not go with the folder
            p50_ms, p95_ms = np.percentile(times_ms, [50, 95]).tolist()
            yield IndexScore(kind, num_vectors, recall, size, build_s, p50_ms, p95_ms)


def find_truth(parts: Parts, num_queries: int, k: int) -> Truth:
    """Return queries and their nearest neighbors. Vectors that do not fit into memory are read once."""
    queries_QD, keys = _queries(parts, num_queries)
    found = ExactIndex(parts).search(queries_QD, k + 1)
    return Truth(queries_QD, keys, [_others(rows, key, k) for rows, key in zip(found, keys, strict=True)], k)


def timed_build(kind: IndexKind, parts: Parts, store: Store) -> tuple[IndexEntry | None, float]:
    """Build an index in `store`. Return its entry, and the seconds that it took."""
    started_s = time.perf_counter()
    entry = build_index(kind, parts, _NAMES, _NAMES, into=store)
    return entry, time.perf_counter() - started_s


def score(index: CorpusIndex, truth: Truth) -> tuple[float, npt.NDArray[np.float64]]:
    """Return the recall of an index, and the milliseconds of each query, one at a time after a few that warm up."""
    index.search(truth.queries[:_WARM_UP], truth.k + 1)
    times_ms, shares = [], []
    for query_D, key, near in zip(truth.queries, truth.keys, truth.nearest, strict=True):
        started_s = time.perf_counter()
        (rows,) = index.search(query_D[None], truth.k + 1)
        times_ms.append(1e3 * (time.perf_counter() - started_s))
        shares.append(len(near & _others(rows, key, truth.k)) / max(1, len(near)))
    return float(np.mean(shares)), np.array(times_ms)


def num_bytes(store: Store) -> int:
    """Return the bytes of all files in a folder."""
    return sum(store.size(path) for path in store.list())


def _queries(parts: Parts, count: int) -> tuple[StoredArray, list[str]]:
    """Return vectors spread over the corpus, and the content of their targets."""
    spread = np.unique(np.linspace(0, len(parts.paths) - 1, min(count, len(parts.paths)), dtype=int))
    each = -(-count // len(spread))
    vectors, keys = [], []
    for number in spread.tolist():
        table = parts.read(number, [KEY, VECTOR])
        rows = np.unique(np.linspace(0, len(table) - 1, min(each, len(table)), dtype=int))
        vectors.append(vectors_of(table.take(rows)))
        keys += table[KEY].take(rows).to_pylist()
    return np.concatenate(vectors)[:count], keys[:count]


def _others(rows: Sequence[Row], key: str, k: int) -> set[str]:
    return set([row[KEY] for row in rows if row[KEY] != key][:k])
