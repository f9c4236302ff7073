"""Held-out scores of a re-ranker while it trains: each query ranks the targets of a small group.

A re-ranker reads each pair, so that searching all held-out targets would cost more than the training. Groups have
`ListEncoder.held_out_group` samples. They are the same for any number of workers. Ties count against the relevant ones.

Shapes: P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from rzen.reranking.lists import CrossedGroups
from rzen.training.held_out import HeldOutShare, gathered
from rzen.training.held_out_scores import SourceScore

LogOdds = Callable[[CrossedGroups | None], npt.NDArray[np.float32]]
"""Returns z of all pairs of some groups in order, fp32 `[P]`. None: there are none on this rank. A collective."""
Ranked = dict[int, tuple[int, int, int]]
"""Row of a query -> rank of its first relevant target, row of the first target, number of targets."""


def score(log_odds: LogOdds, shares: Mapping[str, HeldOutShare]) -> dict[str, SourceScore]:
    """Return the score of each source that has samples. Ranks other than 0 return nothing. A collective."""
    parts = gathered({source: _rank_groups(log_odds, share) for source, share in shares.items()})
    joined = {source: {row: one for part in parts for row, one in part[source].items()} for source in shares}
    return {source: _summary(ranked) for source, ranked in joined.items() if ranked}


def _rank_groups(log_odds: LogOdds, share: HeldOutShare) -> Ranked:
    groups: CrossedGroups | None = share.samples
    z_P = log_odds(groups)  # in ZeRO stage 3, all ranks call the model equally often
    if groups is None:
        return {}
    # A score that is not finite would tie with nothing.
    z_P = np.nan_to_num(z_P, nan=-np.inf, posinf=-np.inf, neginf=-np.inf)
    ranked: Ranked = {}
    for query in np.unique(groups.pairs[:, 0]).tolist():
        places = np.flatnonzero(groups.pairs[:, 0] == query)
        rank, first = rank_of_best(z_P[places], groups.is_relevant[places])
        found = int(groups.pairs[places[first], 1])
        ranked[share.rows[query]] = (rank, share.rows[found], len(places))
    return ranked


def rank_of_best(scores: npt.NDArray[np.float32], is_relevant: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """Return the rank of the first relevant target, from 1, and the place of the first target of all."""
    best = scores[is_relevant].max()
    before = (~is_relevant) & (scores >= best)
    # Of equal scores, a wrong target is the first one.
    order = np.lexsort((is_relevant, -scores))
    return 1 + int(before.sum()), int(order[0])


def _summary(ranked: Ranked) -> SourceScore:
    rows = sorted(ranked)
    ranks = [ranked[row][0] for row in rows]
    return {
        "hit": float(np.mean(np.equal(ranks, 1))),
        "candidates": max(ranked[row][2] for row in rows),
        "queries": rows,
        "ranks": ranks,
        "found": [ranked[row][1] for row in rows],
    }
