"""The page of a curation: what each rule left out of each source, weights, and examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from rich.table import Table
from rich.text import Text

from rzen.report.histograms import count_bins, histogram_svg
from rzen.report.hits import Hit
from rzen.report.render import make_card, render_html
from rzen.report.thumbnails import ThumbnailPool

REASONS = {
    "exact_pair": "An earlier sample has the same query and target.",
    "exact_target": "An earlier sample has the same target.",
    "bad_media": "A file cannot be decoded.",
    "small_media": "A picture is smaller than the limit. The value is its shorter side in pixels.",
    "long_media": "A picture is longer than the limit. The value is the ratio of its sides.",
    "short_text": "A text is shorter than the limit. The value is its length in characters.",
    "long_text": "A text is longer than the limit. The value is its length in characters.",
    "other_language": "A text is in another language. The value says how sure the detector is.",
    "near_media": "A sample that was kept shows nearly the same, with texts that are similar.",
    "near_text": "A sample that was kept has nearly the same texts.",
    "leak_file": "An evaluation set has the same file.",
    "leak_media": "An evaluation set shows nearly the same.",
    "leak_text": "A text has many words in a row in common with an evaluation set.",
    "misaligned": "Query and target do not fit together. The value is their cosine.",
    "semantic_duplicate": "The target means nearly the same as that of another sample. The value is their cosine.",
    "full_cluster": "The cluster has more samples than the limit. The value is their number.",
}
"""Reason -> what it says, in the order of the rules."""


@dataclass(frozen=True, slots=True)
class DropExample:
    """A sample that was left out: its name, what it resembles, what was measured, and the inputs of both."""

    name: str
    other: str
    value: float
    inputs: Sequence[Hit]


@dataclass(frozen=True, slots=True, eq=False)
class SourceWeights:
    """The weights below 1 of a source: `[P]`, above 0. An epoch takes `per_epoch` of these samples."""

    weights: npt.NDArray[np.float32]
    per_epoch: int


@dataclass(frozen=True, slots=True)
class ClusterExample:
    """A full cluster: its size, sources and weight, and what some of its targets show."""

    num_samples: int
    sources: Sequence[str]
    weight: float
    targets: Sequence[Hit]


@dataclass(frozen=True, slots=True)
class CurationReport:
    """What the page shows. `samples` are those of each source, `dropped` is reason -> source -> number.

    `num_clusters` are full, and `clusters` some of them.
    """

    title: str
    samples: Mapping[str, int]
    dropped: Mapping[str, Mapping[str, int]]
    compared_with: Mapping[str, int]
    examples: Mapping[str, Sequence[DropExample]]
    facts: Mapping[str, str]
    weights: Mapping[str, SourceWeights] = field(default_factory=dict)
    num_clusters: int = 0
    clusters: Sequence[ClusterExample] = ()


def render_curation(report: CurationReport) -> bytes:
    """Return the page, as `render_html`."""
    pool = ThumbnailPool()
    examples = {
        reason: [(example, [make_card(hit, pool) for hit in example.inputs]) for example in some]
        for reason, some in report.examples.items()
    }
    clusters = [(some, [make_card(hit, pool) for hit in some.targets]) for some in report.clusters]
    weights = {name: _weights_row(some) for name, some in report.weights.items()}
    plots = {
        f"Weights, {name}": histogram_svg(
            {"samples with a weight": count_bins(some.weights, (0.0, 1.0))},
            (0.0, 1.0),
            "weight: share of the epochs that take a sample",
            "histogram of weights",
        )
        for name, some in report.weights.items()
    }
    return render_html(
        "curation.html.jinja",
        title=report.title,
        sections={
            "counts": report.samples,
            "weights": weights,
            "compared": report.compared_with,
            "examples": examples,
            "plots": plots,
            "settings": report.facts,
        },
        report=report,
        reasons=REASONS,
        examples=examples,
        weights=weights,
        clusters=clusters,
        plots=plots,
        facts=report.facts,
        pool=pool,
    )


def _weights_row(some: SourceWeights) -> dict[str, float]:
    lowest, median, highest = np.quantile(some.weights, [0, 0.5, 1]).tolist()
    return {
        "samples": len(some.weights),
        "per_epoch": some.per_epoch,
        "lowest": lowest,
        "median": median,
        "highest": highest,
    }


def counts_table(samples: Mapping[str, int], dropped: Mapping[str, Mapping[str, int]]) -> Table:
    """Return the counts as a table for `rich.console.Console.print`: a row a reason, a column a source.

    `samples` are those of each source, `dropped` is reason -> source -> number.
    """
    table = Table(box=None, pad_edge=False)
    table.add_column("left out for")
    sources = [name for name in samples if any(name in some for some in dropped.values())]
    for name in [*sources, "all"]:
        table.add_column(Text(name), justify="right")
    for reason, found in dropped.items():
        counts = [found.get(name, 0) for name in sources]
        table.add_row(reason, *(f"{count:,}" for count in [*counts, sum(found.values())]))
    return table
