"""Approximate nearest neighbors with FAISS: vectors are in lists by their nearest centroid, and a few are searched.

For CPUs, where exact search of many millions takes days. Scores are those of exact search. What is approximate is which
vectors are looked at, so that the recall against exact search should be measured and reported.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.imports import import_extra
from rzen.neighbors.exact import NONE, NOTHING_EXCLUDED, SLACK, Excluded, FloatArray, IntArray, Neighbors, rescored

_PER_LIST = 64  # vectors of each list that k-means sees; FAISS wants 39 to 256
_ADDED = 1 << 18  # vectors at a time


class InvertedLists:
    """An index of `[N, D]` vectors. It is made once and may be stored as bytes."""

    def __init__(self, index: Any) -> None:
        self._index = index

    @classmethod
    def build(cls, vectors_ND: FloatArray, num_lists: int, seed: int) -> InvertedLists:
        """Cluster a sample of the vectors, and put all of them into lists."""
        faiss = import_faiss()
        width = vectors_ND.shape[1]
        num_lists = max(1, min(num_lists, len(vectors_ND)))
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, num_lists, faiss.METRIC_INNER_PRODUCT)
        index.cp.seed = seed
        index.cp.min_points_per_centroid = 1  # without its warning
        rng = np.random.default_rng(seed)
        num_seen = min(len(vectors_ND), _PER_LIST * num_lists)
        seen = np.sort(rng.choice(len(vectors_ND), num_seen, replace=False))
        index.train(np.ascontiguousarray(vectors_ND[seen]))
        for start in range(0, len(vectors_ND), _ADDED):
            index.add(np.ascontiguousarray(vectors_ND[start : start + _ADDED]))
        return cls(index)

    @classmethod
    def from_bytes(cls, data: npt.NDArray[np.uint8]) -> InvertedLists:
        """Return a stored index."""
        return cls(import_faiss().deserialize_index(data))

    def to_bytes(self) -> npt.NDArray[np.uint8]:
        """Return the index as bytes."""
        data: npt.NDArray[np.uint8] = import_faiss().serialize_index(self._index)
        return data

    def nearest(
        self,
        queries_QD: FloatArray,
        vectors_ND: FloatArray,
        k: int,
        num_probed: int,
        excluded: Excluded = NOTHING_EXCLUDED,
    ) -> Neighbors:
        """Return the k nearest among the vectors of the `num_probed` nearest lists of each query."""
        self._index.nprobe = num_probed
        most = int(np.bincount(excluded.query).max(initial=0))
        num_asked = min(k + SLACK + most, len(vectors_ND))
        rows_QC: IntArray = self._index.search(np.ascontiguousarray(queries_QD), num_asked)[1].astype(np.int64)
        left_out = set(zip(excluded.query.tolist(), excluded.row.tolist(), strict=True))
        for query in np.unique(excluded.query).tolist():
            rows_QC[query] = [NONE if (query, row) in left_out else row for row in rows_QC[query].tolist()]
        return rescored(queries_QD, vectors_ND, rows_QC, k)


def recall(found: Neighbors, exact: Neighbors) -> float:
    """Return which share of the exact neighbors was found, over all queries."""
    num_exact = int((exact.rows != NONE).sum())
    num_found = sum(
        len(np.intersect1d(mine[mine != NONE], theirs)) for mine, theirs in zip(found.rows, exact.rows, strict=True)
    )
    return num_found / num_exact if num_exact else 1.0


def import_faiss() -> Any:
    """Return FAISS. Raises `UserError` if it is not installed."""
    return import_extra("faiss", "mining", "search: ivf", "search: exact")
