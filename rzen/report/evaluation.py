"""The page of a benchmark: means, every dataset, what does not count, differences, and what was answered wrongly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rzen.evaluation.comparison import Difference
from rzen.evaluation.leaderboard import DatasetScore, Mean, means, plot_means
from rzen.evaluation.rerank_tables import RerankLine
from rzen.report.hits import Search
from rzen.report.render import Card, make_card, make_query_card, write_html
from rzen.report.thumbnails import ThumbnailPool


@dataclass(frozen=True, slots=True)
class SuiteReport:
    """One suite. `leaderboards`: model -> a line for each dataset, the same for all models. `comparisons`: model ->
    dataset -> its difference to the model `baseline`. `diagnostics`: model -> dataset -> `modality_gap`,
    `target_modality_accuracy`, `remarks`, optional `changed_by_instruction`. `examples`: model -> dataset -> what it
    answered wrongly. `mixed`: model -> dataset or `mean` -> metric -> its score among the candidates of all datasets.
    `mixed_comparisons`: model -> metric -> dataset -> the difference of these. `mixed_answers`: first and last model ->
    what the same queries find there. `reranked`: model -> a line for each dataset and metric, of models that were
    re-ranked.
    """

    suite: str
    baseline: str
    leaderboards: Mapping[str, Sequence[DatasetScore]]
    comparisons: Mapping[str, Mapping[str, Difference]]
    diagnostics: Mapping[str, Mapping[str, Mapping[str, Any]]]
    examples: Mapping[str, Mapping[str, Sequence[Search]]]
    mixed: Mapping[str, Mapping[str, Mapping[str, float]]]
    mixed_comparisons: Mapping[str, Mapping[str, Mapping[str, Difference]]]
    mixed_answers: Mapping[str, Sequence[Search]]
    reranked: Mapping[str, Sequence[RerankLine]]


@dataclass(frozen=True, slots=True)
class _Example:
    """A wrong answer: the query, what it shows as a card of its own, and the candidates."""

    query: str
    shown: Card | None
    cards: list[Card]


def write_evaluation_report(
    path: Path, *, title: str, reports: Sequence[SuiteReport], facts: Mapping[str, str]
) -> None:
    """As `write_html`. `facts` maps a setting to its value."""
    pool = ThumbnailPool()
    wrong = {
        report.suite: {
            dataset: {
                model: [_example(search, pool) for search in found[dataset]]
                for model, found in report.examples.items()
                if found.get(dataset)
            }
            for dataset in (line.row.name for line in next(iter(report.leaderboards.values())))
            if any(found.get(dataset) for found in report.examples.values())
        }
        for report in reports
    }
    answers = {
        report.suite: [
            dict(zip(report.mixed_answers, (_example(one, pool) for one in same), strict=True))
            for same in zip(*report.mixed_answers.values(), strict=True)
        ]
        for report in reports
        if report.mixed_answers
    }
    write_html(
        path,
        "evaluation.html.jinja",
        title=title,
        sections={
            "scores": reports,
            "searches": answers,
            "plots": reports,
            "examples": any(wrong.values()),
            "settings": facts,
        },
        reports=reports,
        means={report.suite: _means(report.leaderboards) for report in reports},
        problems={report.suite: _problems(report.leaderboards) for report in reports},
        wrong=wrong,
        answers=answers,
        plots={f"{report.suite}: official means in percent": plot_means(report.leaderboards) for report in reports},
        facts=facts,
        pool=pool,
    )


def _means(leaderboards: Mapping[str, Sequence[DatasetScore]]) -> dict[str, list[Mean]]:
    """Name of the mean -> that of each model."""
    columns = [means(lines) for lines in leaderboards.values()]
    return {row[0].name: list(row) for row in zip(*columns, strict=True)}


def _problems(leaderboards: Mapping[str, Sequence[DatasetScore]]) -> dict[str, str]:
    """Dataset -> why it counts 0: of all models, or of each."""
    found = {}
    for lines in zip(*leaderboards.values(), strict=True):
        told = dict(zip(leaderboards, (line.problem for line in lines), strict=True))
        alike = len(set(told.values())) == 1
        each = [f"{model}: {problem}" for model, problem in told.items() if problem]
        found[lines[0].row.name] = lines[0].problem if alike else "; ".join(each)
    return found


def _example(search: Search, pool: ThumbnailPool) -> _Example:
    return _Example(search.query, make_query_card(search, pool), [make_card(hit, pool) for hit in search.hits])
