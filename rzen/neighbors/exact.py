"""Exact nearest neighbors by blocks, on a CPU or a GPU.

Products are fp32. The best of them are scored again in float64 and rounded, so that a score depends on its two vectors
only. Without it, the last bits of a product depend on its place in a block, and equal vectors would not tie. So
the neighbors among all vectors are the best of the neighbors among the parts, bit for bit, in whichever parts they are.
Ties are in the order of the rows.

Vectors may be memory-mapped. In addition to them, the memory is of the order of 5 query_rows block_rows +
4 D block_rows + 20 Q C bytes, for any number of vectors.

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
_CPU_BLOCK_ROWS, _CPU_QUERY_ROWS = 1024, 1024
_GPU_BLOCK_ROWS, _GPU_QUERY_ROWS = 65536, 4096
_GATHERED = 1 << 20  # numbers of vectors that are scored again at a time


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
        best = [_Best(len(block_BD), num_first, where) for block_BD in asked]
        # Fresh memory for each product takes a tenth of its time.
        memory = torch.empty(min(query_rows, len(queries_QD)) * min(block_rows, len(vectors_ND)), device=where)
        for first in range(0, len(vectors_ND), block_rows):
            block_TD = to_device(vectors_ND[first : first + block_rows], where)
            for number, queries_BD in enumerate(asked):
                shape = (len(queries_BD), len(block_TD))
                scores_BT = torch.mm(queries_BD, block_TD.T, out=memory[: shape[0] * shape[1]].view(shape))
                pairs = slice(bounds[number], bounds[number + 1])
                _leave_out(scores_BT, excluded.query[pairs] - starts[number], excluded.row[pairs] - first)
                best[number].add(scores_BT, first)
        rows_QC = np.concatenate([np.zeros((0, num_first), np.int64), *(some.rows().cpu().numpy() for some in best)])
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


class _Best:
    """The best C rows so far of each of B queries, and better ones that wait.

    Comparing a block with the worst of the best costs 5% of its products. Choosing costs more, and is done about log N
    times.
    """

    def __init__(self, num_queries: int, num_best: int, where: torch.device) -> None:
        self._scores_BC = torch.full((num_queries, num_best), -torch.inf, device=where)
        self._rows_BC = torch.full((num_queries, num_best), NONE, device=where)
        self._worst_B1 = self._scores_BC[:, :1]
        self._waiting: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # queries, rows and scores
        self._num_waiting = 0

    def add(self, scores_BT: torch.Tensor, first: int) -> None:
        """Take in a block of vectors, which come after all before. Row `first` is its first."""
        num_best, width = self._rows_BC.shape[1], scores_BT.shape[1]
        place_n = _places_above(scores_BT, self._worst_B1)  # an equal one comes later, and stays out
        if len(place_n) > self._rows_BC.numel():  # the first block
            place_n = place_n[_are_best(scores_BT, num_best).flatten()[place_n]]
        self._waiting.append((place_n // width, place_n % width + first, scores_BT.flatten()[place_n]))
        self._num_waiting += len(place_n)
        if self._num_waiting > self._rows_BC.numel():
            self._choose()

    def rows(self) -> torch.Tensor:
        """Return the best rows of each query, ascending, int64 `[B, C]`. `NONE` is no row."""
        self._choose()
        return self._rows_BC

    def _choose(self) -> None:
        if not self._num_waiting:
            return
        query_n, row_n, score_n = (torch.cat(some) for some in zip(*self._waiting, strict=True))
        self._waiting, self._num_waiting = [], 0
        query_n, order_n = query_n.sort(stable=True)  # the rows of a query remain ascending
        counts_B = torch.bincount(query_n, minlength=len(self._rows_BC))
        place_n = torch.arange(len(query_n), device=query_n.device) - (counts_B.cumsum(0) - counts_B)[query_n]
        num_best, most = self._rows_BC.shape[1], int(counts_B.max())
        scores_BA = torch.nn.functional.pad(self._scores_BC, (0, most), value=-torch.inf)
        rows_BA = torch.nn.functional.pad(self._rows_BC, (0, most), value=NONE)
        scores_BA[query_n, num_best + place_n], rows_BA[query_n, num_best + place_n] = score_n[order_n], row_n[order_n]
        best_BA = _are_best(scores_BA, num_best)
        self._scores_BC, self._rows_BC = scores_BA[best_BA].view(-1, num_best), rows_BA[best_BA].view(-1, num_best)
        self._worst_B1 = self._scores_BC.amin(dim=1, keepdim=True)


def _places_above(scores_BT: torch.Tensor, limit_B1: torch.Tensor) -> torch.Tensor:
    """Return the flat places, ascending, of the scores above the limit of their row."""
    if scores_BT.is_cuda:
        return (scores_BT > limit_B1).flatten().nonzero()[:, 0]
    # On a CPU, NumPy is four times as fast as torch, here and in `_are_best`.
    return torch.from_numpy(np.flatnonzero(scores_BT.numpy() > limit_B1.numpy()))


def _are_best(scores_BT: torch.Tensor, k: int) -> torch.Tensor:
    """Return which scores are the best k of their row, of equals the first columns, bool `[B, T]`."""
    if k >= scores_BT.shape[1]:
        return torch.ones_like(scores_BT, dtype=torch.bool)
    if scores_BT.is_cuda:
        worst_B1 = scores_BT.topk(k, dim=1).values[:, -1:]
    else:
        worst_B1 = torch.from_numpy(np.partition(scores_BT.numpy(), -k, axis=1)[:, [-k]])
    are_best = scores_BT >= worst_B1
    crossing = are_best.sum(dim=1) > k  # not all of several equal scores fit: those rows are sorted whole
    if crossing.any():
        columns = scores_BT[crossing].argsort(dim=1, descending=True, stable=True)[:, :k]
        are_best[crossing] = torch.zeros_like(are_best[crossing]).scatter(1, columns, value=True)
    return are_best


def _leave_out(scores_BT: torch.Tensor, query: IntArray, column: IntArray) -> None:
    inside = (column >= 0) & (column < scores_BT.shape[1])
    if inside.any():
        rows, columns = (torch.from_numpy(some[inside]).to(scores_BT.device) for some in (query, column))
        scores_BT[rows, columns] = -torch.inf
