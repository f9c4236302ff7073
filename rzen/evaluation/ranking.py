"""Exact scoring of pools of any size in blocks: the rank of every relevant candidate, and the first k candidates.

One product of queries and a block of candidates is held at a time, never queries x candidates. Candidates may be
memory-mapped. In addition to the queries in fp32, the memory is of the order of

    8 D block_rows + 24 query_rows block_rows + 24 Q K bytes

for any number of candidates. With the defaults, 1000 queries and memory-mapped fp16 of width 1536 it was 0.4 GB, for
100,000 candidates and for 200,000. Products are fp32, on a GPU too (TF32 off).

Ties go against what is relevant: a candidate that is not relevant and scores within `TIE` comes before it. Among
relevant candidates within `TIE`, the one of the lower grade comes first. Benchmarks list the relevant one first, so
other rules score collapsed vectors at 100%.

Shapes: Q queries, N candidates, P pairs of a query and a relevant candidate, D width, B and T rows of a block, K first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from rzen.evaluation.metrics import Relevant
from rzen.evaluation.vectors import NONE, TIE, FloatArray, IntArray
from rzen.vectors import full_precision, to_device

_PAIRS = 4096  # relevant rows gathered at once


@dataclass(frozen=True, slots=True)
class Pairs:
    """Queries, ascending, and rows of candidates."""

    query: IntArray
    row: IntArray

    @classmethod
    def none(cls) -> Pairs:
        return cls(np.zeros(0, np.int64), np.zeros(0, np.int64))


@dataclass(frozen=True, slots=True)
class Kinds:
    """Kinds of candidates that queries ask for.

    `of_N` is the kind of each candidate, `[N]`. `asked_QM` is true for the kinds of each query, `[Q, M]`.
    """

    of_N: IntArray  # noqa: N815  a shape
    asked_QM: npt.NDArray[np.bool_]  # noqa: N815


@dataclass(frozen=True, slots=True)
class Ranked:
    """Ranks from 1 of the relevant candidates and how many others tie with each, `[P]`; the first K, `[Q, K]`.

    `rows` and cosines (`scores`) are `NONE` and 0 where a pool has fewer than K candidates.
    """

    rank: IntArray
    tied: IntArray
    rows: IntArray
    scores: FloatArray


def rank_candidates(
    queries_QD: FloatArray,
    candidates_ND: FloatArray,
    relevant: Relevant,
    *,
    excluded: Pairs | None = None,
    kinds: Kinds | None = None,
    num_top: int = 10,
    device: str = "",
    block_rows: int = 8192,
    query_rows: int = 1024,
) -> Ranked:
    """All queries against all candidates, unit vectors of any float type. `device` is a GPU if there is one.

    `excluded` candidates have no rank and count for none, and so do those of other `kinds` than a query asks for. None
    of them is relevant.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    num_queries, num_candidates = len(queries_QD), len(candidates_ND)
    num_top = min(num_top, num_candidates)
    starts = np.arange(0, num_queries + query_rows, query_rows)
    bounds = np.searchsorted(relevant.query, starts)
    excluded = excluded or Pairs.none()
    excluded_bounds = np.searchsorted(excluded.query, starts)
    score_P = _scores_of_pairs(queries_QD, candidates_ND, relevant)
    least_P, most_P = (torch.from_numpy(score_P + margin).to(where) for margin in (np.float32(-TIE), np.float32(TIE)))
    above_P, level_P = (torch.zeros(len(score_P), dtype=torch.int64, device=where) for _ in range(2))
    best_QK = torch.full((num_queries, num_top), -torch.inf, device=where)
    rows_QK = torch.full((num_queries, num_top), NONE, device=where)
    with torch.inference_mode(), full_precision():
        asked_QD = to_device(queries_QD, where)
        for first in range(0, num_candidates, block_rows):
            block_TD = to_device(candidates_ND[first : first + block_rows], where)
            for number, start in enumerate(range(0, num_queries, query_rows)):
                rows, pairs = slice(start, start + query_rows), slice(bounds[number], bounds[number + 1])
                scores_BT = asked_QD[rows] @ block_TD.T
                query_p = torch.from_numpy(relevant.query[pairs] - start).to(where)
                column_p = torch.from_numpy(relevant.row[pairs] - first).to(where)
                inside_p = (column_p >= 0) & (column_p < len(block_TD))
                scores_BT[query_p[inside_p], column_p[inside_p]] = -torch.inf
                left_out = slice(excluded_bounds[number], excluded_bounds[number + 1])
                _leave_out(scores_BT, excluded.query[left_out] - start, excluded.row[left_out] - first)
                if kinds is not None:
                    asked_BT = kinds.asked_QM[rows][:, kinds.of_N[first : first + block_rows]]
                    scores_BT[~torch.from_numpy(asked_BT).to(where)] = -torch.inf
                above_P[pairs] += _count(scores_BT, query_p, least_P[pairs])
                level_P[pairs] -= _count(scores_BT, query_p, most_P[pairs])
                best_QK[rows], rows_QK[rows] = _merge(best_QK[rows], rows_QK[rows], scores_BT, first)
    above = above_P.cpu().numpy()
    rank_P = settle(relevant, score_P, above)
    first_QK, cosine_QK = _interleave(relevant, rank_P, score_P, rows_QK.cpu().numpy(), best_QK.cpu().numpy())
    return Ranked(rank_P, above + level_P.cpu().numpy(), first_QK, cosine_QK)


