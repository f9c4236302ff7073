"""Ranks of relevant targets, where all queries share all targets."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rzen.evaluation.metrics import Relevant
from rzen.evaluation.ranking import rank_candidates
from rzen.evaluation.vectors import NONE, FloatArray, IntArray


def relevant_of(gold_QR: IntArray, grades_QR: npt.ArrayLike | None = None) -> Relevant:
    """Pairs of queries and their relevant targets: rows `[Q, R]`, `NONE` where a query has fewer."""
    query_P, column_P = np.nonzero(gold_QR != NONE)
    grades = np.ones(gold_QR.shape) if grades_QR is None else np.asarray(grades_QR, np.float64)
    return Relevant(query_P, gold_QR[query_P, column_P], grades[query_P, column_P], len(gold_QR))


def rank_of_gold(
    queries_QD: FloatArray, targets_ND: FloatArray, gold_Q: npt.ArrayLike, block_rows: int = 1024
) -> IntArray:
    """The rank of the one relevant target of each query."""
    relevant = relevant_of(np.asarray(gold_Q, dtype=np.int64)[:, None])
    found = rank_candidates(
        queries_QD, targets_ND, relevant, num_top=1, block_rows=block_rows, query_rows=block_rows, device="cpu"
    )
    return found.rank
