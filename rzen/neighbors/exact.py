"""Exact nearest neighbors by blocks, on a CPU or a GPU.

Products are fp32. The best of them are scored again in float64 and rounded, so that a score depends on its two vectors
only. Without it, the last bits of a product depend on its place in a block, and equal vectors would not tie. So
the neighbors among all vectors are the best of the neighbors among the parts, bit for bit, in whichever parts they are.
Ties are in the order of the rows.

In addition to its inputs, the memory is of the order of 5 query_rows block_rows + 4 D block_rows bytes, for any number
of vectors, which may be memory-mapped.

Shapes: Q queries, N vectors, D width, K neighbors, B and T rows of a block, C neighbors before the second scoring.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from rzen.vectors import full_precision, to_device

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
NONE = -1
"""The row of a neighbor that there is not. Its score is minus infinity."""
SLACK = 16
"""Neighbors beyond k that are scored again, because products that differ by 1e-6 may change places."""
_CPU_BLOCK_ROWS, _CPU_QUERY_ROWS = 4096, 256  # scores of a block stay in the cache: 1.6 times as fast as 8192 x 1024
_GPU_BLOCK_ROWS, _GPU_QUERY_ROWS = 65536, 4096
_GATHERED = 1 << 22  # numbers of vectors that are scored again at a time
_MANY = 4  # times the neighbors: with more new ones in a block, sorting all is faster than picking them


@dataclass(frozen=True, slots=True, eq=False)
class Neighbors:
    """The K nearest of each query, best first: rows int64 and scores fp32, `[Q, K]`."""

    rows: IntArray
    scores: FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class Excluded:
    """Pairs of a query, ascending, and a row that is not its neighbor. Both are int64 `[E]`."""

    query: IntArray
    row: IntArray


NOTHING_EXCLUDED = Excluded(np.zeros(0, np.int64), np.zeros(0, np.int64))


def nearest(
    queries_QD: FloatArray,
    vectors_ND: FloatArray,
    k: int,
    *,
    excluded: Excluded = NOTHING_EXCLUDED,
    device: str = "",
    block_rows: int | None = None,
    query_rows: int | None = None,
) -> Neighbors:
    """Return the k vectors with the largest inner product of each query. `device` is a GPU if there is one.

    `tests/unit/rzen/test_neighbors.py` compares it with brute force, for 1, 2 and 3 parts with duplicates.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = where.type == "cuda"
    block_rows = block_rows or (_GPU_BLOCK_ROWS if on_gpu else _CPU_BLOCK_ROWS)
    query_rows = query_rows or (_GPU_QUERY_ROWS if on_gpu else _CPU_QUERY_ROWS)
    num_first = k + SLACK
    starts = range(0, len(queries_QD), query_rows)
    bounds = np.searchsorted(excluded.query, [*starts, len(queries_QD)])
    with torch.inference_mode(), full_precision():
        asked = [to_device(queries_QD[start : start + query_rows], where) for start in starts]
        best = [_Best.empty(len(block_BD), num_first, where) for block_BD in asked]
        for first in range(0, len(vectors_ND), block_rows):
            block_TD = to_device(vectors_ND[first : first + block_rows], where)
            for number, queries_BD in enumerate(asked):
                scores_BT = queries_BD @ block_TD.T
                pairs = slice(bounds[number], bounds[number + 1])
                _leave_out(scores_BT, excluded.query[pairs] - starts[number], excluded.row[pairs] - first)
                best[number].add(scores_BT, first)
        rows_QC = np.concatenate([np.zeros((0, num_first), np.int64), *(some.rows.cpu().numpy() for some in best)])
    return rescored(queries_QD, vectors_ND, rows_QC, k)