def _leave_out(scores_BT: torch.Tensor, query: IntArray, column: IntArray) -> None:
    """Give these pairs the lowest score, those that are in the block, in place."""
    inside = (column >= 0) & (column < scores_BT.shape[1])
    if inside.any():
        rows, columns = (torch.from_numpy(some[inside]).to(scores_BT.device) for some in (query, column))
        scores_BT[rows, columns] = -torch.inf


def rank_pools(
    queries_QD: FloatArray,
    candidates_ND: FloatArray,
    relevant: Relevant,
    pools: Sequence[IntArray],
    *,
    num_top: int = 10,
    device: str = "",
) -> Ranked:
    """The same with candidates of its own for each query: rows of `candidates_ND`, none twice, relevant ones included.

    Queries of equal pools are scored together.
    """
    rank_P, tied_P = np.zeros_like(relevant.row), np.zeros_like(relevant.row)
    rows_QK = np.full((len(pools), num_top), NONE)
    scores_QK = np.zeros((len(pools), num_top), np.float32)
    bounds = np.searchsorted(relevant.query, np.arange(len(pools) + 1))
    together: dict[bytes, list[int]] = {}
    for query, pool in enumerate(pools):
        together.setdefault(np.sort(pool).tobytes(), []).append(query)
    for key, members in together.items():
        pool_N, query_Q = np.frombuffer(key, dtype=np.int64), np.array(members)
        pairs_p = np.concatenate([np.arange(bounds[query], bounds[query + 1]) for query in members])
        mine = Relevant(
            np.searchsorted(query_Q, relevant.query[pairs_p]),
            np.searchsorted(pool_N, relevant.row[pairs_p]),
            relevant.grade[pairs_p],
            len(query_Q),
        )
        found = rank_candidates(queries_QD[query_Q], candidates_ND[pool_N], mine, num_top=num_top, device=device)
        rank_P[pairs_p], tied_P[pairs_p] = found.rank, found.tied
        width = found.rows.shape[1]
        rows_QK[query_Q, :width] = np.where(found.rows == NONE, NONE, pool_N[found.rows])
        scores_QK[query_Q, :width] = found.scores
    return Ranked(rank_P, tied_P, rows_QK, scores_QK)


def top_k(queries: FloatArray, vectors_ND: FloatArray, k: int) -> tuple[IntArray, FloatArray]:
    """Return rows and cosines of the k best vectors, best first: `[k]` for a query `[D]`, `[Q, k]` for `[Q, D]`.

    Equal scores come in the order of their rows. With fewer than k vectors all are returned.
    """
    scores = queries @ vectors_ND.T
    best = np.argsort(-scores, axis=-1, kind="stable")[..., :k]
    return best, np.take_along_axis(scores, best, axis=-1)


