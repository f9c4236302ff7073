"""The page of a training run: where it is, how it learns, what it finds, what it was started with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rzen.report.hits import Hit, Search
from rzen.report.render import make_card, make_query_card, render_html
from rzen.report.thumbnails import ThumbnailPool


@dataclass(frozen=True, slots=True)
class HeldOutLine:
    """Held-out scores of a source: before training, now and at best, in [0, 1]. `low` and `high` bound that of now."""

    name: str
    num_queries: int
    num_candidates: int
    first: float
    last: float
    best: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Answer:
    """A held-out query and the first candidate for it, at the first and at the last score, with their verdicts."""

    verdict: str
    search: Search


@dataclass(frozen=True, slots=True)
class RunReport:
    """What the page of a run shows. Every number in it comes from the records of the run.

    `figures` are what a reader wants to know first. `changes` are (setting, value in `recipe`, value here). `commands`
    maps what one may do next to what to type. `refresh_s` is after how many seconds a browser reads the page again, and
    0 for a run that does not change any more.
    """

    title: str
    lead: str
    figures: Mapping[str, str]
    steps: tuple[int, int] | None
    held_out: Sequence[HeldOutLine]
    answers: Sequence[Answer]
    samples: Sequence[Search]
    plots: Mapping[str, str]
    recipe: str
    changes: Sequence[tuple[str, str, str]]
    commands: Mapping[str, str]
    log: Sequence[str]
    facts: Mapping[str, str]
    refresh_s: int = 0


def render_run(report: RunReport) -> bytes:
    """Return the page, as `render_html`."""
    pool = ThumbnailPool()
    return render_html(
        "run.html.jinja",
        title=report.title,
        sections={
            "progress": report.figures,
            "held-out": report.held_out,
            "plots": report.plots,
            "answers": report.answers,
            "samples": report.samples,
            "changes": report.changes,
            "next": report.commands,
            "log": report.log,
            "settings": report.facts,
        },
        report=report,
        answers=[(answer.verdict, _sheet(answer.search, pool)) for answer in report.answers],
        samples=[_sheet(search, pool) for search in report.samples],
        plots=report.plots,
        facts=report.facts,
        refresh_s=report.refresh_s,
        pool=pool,
    )


def _sheet(search: Search, pool: ThumbnailPool) -> tuple[str, object, list[object]]:
    """Return the query, what it shows as a card of its own, and the cards of its hits."""
    hits: list[Hit] = search.hits
    return search.query, make_query_card(search, pool), [make_card(hit, pool) for hit in hits]
