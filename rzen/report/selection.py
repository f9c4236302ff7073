"""The page of a choice of negatives: what each rule removed, where the scores are, and examples with pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from rzen.evaluation.figures import COLORS, STYLE, svg_text
from rzen.report.hits import Search
from rzen.report.render import make_card, make_query_card, render_html
from rzen.report.thumbnails import ThumbnailPool

NUM_BINS = 40
RANGE = (-1.0, 1.0)
Counts = npt.NDArray[np.int64]


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
    """What the page shows. `histograms` maps a source to counts of cosines `[NUM_BINS]` for each kind of input."""

    title: str
    rows: Sequence[SelectionRow]
    rules: Sequence[str]
    histograms: Mapping[str, Mapping[str, Counts]]
    examples: Sequence[Search]
    facts: Mapping[str, str]


def histogram(scores: npt.NDArray[np.float32]) -> Counts:
    """Return the counts of cosines in equal bins. Unknown scores are left out."""
    known = scores[~np.isnan(scores)]
    return np.histogram(np.clip(known, *RANGE), NUM_BINS, RANGE)[0].astype(np.int64)


def render_selection(report: SelectionReport) -> bytes:
    """Return the page, as `render_html`."""
    pool = ThumbnailPool()
    examples = [
        (search.query, make_query_card(search, pool), [make_card(hit, pool) for hit in search.hits])
        for search in report.examples
    ]
    plots = {f"Cosines with the query, {source}": _plot(some) for source, some in report.histograms.items()}
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


def _plot(kinds: Mapping[str, Counts]) -> str:
    """Draw the share of each bin as steps, a color for each kind."""
    edges = np.linspace(*RANGE, NUM_BINS + 1)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6, 2.4), layout="constrained")
        axes = figure.subplots()
        for (kind, counts), color in zip(kinds.items(), COLORS, strict=False):
            axes.stairs(counts / max(1, counts.sum()), edges, color=color, label=kind, linewidth=1.4)
        filled = np.flatnonzero(np.sum([*kinds.values()], axis=0))
        if len(filled):
            axes.set_xlim(edges[filled[0]], edges[filled[-1] + 1])
        axes.set_xlabel("cosine")
        axes.set_ylabel("share")
        axes.legend(frameon=False)
        return svg_text(figure, "histograms of cosines")