def _scores_of_pairs(queries_QD: FloatArray, candidates_ND: FloatArray, relevant: Relevant) -> FloatArray:
    parts = [np.zeros(0, np.float32)]
    for first in range(0, len(relevant.row), _PAIRS):
        pairs = slice(first, first + _PAIRS)
        queries_PD, candidates_PD = queries_QD[relevant.query[pairs]], candidates_ND[relevant.row[pairs]]
        parts.append(
            np.einsum(
                "pd,pd->p", queries_PD.astype(np.float32, copy=False), candidates_PD.astype(np.float32, copy=False)
            )
        )
    return np.concatenate(parts)


def _count(scores_BT: torch.Tensor, query_p: torch.Tensor, bound_p: torch.Tensor) -> torch.Tensor:
    """For each pair, how many scores of its query reach the bound."""
    rows = max(1, len(scores_BT))
    parts = [
        (scores_BT[query_p[first : first + rows]] >= bound_p[first : first + rows, None]).sum(dim=1)
        for first in range(0, len(query_p), rows)
    ]
    return torch.cat(parts) if parts else query_p


def _merge(
    best_BK: torch.Tensor, rows_BK: torch.Tensor, scores_BT: torch.Tensor, first: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best of those so far and of a block; of equals the earlier row."""
    top_Bk, column_Bk = scores_BT.topk(min(best_BK.shape[1], scores_BT.shape[1]), dim=1)
    all_B = torch.cat([best_BK, top_Bk], dim=1)
    rows_B = torch.cat([rows_BK, column_Bk + first], dim=1)
    by_row_B = rows_B.argsort(dim=1)
    order_B = all_B.gather(1, by_row_B).argsort(dim=1, descending=True, stable=True)[:, : best_BK.shape[1]]
    order_B = by_row_B.gather(1, order_B)
    return all_B.gather(1, order_B), rows_B.gather(1, order_B)


def settle(relevant: Relevant, score_P: FloatArray, above_P: IntArray) -> IntArray:
    """Return ranks `[P]` from scores and the numbers of others above. Ranks of a query differ, worst of a tie first."""
    order_P = np.lexsort((relevant.row, -score_P, relevant.query))
    query_P, falling_P = relevant.query[order_P], score_P[order_P]
    starts_P = np.ones(len(order_P), dtype=bool)
    starts_P[1:] = (query_P[1:] != query_P[:-1]) | (falling_P[:-1] - falling_P[1:] > TIE)
    tie_P = np.cumsum(starts_P)
    order_P = order_P[np.lexsort((relevant.grade[order_P], tie_P))]
    count_Q = relevant.count()
    number_P = np.arange(len(order_P)) - np.repeat(np.cumsum(count_Q) - count_Q, count_Q) + 1
    # Nobody stands before another and has fewer above: the running maximum within each query.
    shift_P = query_P * (above_P.max(initial=0) + 1)
    rank_P = np.empty_like(order_P)
    rank_P[order_P] = number_P + np.maximum.accumulate(above_P[order_P] + shift_P) - shift_P
    return rank_P


def _interleave(
    relevant: Relevant, rank_P: IntArray, score_P: FloatArray, others_QK: IntArray, others_score_QK: FloatArray
) -> tuple[IntArray, FloatArray]:
    """The first K: relevant candidates at their ranks, the others in the places between."""
    rows_QK, scores_QK = np.full_like(others_QK, NONE), np.zeros_like(others_score_QK)
    taken_QK = np.zeros(rows_QK.shape, dtype=bool)
    shown_P = rank_P <= rows_QK.shape[1]
    places = relevant.query[shown_P], rank_P[shown_P] - 1
    taken_QK[places] = True
    rows_QK[places], scores_QK[places] = relevant.row[shown_P], score_P[shown_P]
    query_F, place_F = np.nonzero(~taken_QK)
    number_F = (np.cumsum(~taken_QK, axis=1) - 1)[query_F, place_F]
    rows_QK[query_F, place_F] = others_QK[query_F, number_F]
    scores_QK[query_F, place_F] = others_score_QK[query_F, number_F]
    exists_QK = np.isfinite(scores_QK)
    return np.where(exists_QK, rows_QK, NONE), np.where(exists_QK, scores_QK, 0)
