"""The look of our plots, as SVG text that is the same every time."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colors, told apart by the color-blind; pure greys, which a page may recolor for a dark background.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, QUIET, FAINT = "#333333", "#777777", "#dddddd"
STYLE = {
    "svg.hashsalt": "rzen",  # equal plots are equal bytes
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": QUIET,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": QUIET,
    "ytick.labelcolor": INK,
    "lines.linewidth": 1.2,
}
_PANELS_PER_ROW = 4

Panel = TypeVar("Panel")


def plot_panels(
    panels: Sequence[Panel], rows: Sequence[str], draw: Callable[[Axes, Panel], None], title: str, xlabel: str = ""
) -> str:
    """Draw small multiples: a panel for each of `panels`, with a line for each of `rows` and its name at the left.

    `draw(axes, panel)` fills a panel; row i is at height i. `title` is for readers who cannot see the plot.
    """
    num_across = min(len(panels), _PANELS_PER_ROW)
    num_down = math.ceil(len(panels) / _PANELS_PER_ROW)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.4 + 2.1 * num_across, num_down * (0.8 + 0.26 * len(rows))), layout="constrained")
        grid = list(figure.subplots(num_down, num_across, squeeze=False, sharey=True).flat)
        for axes, panel in zip(grid, panels, strict=False):
            draw(axes, panel)
            axes.set_yticks(range(len(rows)), rows)
            axes.set_ylim(len(rows) - 0.4, -0.6)
            axes.tick_params(length=0)
            axes.spines[["left", "bottom"]].set_visible(False)
        for axes in grid[len(panels) :]:
            axes.remove()
        figure.supxlabel(xlabel, fontsize=9, color=QUIET)
        return svg_text(figure, title)


def draw_bars(axes: Axes, values: Sequence[float | None], label: Callable[[float], str], title: str) -> None:
    """A thin bar in each row of a panel, with its number, on a scale of percent; `values` in [0, 1]."""
    for height, (value, color) in enumerate(zip(values, colors(len(values)), strict=True)):
        if value is not None:
            axes.plot([0, 100 * value], [height, height], color=color, linewidth=4, solid_capstyle="butt")
            axes.annotate(label(value), (100 * value, height), (4, 0), textcoords="offset points", va="center")
    axes.set_title(title, loc="left", fontsize=9, color=INK)
    axes.set_xlim(0, 118)
    axes.set_xticks([0, 50, 100])


def colors(count: int) -> list[str]:
    """Return `count` colors, repeated where there are not enough."""
    return [COLORS[index % len(COLORS)] for index in range(count)]


def svg_text(figure: Figure, title: str) -> str:
    """The figure as an SVG element; equal figures give equal text."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", facecolor="white", metadata={"Title": title, "Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
