"""Histograms of numbers, as counts that can be added, and as plots of a page."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from rzen.evaluation.figures import COLORS, STYLE, svg_text

NUM_BINS = 40
Counts = npt.NDArray[np.int64]
"""Numbers in each bin, `[NUM_BINS]`."""


def count_bins(values: npt.NDArray[np.float32], limits: tuple[float, float]) -> Counts:
    """Return how many values are in each of `NUM_BINS` equal bins. The outer ones take what is beyond."""
    known = values[~np.isnan(values)]
    return np.histogram(np.clip(known, *limits), NUM_BINS, limits)[0].astype(np.int64)


def histogram_svg(
    kinds: Mapping[str, Counts], limits: tuple[float, float], xlabel: str, title: str, *, cropped: bool = False
) -> str:
    """Draw the share of each bin as steps, a color for each kind. `title` is for readers who cannot see the plot.

    A cropped plot ends where the bins are empty.
    """
    edges = np.linspace(*limits, NUM_BINS + 1)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6, 2.4), layout="constrained")
        axes = figure.subplots()
        for (kind, counts), color in zip(kinds.items(), COLORS, strict=False):
            axes.stairs(counts / max(1, counts.sum()), edges, color=color, label=kind, linewidth=1.4)
        filled = np.flatnonzero(np.sum([*kinds.values()], axis=0))
        is_cropped = cropped and len(filled) > 0
        axes.set_xlim(*((edges[filled[0]], edges[filled[-1] + 1]) if is_cropped else limits))
        axes.set_xlabel(xlabel)
        axes.set_ylabel("share")
        axes.legend(frameon=False)
        return svg_text(figure, title)
