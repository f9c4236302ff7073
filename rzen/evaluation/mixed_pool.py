"""Datasets scored in one pool: the candidates of all of them are those of every query, as people search an index.

    joined = join_datasets(datasets)                        pipelines.benchmarks
    scores = score_mixed_pool(joined, queries, candidates)  vectors of the joined ids

An own pool holds only what a query asks for. In the mixed one, a model may find the wrong kind of thing first. A user
who names a task searches for one kind only, as `rzen search --task` does. The routed score is that search.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pipelines.benchmarks.join import JoinedDatasets
from pipelines.items.types import as_ids
from pipelines.redaction import escape_markdown
from rzen.evaluation.comparison import MEAN, Difference, finds_target_modality, paired_intervals
from rzen.evaluation.dataset_scores import DatasetScores, score_dataset
from rzen.evaluation.metrics import Relevant
from rzen.evaluation.ranking import Kinds
from rzen.evaluation.vectors import FloatArray, IntArray, Vectors

HIT, ASKED_MODALITY, ROUTED_HIT = "hit@1", "asked_modality@1", "routed_hit@1"
METRICS = (HIT, ASKED_MODALITY, ROUTED_HIT)
NUM_TOP = 5
"""First candidates of each query that are kept, for reports."""


@dataclass(frozen=True, slots=True)
class MixedScores:
    """The queries of one dataset in the mixed pool.

    `by_query` and `chance` are metric -> score of each query, `[Q]`, and what a random first candidate expects. The
    metrics are `HIT`, 1 where the first candidate is relevant, and `ASKED_MODALITY`, 1 where it has the modality of a
    relevant one. `ROUTED_HIT` is `HIT` among the candidates of the modalities that the dataset asks for. There are
    `num_routed` of these. `pool` has the scores of all datasets together, and `places` `[Q]` are those of the queries
    in it.
    """

    by_query: dict[str, FloatArray]
    chance: dict[str, float]
    pool: DatasetScores
    places: IntArray
    num_routed: int

    @property
    def num_candidates(self) -> int:
        """Return the size of the pool."""
        return self.pool.num_candidates

    def candidates_of(self, metric: str) -> int:
        """Return how many candidates a metric ranks."""
        return self.num_routed if metric == ROUTED_HIT else self.num_candidates

    @property
    def means(self) -> dict[str, float]:
        """Return metric -> mean over the queries."""
        return {metric: float(values.mean()) for metric, values in self.by_query.items()}


def score_mixed_pool(
    joined: JoinedDatasets, queries: Vectors, candidates: Vectors, device: str = ""
) -> dict[str, MixedScores]:
    """Return the scores of each dataset by name. Memory, ties and errors are those of `score_dataset`."""
    kinds = _kinds(joined)
    scored, routed = (
        score_dataset(
            joined.dataset,
            queries,
            candidates,
            pool=joined.pool,
            kinds=limit,
            num_top=NUM_TOP,
            device=device,
            collapse_is_error=False,
        )
        for limit in (None, kinds)
    )
    by_query = {
        HIT: scored.by_query["hit@1"],
        ASKED_MODALITY: finds_target_modality(scored),
        ROUTED_HIT: routed.by_query["hit@1"],
    }
    chance = _chance(scored, joined, kinds)
    return {
        name: MixedScores(
            {metric: values[places] for metric, values in by_query.items()},
            {metric: float(values[places].mean()) for metric, values in chance.items()},
            scored,
            places,
            sum(joined.modalities[kind] for kind in joined.asked[name]),
        )
        for name, places in joined.places.items()
    }


def mixed_means(scores: Mapping[str, MixedScores]) -> dict[str, dict[str, float]]:
    """Return dataset -> metric -> its mean over the queries; last, under `mean`, the plain means over the datasets."""
    means = {name: one.means for name, one in scores.items()}
    return means | {MEAN: {metric: float(np.mean([one[metric] for one in means.values()])) for metric in METRICS}}


def describe_mixed(scores: Mapping[str, MixedScores]) -> str:
    """Return one line: the means over the datasets, and the size of the pool."""
    mean = mixed_means(scores)[MEAN]
    size = next(iter(scores.values())).num_candidates
    means = ", ".join(f"{metric.replace('_', ' ')} {100 * mean[metric]:.1f}" for metric in METRICS)
    return f"{means} ({size:,} candidates)"


def compare_mixed(
    first: Mapping[str, MixedScores], second: Mapping[str, MixedScores]
) -> dict[str, dict[str, Difference]]:
    """Return metric -> its difference on each dataset that both have, and of the mean, as `comparison.compare` does."""
    both = [name for name in first if name in second]
    return {
        metric: paired_intervals({name: second[name].by_query[metric] - first[name].by_query[metric] for name in both})
        for metric in METRICS
    }


def mixed_table(scores: Mapping[str, Mapping[str, MixedScores]]) -> str:
    """Return Markdown in percent: datasets down, models across, with the metrics of each."""
    means = {model: mixed_means(some) for model, some in scores.items()}
    first = next(iter(scores.values()))
    size = next(iter(first.values())).num_candidates
    head = [f"one pool of {size:,}", *(f"{escape_markdown(model)}, {metric}" for model in means for metric in METRICS)]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name in dict.fromkeys(name for some in means.values() for name in some):
        cells = [means[model].get(name, {}).get(metric) for model in means for metric in METRICS]
        lines.append([escape_markdown(name), *("–" if value is None else f"{100 * value:.1f}" for value in cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _kinds(joined: JoinedDatasets) -> Kinds:
    """Return the modalities that each query asks for: those of the candidates of its datasets."""
    asked_QM = np.zeros((len(joined.dataset.queries), len(joined.modalities)), dtype=np.bool_)
    for name, places in joined.places.items():
        asked_QM[places] |= np.array([kind in joined.asked[name] for kind in joined.modalities])
    return Kinds(joined.modality_N, asked_QM)


def _chance(scored: DatasetScores, joined: JoinedDatasets, asked: Kinds) -> dict[str, FloatArray]:
    """Return what each query, `[Q]`, expects of a random candidate that it does not exclude."""
    num_relevant = scored.relevant.count()
    kinds = [{scored.modalities[row] for row in mine} for mine in _rows_by_query(scored.relevant)]
    modality = np.array([sum(joined.modalities[kind] for kind in some) for some in kinds])
    excluded_QM = _excluded(joined)
    counts_M = np.array(list(joined.modalities.values()))
    left = len(joined.pool.ids) - excluded_QM.sum(axis=1)
    routed = asked.asked_QM * (counts_M - excluded_QM)
    return {
        HIT: num_relevant / left,
        ASKED_MODALITY: modality / len(joined.pool.ids),
        ROUTED_HIT: num_relevant / routed.sum(axis=1),
    }


def _excluded(joined: JoinedDatasets) -> IntArray:
    """Return how many candidates of each modality each query excludes, `[Q, M]`."""
    counts_QM = np.zeros((len(joined.dataset.queries), len(joined.modalities)), dtype=np.int64)
    order = np.argsort(joined.pool.ids)
    for number, query in enumerate(joined.dataset.queries):
        places = order[np.searchsorted(joined.pool.ids, as_ids(query.excluded), sorter=order)]
        np.add.at(counts_QM[number], joined.modality_N[places], 1)
    return counts_QM


def _rows_by_query(relevant: Relevant) -> list[list[int]]:
    bounds: IntArray = np.searchsorted(relevant.query, np.arange(relevant.num_queries + 1))
    return [relevant.row[first:last].tolist() for first, last in pairwise(bounds.tolist())]
