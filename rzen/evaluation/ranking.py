"""Exact retrieval metrics in numpy: the rank of every relevant target, and what follows from ranks.

Benchmarks list the relevant target first, so that equal scores, collapsed vectors and NaN would count as success. Here
ties go against it, NaN is an error and collapse is told.

Shapes: Q queries, N targets, R relevant targets per query, D embedding width. Ranks count from 1.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipelines.errors import UserError

FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.int64]

NONE = -1
"""Fills `gold_QR` where a query has fewer than R relevant targets."""
TIE = 1e-6
"""Cosines closer than this are equal: the rounding of fp32 products must not decide a rank. Our choice."""
COLLAPSE_VARIANCE = 1e-5
"""Total variance of unit vectors below which they are one vector: their mean pairwise cosine exceeds 0.99999."""


def rank_of_gold(
    queries_QD: FloatArray, targets_ND: FloatArray, gold: npt.ArrayLike, *, block_rows: int = 1024
) -> IntArray:
    """Ranks of the relevant targets by cosine over all N targets, in the shape of `gold`: `[Q]`, or `[Q, R]`.

    `gold` holds rows of `targets_ND`; `NONE` in it has rank 0. The rank of a target is the number of targets, itself
    included, that score at least as high up to `TIE`. Vectors are L2-normalised. Memory is `block_rows` squared.
    Raises `UserError` for NaN, infinity, vectors of other lengths, and gold that names no target.
    """
    check_vectors(queries_QD, "queries")
    check_vectors(targets_ND, "targets")
    queries_QD, targets_ND = (v.astype(np.float32, copy=False) for v in (queries_QD, targets_ND))
    gold_array = np.asarray(gold, dtype=np.int64)
    gold_QR = gold_array.reshape(len(queries_QD), -1)
    _check_gold(gold_QR, len(targets_ND))
    ranks_QR = np.zeros_like(gold_QR)
    for start in range(0, len(queries_QD), block_rows):
        rows = slice(start, start + block_rows)
        block_BD, relevant_BRD = queries_QD[rows], targets_ND[gold_QR[rows]]
        least_BR = np.einsum("bd,brd->br", block_BD, relevant_BRD) - TIE
        for first in range(0, len(targets_ND), block_rows):
            scores_BT = block_BD @ targets_ND[first : first + block_rows].T
            for column in range(gold_QR.shape[1]):
                ranks_QR[rows, column] += (scores_BT >= least_BR[:, column, None]).sum(axis=1)
    return np.where(gold_QR == NONE, 0, ranks_QR).reshape(gold_array.shape)


def hit_at_k(ranks: IntArray, k: int) -> float:
    """Share of the queries with a relevant target among the first k."""
    return float((_best(ranks) <= k).mean())


def mrr(ranks: IntArray) -> float:
    """Mean reciprocal rank of the best relevant target."""
    return float((1.0 / _best(ranks)).mean())


def ndcg_at_k(ranks: IntArray, k: int, grades: npt.ArrayLike | None = None) -> float:
    """Mean normalised discounted cumulative gain with linear gain: grade / log2(1 + rank) over the first k.

    `grades` are non-negative, in the shape of `ranks`; all 1 where not given. Raises `UserError` for a query whose
    grades are all 0: it has no ideal ranking.
    """
    ranks_QR = ranks.reshape(len(ranks), -1)
    given_QR = (
        np.ones(ranks_QR.shape) if grades is None else np.asarray(grades, dtype=np.float64).reshape(ranks_QR.shape)
    )
    grades_QR = np.where(ranks_QR > 0, given_QR, 0.0)
    seen_QR = (ranks_QR > 0) & (ranks_QR <= k)
    gained_Q = np.where(seen_QR, grades_QR / np.log2(1 + np.maximum(ranks_QR, 1)), 0.0).sum(axis=1)
    best_first_QR = -np.sort(-grades_QR, axis=1)[:, :k]
    ideal_Q = (best_first_QR / np.log2(2 + np.arange(best_first_QR.shape[1]))).sum(axis=1)
    if (ideal_Q <= 0).any():
        raise UserError(f"query {int(np.argmin(ideal_Q))}", "has no target with a grade above 0", "drop the query")
    return float((gained_Q / ideal_Q).mean())


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


def check_vectors(vectors_ND: FloatArray, place: str) -> None:
    """Raise `UserError` unless these are finite unit vectors (within 1%, the rounding of bf16)."""
    if vectors_ND.ndim != 2 or len(vectors_ND) == 0:
        raise UserError(place, f"shape {vectors_ND.shape} is not [rows, dimensions]", "give at least one vector")
    lengths_N = np.linalg.norm(vectors_ND.astype(np.float32, copy=False), axis=1)
    for wrong_N, problem in ((~np.isfinite(lengths_N), "is not finite"), (abs(lengths_N - 1) > 0.01, "is not unit")):
        if wrong_N.any():
            row = int(np.argmax(wrong_N))
            raise UserError(
                f"{place}[{row}]", f"{problem} ({wrong_N.sum()} of {len(wrong_N)})", "check the model that made them"
            )


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
