"""The page of a choice of negatives: what each rule removed, where the scores are, and examples with pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rzen.report.histograms import Counts, count_bins, histogram_svg
from rzen.report.hits import Search
from rzen.report.render import make_card, make_query_card, render_html
from rzen.report.thumbnails import ThumbnailPool

RANGE = (-1.0, 1.0)


@dataclass(frozen=True, slots=True)
class SelectionRow:
    """A source. `removed` and `removed_alone` map each rule to a number of candidates."""

    source: str
    task: str
    samples: int
    dropped: int
    without_negatives: int
    candidates: int
    chosen: int
    removed: Mapping[str, int]
    removed_alone: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class SelectionReport:
    """What the page shows. `histograms` maps a source to counts of cosines for each kind of input, as `histogram`."""

    title: str
    rows: Sequence[SelectionRow]
    rules: Sequence[str]
    histograms: Mapping[str, Mapping[str, Counts]]
    examples: Sequence[Search]
    facts: Mapping[str, str]


def histogram(cosines: npt.NDArray[np.float32]) -> Counts:
    """Return the counts of cosines in equal bins. Unknown ones are left out."""
    return count_bins(cosines, RANGE)


def render_selection(report: SelectionReport) -> bytes:
    """Return the page, as `render_html`."""
    pool = ThumbnailPool()
    examples = [
        (search.query, make_query_card(search, pool), [make_card(hit, pool) for hit in search.hits])
        for search in report.examples
    ]
    plots = {
        f"Cosines with the query, {source}": histogram_svg(some, RANGE, "cosine", "histograms of cosines", cropped=True)
        for source, some in report.histograms.items()
    }
    return render_html(
        "selection.html.jinja",
        title=report.title,
        sections={"rules": report.rows, "plots": plots, "examples": examples, "settings": report.facts},
        report=report,
        examples=examples,
        plots=plots,
        facts=report.facts,
        pool=pool,
    )
