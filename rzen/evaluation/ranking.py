"""Ranks and metrics of queries that share all targets, as arrays `[Q]` or `[Q, R]`; the search of the first k.

Benchmarks list the relevant target first, so that equal scores, collapsed vectors and NaN would count as success. Here
ties go against it (`scoring.py`), NaN is an error and collapse is told.

Shapes: Q queries, N targets, R relevant targets per query, D embedding width. Ranks count from 1.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipelines.errors import UserError
from rzen.evaluation.metrics import Relevant, metrics_by_query
from rzen.evaluation.vectors import COLLAPSE_VARIANCE, NONE, FloatArray, IntArray, check_vectors


def rank_of_gold(
    queries_QD: FloatArray, targets_ND: FloatArray, gold: npt.ArrayLike, *, block_rows: int = 1024
) -> IntArray:
    """Ranks of the relevant targets by cosine over all N targets, in the shape of `gold`: `[Q]`, or `[Q, R]`.

    `gold` holds rows of `targets_ND`; `NONE` in it, where a query has fewer than R, has rank 0. Targets that are not
    relevant and score as high up to `TIE` stand before. Vectors are L2-normalized. Memory is `block_rows` squared.
    Raises `UserError` for NaN, infinity, vectors of other lengths, and gold that names no target.
    """
    from rzen.evaluation.scoring import rank_candidates  # torch, which whoever reads a spec need not load

    check_vectors(queries_QD, "queries")
    check_vectors(targets_ND, "targets")
    gold_array = np.asarray(gold, dtype=np.int64)
    gold_QR = gold_array.reshape(len(queries_QD), -1)
    _check_gold(gold_QR, len(targets_ND))
    query_P, column_P = np.nonzero(gold_QR != NONE)
    relevant = Relevant(query_P, gold_QR[query_P, column_P], np.ones(len(query_P)), len(gold_QR))
    found = rank_candidates(
        queries_QD, targets_ND, relevant, num_top=1, block_rows=block_rows, query_rows=block_rows, device="cpu"
    )
    ranks_QR = np.zeros_like(gold_QR)
    ranks_QR[query_P, column_P] = found.rank
    return ranks_QR.reshape(gold_array.shape)


def hit_at_k(ranks: IntArray, k: int) -> float:
    """Share of the queries with a relevant target among the first k."""
    return float((_best(ranks) <= k).mean())


def mrr(ranks: IntArray) -> float:
    """Mean reciprocal rank of the best relevant target."""
    return float((1.0 / _best(ranks)).mean())


def ndcg_at_k(ranks: IntArray, k: int, grades: npt.ArrayLike | None = None) -> float:
    """Mean normalized discounted cumulative gain with linear gain: grade / log2(1 + rank) over the first k.

    `grades` are non-negative, in the shape of `ranks`; all 1 where not given. Raises `UserError` for a query whose
    grades are all 0: it has no ideal ranking.
    """
    ranks_QR = ranks.reshape(len(ranks), -1)
    given_QR = np.ones(ranks_QR.shape) if grades is None else np.asarray(grades, np.float64).reshape(ranks_QR.shape)
    query_P, column_P = np.nonzero((ranks_QR > 0) & (given_QR > 0))
    rank_P = ranks_QR[query_P, column_P]
    relevant = Relevant(query_P, column_P, given_QR[query_P, column_P], len(ranks))
    if not relevant.count().all():
        problem = "has no target with a grade above 0"
        raise UserError(f"query {int(np.argmin(relevant.count()))}", problem, "drop the query")
    return float(metrics_by_query(relevant, rank_P, (k,))[f"ndcg_linear@{k}"].mean())


def top_k(queries: FloatArray, vectors_ND: FloatArray, k: int) -> tuple[IntArray, FloatArray]:
    """Rows and cosines of the k best vectors, best first, `[k]` for a query `[D]` and `[Q, k]` for `[Q, D]`.

    Equal scores come in the order of their rows. With fewer than k vectors all are returned.
    """
    scores = queries @ vectors_ND.T
    best = np.argsort(-scores, axis=-1, kind="stable")[..., :k]
    return best, np.take_along_axis(scores, best, axis=-1)


def is_collapsed(vectors_ND: FloatArray) -> bool:
    """Whether two or more unit vectors are all one vector up to rounding: a model that tells nothing apart."""
    variance = vectors_ND.var(axis=0, dtype=np.float64).sum()
    return len(vectors_ND) > 1 and bool(variance < COLLAPSE_VARIANCE)


def _check_gold(gold_QR: IntArray, num_targets: int) -> None:
    for wrong_Q, problem in (
        (((gold_QR < NONE) | (gold_QR >= num_targets)).any(axis=1), f"names a row outside the {num_targets} targets"),
        ((gold_QR == NONE).all(axis=1), "is missing"),
    ):
        if wrong_Q.any():
            query = int(np.argmax(wrong_Q))
            raise UserError(f"gold of query {query}", problem, "every query needs a relevant target")


def _best(ranks: IntArray) -> FloatArray:
    """Rank of the best relevant target of each query."""
    ranks_QR = ranks.reshape(len(ranks), -1)
    best_Q: FloatArray = np.where(ranks_QR > 0, ranks_QR, np.inf).min(axis=1)
    return best_Q
