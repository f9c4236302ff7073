"""The first candidates of an embedder in the order of a re-ranker: metrics before and after, ceiling, calibration.

    shortlist = Shortlist(scored, log_odds_QK)          rzen.evaluation.dataset_scores, any re-ranker
    scores = score_reranked(shortlist, weight=0.05)

Only the first K candidates of a query change places. A relevant candidate below them keeps its rank. Ties go against
what is relevant, as everywhere. Shapes: Q queries, K candidates of each, P pairs of a query and a relevant candidate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from rzen.evaluation.comparison import Difference, paired_intervals
from rzen.evaluation.dataset_scores import DatasetScores
from rzen.evaluation.metrics import Relevant, metrics_by_query
from rzen.evaluation.ranking import settle
from rzen.evaluation.vectors import NONE, TIE, FloatArray, IntArray

Stage = Literal["before", "reranked", "fused", "ceiling"]
"""Order of the embedder, order by z, order by cos + w z, and the best order that there is of the same candidates."""
WeightSource = Literal["given", "chosen"]
WEIGHTS = (0.0, *(float(f"{digit}e{exponent}") for exponent in range(-4, 1) for digit in (1, 2, 5)), 10.0)
"""Values of w that are tried. z of a trained re-ranker is some 10, differences of cosines are some 0.1. Our choice."""
_CUTOFFS = (1, 5, 10)
_BINS = 15  # as Guo et al., On Calibration of Modern Neural Networks (arXiv 1706.04599)


@dataclass(frozen=True, slots=True)
class Shortlist:
    """The first K candidates of each query of a dataset, and the log-odds z of a re-ranker.

    `log_odds` is fp32 `[Q, K]`. It is NaN where a pool has fewer than K candidates, and finite elsewhere.
    """

    scores: DatasetScores
    log_odds: npt.NDArray[np.float32]

    @property
    def top_k(self) -> int:
        """Return K."""
        return int(self.log_odds.shape[1])


@dataclass(frozen=True, slots=True)
class Bin:
    """Pairs with a probability of yes in one of 15 intervals of equal width."""

    num_pairs: int
    mean_probability: float
    relevant_fraction: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """How far sigmoid(z) is a probability of relevance, over all pairs of the shortlists.

    `ece` is the expected calibration error, `brier` the mean squared error. A candidate that nobody has labeled counts
    as irrelevant, as in the metrics.
    """

    num_pairs: int
    relevant_fraction: float
    ece: float
    brier: float
    bins: tuple[Bin, ...]


@dataclass(frozen=True, slots=True)
class WeightChoice:
    """The w of cos + w z for one dataset. `curve` has the score of each w that was tried, if it was chosen."""

    weight: float
    source: WeightSource
    curve: Mapping[float, float] | None = None
    num_queries: int = 0


@dataclass(frozen=True, slots=True)
class RerankedScores:
    """One dataset before and after re-ranking.

    `by_query` is stage -> metric -> score of each query, `[Q]`. `metric` is the one that counts. There is no stage
    `fused` without a weight.
    """

    metric: str
    num_queries: int
    top_k: int
    by_query: dict[Stage, dict[str, FloatArray]]
    calibration: Calibration
    weight: WeightChoice | None = None

    @property
    def means(self) -> dict[Stage, dict[str, float]]:
        """Return stage -> metric -> mean over the queries."""
        return {
            stage: {metric: float(values.mean()) for metric, values in metrics.items()}
            for stage, metrics in self.by_query.items()
        }

    def as_json(self) -> dict[str, Any]:
        """Return what `rerank.json` and `--json` say of the dataset."""
        return {
            "metric": self.metric,
            "num_queries": self.num_queries,
            "top_k": self.top_k,
            **{str(stage): metrics for stage, metrics in self.means.items()},
            "weight": None if self.weight is None else asdict(self.weight),
            "calibration": asdict(self.calibration),
        }


def score_reranked(shortlist: Shortlist, weight: WeightChoice | None = None) -> RerankedScores:
    """Return the metrics of all stages: that of the dataset, hit@1, and recall and nDCG at 1, 5, 10 and K."""
    scored, top_k = shortlist.scores, shortlist.top_k
    ranks: dict[Stage, IntArray] = {"before": scored.ranked.rank, "reranked": reranked(shortlist, None)}
    if weight is not None:
        ranks["fused"] = reranked(shortlist, weight.weight)
    ranks["ceiling"] = _new_ranks(shortlist, _oracle(shortlist))
    metric = scored.dataset.row.metric
    cutoffs = sorted({*_CUTOFFS, top_k, *scored.dataset.row.cutoffs, int(metric.rpartition("@")[2])})
    names = [metric, "hit@1", *(f"{family}@{k}" for family in ("recall", "ndcg_linear") for k in cutoffs)]
    by_query: dict[Stage, dict[str, FloatArray]] = {}
    for stage, rank_P in ranks.items():
        found = metrics_by_query(scored.relevant, rank_P, cutoffs)
        by_query[stage] = {name: found[name] for name in dict.fromkeys(names)}
    return RerankedScores(metric, len(shortlist.log_odds), top_k, by_query, calibrate(shortlist), weight)


def reranked(shortlist: Shortlist, weight: float | None) -> IntArray:
    """Return the rank of each relevant candidate, `[P]`, by cos + weight z, or by z only without a weight."""
    z_QK = shortlist.log_odds.astype(np.float64)
    if weight is None:
        return _new_ranks(shortlist, z_QK)
    cosines_QK = shortlist.scores.ranked.scores[:, : shortlist.top_k].astype(np.float64)
    return _new_ranks(shortlist, cosines_QK + weight * z_QK)


def choose_weight(shortlist: Shortlist) -> WeightChoice:
    """Return the w with the best mean of the metric that counts; of equally good ones the smallest.

    `shortlist` must be of other queries than those that are reported: w is fitted to them. w = 0 leaves the order of
    the embedder.
    """
    scored = shortlist.scores
    metric = scored.dataset.row.metric
    cutoff = int(metric.rpartition("@")[2])
    curve = {
        weight: float(metrics_by_query(scored.relevant, reranked(shortlist, weight), (cutoff,))[metric].mean())
        for weight in WEIGHTS
    }
    best = max(curve.values())
    return WeightChoice(
        next(w for w, value in curve.items() if value == best), "chosen", curve, len(shortlist.log_odds)
    )


def calibrate(shortlist: Shortlist) -> Calibration:
    """Return the calibration of sigmoid(z) over all pairs of a shortlist."""
    exists_QK = ~np.isnan(shortlist.log_odds)
    relevant_QK = np.zeros(exists_QK.shape, np.bool_)
    inside_P = shortlist.scores.ranked.rank <= shortlist.top_k
    relevant_QK[_places(shortlist, inside_P)] = True
    probability_N = 1 / (1 + np.exp(-shortlist.log_odds[exists_QK].astype(np.float64)))
    relevant_N = relevant_QK[exists_QK]
    bin_N = np.minimum((probability_N * _BINS).astype(np.int64), _BINS - 1)
    counts, sums, hits = (
        np.bincount(bin_N, weights, minlength=_BINS) for weights in (None, probability_N, relevant_N.astype(np.float64))
    )
    filled = np.maximum(counts, 1)
    bins = tuple(
        Bin(int(count), float(mean), float(share))
        for count, mean, share in zip(counts, sums / filled, hits / filled, strict=True)
    )
    num_pairs = len(relevant_N)
    return Calibration(
        num_pairs,
        float(relevant_N.mean()),
        sum(one.num_pairs * abs(one.mean_probability - one.relevant_fraction) for one in bins) / num_pairs,
        float(((probability_N - relevant_N) ** 2).mean()),
        bins,
    )


def compare_stages(
    scores: Mapping[str, RerankedScores], stage: Stage, metric: str | None = None
) -> dict[str, Difference]:
    """Return dataset -> what a stage gains over `before` on a metric, with its 95% interval.

    Without a metric it is the one that counts. Last, under `mean`, is the plain mean over the datasets. Datasets
    without the stage or the metric are left out.
    """
    gains = {}
    for name, one in scores.items():
        values = one.by_query.get(stage, {}).get(metric or one.metric)
        if values is not None:
            gains[name] = values - one.by_query["before"][metric or one.metric]
    return paired_intervals(gains) if gains else {}


def _places(shortlist: Shortlist, chosen_P: npt.NDArray[np.bool_]) -> tuple[IntArray, IntArray]:
    """Return query and place in its shortlist of relevant candidates. They stand at their ranks."""
    return shortlist.scores.relevant.query[chosen_P], shortlist.scores.ranked.rank[chosen_P] - 1


def _oracle(shortlist: Shortlist) -> FloatArray:
    """Return scores that put the relevant candidates first, the best grade before the others."""
    score_QK = np.zeros(shortlist.log_odds.shape)
    inside_P = shortlist.scores.ranked.rank <= shortlist.top_k
    score_QK[_places(shortlist, inside_P)] = shortlist.scores.relevant.grade[inside_P]
    return score_QK


def _new_ranks(shortlist: Shortlist, score_QK: FloatArray) -> IntArray:
    relevant, old_P = shortlist.scores.relevant, shortlist.scores.ranked.rank
    inside_P = old_P <= shortlist.top_k
    query_p, place_p = _places(shortlist, inside_P)
    score_p = score_QK[query_p, place_p]
    missing_QK = shortlist.scores.ranked.rows[:, : shortlist.top_k] == NONE
    others_QK = np.where(missing_QK, -np.inf, score_QK)
    others_QK[query_p, place_p] = -np.inf
    above_p = (others_QK[query_p] >= score_p[:, None] - TIE).sum(axis=1)
    mine = Relevant(query_p, relevant.row[inside_P], relevant.grade[inside_P], relevant.num_queries)
    rank_P = old_P.copy()
    rank_P[inside_P] = settle(mine, score_p, above_p)
    return rank_P
