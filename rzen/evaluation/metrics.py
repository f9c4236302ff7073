"""The metrics of MMEB-V2 for each query, from the ranks of its relevant candidates: eight of them, at 1, 5 and 10.

With R relevant candidates at ranks r_1 < r_2 < ... and grades g, over the first k:

    hit         1 if any r <= k
    precision   n / k, where n counts r <= k; also where the pool has fewer than k candidates
    recall      n / R
    f1          their harmonic mean
    mrr         1 / r_1, or 0 beyond k
    map         sum over r_i <= k of i / r_i, divided by min(R, k)  (trec_eval's map_cut divides by R)
    ndcg        sum over r <= k of gain / log2(1 + r), divided by its largest possible value; the gain is g (linear)
                or 2^g - 1 (exponential)

as the benchmark's authors define them; `tests/parity/test_metrics.py` checks them against trec_eval. Their script mixes
up the grades of queries with several relevant candidates, because it sorts these and not the grades. Its nDCG of graded
sets can differ from run to run. A query without a relevant candidate scores 0.

Shapes: Q queries, P pairs of a query and a relevant candidate, query by query. Ranks count from 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rzen.evaluation.vectors import IntArray

CUTOFFS = (1, 5, 10)
FAMILIES = ("hit", "ndcg_linear", "ndcg_exponential", "precision", "recall", "f1", "map", "mrr")
METRIC_NAMES = tuple(f"{family}@{k}" for family in FAMILIES for k in CUTOFFS)
_LARGE_GRADE = 512  # sums of a few gains 2^grade overflow from 1023 on


@dataclass(frozen=True, slots=True)
class Relevant:
    """Pairs of queries and their relevant candidates, sorted by query: rows of both, and grades above 0; `[P]` each."""

    query: IntArray
    row: IntArray
    grade: npt.NDArray[np.float64]
    num_queries: int

    def count(self) -> IntArray:
        """How many relevant candidates each query has, `[Q]`."""
        return np.bincount(self.query, minlength=self.num_queries).astype(np.int64)


def metrics_by_query(
    relevant: Relevant, rank_P: IntArray, cutoffs: Sequence[int] = CUTOFFS
) -> dict[str, npt.NDArray[np.float64]]:
    """Every metric at every cutoff, in the order of `METRIC_NAMES`, `[Q]` each. Ranks of a query are all different."""
    order_P = np.lexsort((rank_P, relevant.query))
    query_P, rank_P, grade_P = relevant.query, rank_P[order_P], relevant.grade[order_P]
    count_Q = relevant.count()
    number_P = _number_within(count_Q) + 1

    def total(values_P: npt.ArrayLike) -> npt.NDArray[np.float64]:
        return np.bincount(query_P, weights=values_P, minlength=relevant.num_queries).astype(np.float64)

    found: dict[str, npt.NDArray[np.float64]] = {}
    for k in cutoffs:
        seen_P = rank_P <= k
        seen_Q = total(seen_P)
        precision_Q, recall_Q = seen_Q / k, seen_Q / np.maximum(count_Q, 1)
        found[f"hit@{k}"] = (seen_Q > 0).astype(np.float64)
        found[f"precision@{k}"] = precision_Q
        found[f"recall@{k}"] = recall_Q
        found[f"f1@{k}"] = 2 * precision_Q * recall_Q / np.where(seen_Q > 0, precision_Q + recall_Q, 1.0)
        found[f"mrr@{k}"] = total(np.where(seen_P & (number_P == 1), 1 / rank_P, 0.0))
        found[f"map@{k}"] = total(np.where(seen_P, number_P / rank_P, 0.0)) / np.clip(count_Q, 1, k)
        for family, gain_P in (("linear", grade_P), ("exponential", _exponential_gain(relevant, grade_P))):
            best_P = gain_P[np.lexsort((-gain_P, query_P))]
            ideal_Q = total(np.where(number_P <= k, best_P / np.log2(1 + number_P), 0.0))
            gained_Q = total(np.where(seen_P, gain_P / np.log2(1 + rank_P), 0.0))
            found[f"ndcg_{family}@{k}"] = gained_Q / np.where(ideal_Q > 0, ideal_Q, 1.0)
    return {name: found[name] for name in (f"{family}@{k}" for family in FAMILIES for k in cutoffs)}


def _exponential_gain(relevant: Relevant, grade_P: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """2^g - 1. A query with a large grade gets its gains in another unit, which nDCG does not depend on."""
    largest_Q = np.zeros(relevant.num_queries)
    np.maximum.at(largest_Q, relevant.query, grade_P)
    shift_P = np.where(largest_Q > _LARGE_GRADE, largest_Q, 0.0)[relevant.query]
    gain_P: npt.NDArray[np.float64] = np.exp2(grade_P - shift_P) - np.exp2(-shift_P)
    return gain_P


def _number_within(count_Q: IntArray) -> IntArray:
    """0, 1, ... within each query's pairs."""
    starts_Q = np.cumsum(count_Q) - count_Q
    return np.arange(count_Q.sum()) - np.repeat(starts_Q, count_Q)
