"""Two models on the same queries: the difference of their scores, and how far another draw of queries would move it.

The interval is that of the paired bootstrap. Queries are drawn with replacement, the same for both models. The middle
95% of the differences is kept. For the mean over datasets, the queries of each are drawn by themselves. The interval
says nothing about seeds of training (`ablation.py` does).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipelines.errors import UserError
from pipelines.redaction import escape_markdown
from rzen.evaluation.dataset_scores import DatasetScores
from rzen.evaluation.vectors import NONE, FloatArray

MEAN = "mean"
_DRAWN_AT_ONCE = 4_000_000


@dataclass(frozen=True, slots=True)
class Difference:
    """The second minus the first score, and its 95% interval."""

    mean: float
    low: float
    high: float
    num_queries: int


def compare(
    first: Mapping[str, DatasetScores], second: Mapping[str, DatasetScores], *, num_draws: int = 2000, seed: int = 0
) -> dict[str, Difference]:
    """Return the difference on every dataset that both have, on the metric that counts. Last, under `mean`: their mean.

    Raises `UserError` for models that were asked different queries, and for nothing in common.
    """
    differences = {name: _differences(first[name], second[name]) for name in first if name in second}
    if not differences:
        raise UserError("comparison", "the two models have no dataset in common", "score both on one")
    return paired_intervals(differences, num_draws=num_draws, seed=seed)


def paired_intervals(
    differences: Mapping[str, FloatArray], *, num_draws: int = 2000, seed: int = 0
) -> dict[str, Difference]:
    """Means of differences by query ([Q]) of every dataset; last, under `mean`, their plain mean."""
    rng = np.random.default_rng(seed)
    drawn = {name: _drawn_means(values, num_draws, rng) for name, values in differences.items()}
    found = {name: _interval(values.mean(), drawn[name], len(values)) for name, values in differences.items()}
    means = np.mean([values.mean() for values in differences.values()])
    total = sum(map(len, differences.values()))
    return {**found, MEAN: _interval(float(means), np.mean(list(drawn.values()), axis=0), total)}


def instruction_sensitivity(with_instruction: DatasetScores, without: DatasetScores) -> tuple[Difference, float]:
    """Return what the instructions of queries gain, and the share of queries whose first candidate they change."""
    name = with_instruction.dataset.row.name
    gained = compare({name: without}, {name: with_instruction})[name]
    changed = [before != after for before, after in zip(_first(without), _first(with_instruction), strict=True)]
    return gained, float(np.mean(changed))


def modality_gap(queries_QD: FloatArray, candidates_ND: FloatArray) -> float:
    """Return the distance between the mean vectors of queries and candidates, from 0 to 2.

    It is how far apart a model keeps them for what they are, not for what they say (Liang et al. 2022).
    """
    means = [vectors.mean(axis=0, dtype=np.float64) for vectors in (queries_QD, candidates_ND)]
    return float(np.linalg.norm(means[0] - means[1]))


def finds_target_modality(scored: DatasetScores) -> FloatArray:
    """Return for each query, `[Q]`, 1 where its first candidate has the modality of a relevant one, else 0.

    In mixed pools, a model may find the wrong kind of thing.
    """
    wanted: list[set[str]] = [set() for _ in scored.dataset.queries]
    for query, row in zip(scored.relevant.query, scored.relevant.row, strict=True):
        wanted[query].add(scored.modalities[int(row)])
    first = scored.ranked.rows[:, 0]
    right = [row != NONE and scored.modalities[int(row)] in kinds for row, kinds in zip(first, wanted, strict=True)]
    return np.array(right, dtype=np.float64)


def comparison_table(differences: Mapping[str, Difference], first: str, second: str, title: str = "dataset") -> str:
    """Markdown, in points; bold where 0 is outside the interval. `title` heads the column of the datasets."""
    lines = [f"| {title} | queries | {escape_markdown(second)} - {escape_markdown(first)} |", "| --- | ---: | ---: |"]
    for name, one in differences.items():
        text = f"{100 * one.mean:+.1f} [{100 * one.low:+.1f}, {100 * one.high:+.1f}]"
        text = f"**{text}**" if one.low > 0 or one.high < 0 else text
        lines.append(f"| {escape_markdown(name)} | {one.num_queries:,} | {text} |")
    return "\n".join(lines) + "\n"


def _differences(first: DatasetScores, second: DatasetScores) -> FloatArray:
    row = first.dataset.row
    if _asked(first) != _asked(second):
        raise UserError(row.name, "the two models were asked different queries", "score both on the same files")
    return second.by_query[row.metric] - first.by_query[row.metric]


def _first(scored: DatasetScores) -> list[str]:
    return [scored.names.get(int(row), "") for row in scored.ranked.rows[:, 0]]


def _asked(scored: DatasetScores) -> Sequence[str]:
    return [query.item.name for query in scored.dataset.queries]


def _drawn_means(values_Q: FloatArray, num_draws: int, rng: np.random.Generator) -> FloatArray:
    """Means of so many draws of as many values, with replacement."""
    at_once = max(1, _DRAWN_AT_ONCE // len(values_Q))
    return np.concatenate(
        [
            values_Q[rng.integers(len(values_Q), size=(min(at_once, num_draws - done), len(values_Q)))].mean(axis=1)
            for done in range(0, num_draws, at_once)
        ]
    )


def _interval(mean: float, drawn: FloatArray, num_queries: int) -> Difference:
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Difference(float(mean), float(low), float(high), num_queries)