def rescored(queries_QD: FloatArray, vectors_ND: FloatArray, rows_QC: IntArray, k: int) -> Neighbors:
    """Return the best k of the given rows of each query, with scores that depend on the two vectors only.

    `NONE` is no row. No row comes twice.
    """
    scores_QC = np.full(rows_QC.shape, -np.inf, np.float32)
    step = max(1, _GATHERED // max(1, rows_QC.shape[1] * queries_QD.shape[1]))
    for start in range(0, len(rows_QC) if len(vectors_ND) else 0, step):
        rows_bC = rows_QC[start : start + step]
        vectors_bCD = torch.from_numpy(vectors_ND[np.maximum(rows_bC, 0)]).double()
        queries_bD1 = torch.from_numpy(np.ascontiguousarray(queries_QD[start : start + step])).double()[:, :, None]
        scores_bC = torch.bmm(vectors_bCD, queries_bD1)[:, :, 0].float().numpy()
        scores_QC[start : start + step] = np.where(rows_bC == NONE, -np.inf, scores_bC)
    return _best(rows_QC, scores_QC, k)


def pair_scores(one_PD: FloatArray, other_PD: FloatArray) -> FloatArray:
    """Return the inner product of each pair of vectors, as `nearest` scores them, fp32 `[P]`."""
    scores_P: FloatArray = np.einsum("pd,pd->p", one_PD, other_PD, dtype=np.float64).astype(np.float32)
    return scores_P


def merge(parts: Sequence[Neighbors], k: int) -> Neighbors:
    """Return the best k among the neighbors in several parts. Their rows are numbers among all vectors."""
    return _best(
        np.concatenate([part.rows for part in parts], axis=1),
        np.concatenate([part.scores for part in parts], axis=1),
        k,
    )


def _best(rows_QC: IntArray, scores_QC: FloatArray, k: int) -> Neighbors:
    order_QC = np.lexsort((rows_QC, -scores_QC))[:, :k]
    rows_QK, scores_QK = np.take_along_axis(rows_QC, order_QC, 1), np.take_along_axis(scores_QC, order_QC, 1)
    exists_QK = np.isfinite(scores_QK)
    return Neighbors(np.where(exists_QK, rows_QK, NONE), np.where(exists_QK, scores_QK, np.float32(-np.inf)))


@dataclass(slots=True)
class _Best:
    """The best so far of each query of a block, best first, of equals the first row. Both are `[B, C]`."""

    scores: torch.Tensor
    rows: torch.Tensor

    @classmethod
    def empty(cls, num_queries: int, num_best: int, where: torch.device) -> _Best:
        scores = torch.full((num_queries, num_best), -torch.inf, device=where)
        return cls(scores, torch.full((num_queries, num_best), NONE, device=where))

    def add(self, scores_BT: torch.Tensor, first: int) -> None:
        """Take in a block of vectors, which come after all before. Row `first` is its first."""
        num_best = self.scores.shape[1]
        better_BT = scores_BT > self.scores[:, -1:]  # an equal one comes later, and stays out
        most = int(better_BT.sum(dim=1).max())
        if most == 0:
            return
        if most > _MANY * num_best:
            new_scores, new_rows = _top(scores_BT, num_best)
        else:
            new_scores, new_rows = _picked(scores_BT, better_BT, most)
        scores = torch.cat([self.scores, new_scores], dim=1)
        rows = torch.cat([self.rows, torch.where(new_scores == -torch.inf, NONE, new_rows + first)], dim=1)
        # Both are in the order of the rows where scores are equal, and the earlier block comes first.
        order = scores.argsort(dim=1, descending=True, stable=True)[:, :num_best]
        self.scores, self.rows = scores.gather(1, order), rows.gather(1, order)


def _picked(scores_BT: torch.Tensor, better_BT: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scores and columns of the better ones of each row, at most `most`, in the order of the columns."""
    row_n, column_n = better_BT.nonzero(as_tuple=True)
    counts_B = torch.bincount(row_n, minlength=len(scores_BT))
    place_n = torch.arange(len(row_n), device=row_n.device) - (counts_B.cumsum(0) - counts_B)[row_n]
    scores = scores_BT.new_full((len(scores_BT), most), -torch.inf)
    columns = row_n.new_zeros((len(scores_BT), most))
    scores[row_n, place_n] = scores_BT[row_n, column_n]
    columns[row_n, place_n] = column_n
    return scores, columns


def _top(scores_BT: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best k scores of each row and their columns, of equals the first columns, in this order."""
    if k >= scores_BT.shape[1]:
        columns = torch.arange(scores_BT.shape[1], device=scores_BT.device).expand_as(scores_BT)
        return scores_BT, columns
    scores, columns = scores_BT.topk(k, dim=1)
    # torch takes any of several equal scores at the cut: those rows are sorted whole.
    crossing = (scores_BT >= scores[:, -1:]).sum(dim=1) > k
    if crossing.any():
        columns[crossing] = scores_BT[crossing].argsort(dim=1, descending=True, stable=True)[:, :k]
    columns = columns.sort(dim=1).values
    return scores_BT.gather(1, columns), columns


def _leave_out(scores_BT: torch.Tensor, query: IntArray, column: IntArray) -> None:
    inside = (column >= 0) & (column < scores_BT.shape[1])
    if inside.any():
        rows, columns = (torch.from_numpy(some[inside]).to(scores_BT.device) for some in (query, column))
        scores_BT[rows, columns] = -torch.inf
