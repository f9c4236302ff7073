"""The page of several runs and soups: what differs, how each of them did, and each soup against its parents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rzen.evaluation.comparison import Difference
from rzen.report.render import render_html
from rzen.report.thumbnails import ThumbnailPool


@dataclass(frozen=True, slots=True)
class SweepRow:
    """A run or a soup, which has a `note` of what it is made of.

    `settings` has a value for each of the page's settings, and `figures` for each of its figures.

    `scores` maps a column of the page to the score in [0, 1] with its 95% interval over the queries.
    """

    name: str
    note: str
    settings: Sequence[str]
    figures: Sequence[str]
    scores: Mapping[str, Difference]


@dataclass(frozen=True, slots=True)
class SweepReport:
    """What the page shows. `columns` are the tasks with their metric, and at last their mean.

    `comparisons` has soup -> parent -> column -> the score of the soup minus that of the parent. `notes` say what a
    reader must know of the scores. `refresh_s` is after how many seconds a browser reads the page again, and 0 for
    never.
    """

    title: str
    lead: str
    settings: Sequence[str]
    figures: Sequence[str]
    columns: Sequence[str]
    rows: Sequence[SweepRow]
    comparisons: Mapping[str, Mapping[str, Mapping[str, Difference]]]
    notes: Sequence[str]
    plots: Mapping[str, str]
    facts: Mapping[str, str]
    refresh_s: int = 0


def render_sweep(report: SweepReport) -> bytes:
    """Return the page, as `render_html`."""
    best = {
        column: max((row.scores[column].mean for row in report.rows if column in row.scores), default=None)
        for column in report.columns
    }
    return render_html(
        "sweep.html.jinja",
        title=report.title,
        sections={
            "runs": report.rows,
            "parents": report.comparisons,
            "plots": report.plots,
            "settings": report.facts,
        },
        report=report,
        best=best,
        plots=report.plots,
        facts=report.facts,
        pool=ThumbnailPool(),
        refresh_s=report.refresh_s,
    )
