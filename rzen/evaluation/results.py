"""What an evaluation leaves behind: results as JSON, tables for people, and two plots as SVG text."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Group
from rich.table import Table
from rich.text import Text
from typing_extensions import TypedDict

from pipelines.redaction import escape_markdown, redacted
from pipelines.stored_json import stored_file
from rzen.evaluation.figures import FAINT, INK, QUIET, STYLE, colors, draw_bars, plot_panels, svg_text
from rzen.evaluation.tasks import TASKS


@dataclass(frozen=True, slots=True)
class Result:
    """One number: `value` of `metric` in [0, 1], and what random ranking would score (`chance`).

    `num_candidates` are those of the largest pool, where the sources of a task have pools of their own.
    """

    model: str
    task: str
    metric: str
    value: float
    num_queries: int
    num_candidates: int
    chance: float
    split: str = "held_out"
    """`train` marks a number measured on training data, which says little about new data."""
    pool: Literal["task", "mixed"] = "task"
    """Candidates of a query: the targets of its task (or source), or those of all tasks of the evaluation."""


@stored_file
class ResultsFile(TypedDict):
    """`results.json` of an evaluation."""

    settings: dict[str, Any]
    rows: list[Result]
    rerank: NotRequired[dict[str, dict[str, Any]]]
    """Model -> task -> scores before and after re-ranking (`rerank_tables.reranked_json`)."""


MIXED_POOL = "mixed pool"
Column = tuple[str, str, str]
"""Pool, task and metric."""
_MARKED = 30  # points of a curve, below which each of them is marked


def write_results(
    path: Path, rows: Sequence[Result], settings: Mapping[str, Any], reranked: Mapping[str, Any] | None = None
) -> None:
    """Write `{"settings": ..., "rows": [...]}`, atomically. `settings` is whatever makes the numbers repeatable.

    `reranked` is written as `rerank`, if there is any.
    """
    content = {"settings": settings, "rows": [asdict(row) for row in rows]}
    write_json(path, content | ({"rerank": reranked} if reranked else {}))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write readable JSON without secrets, atomically. Raises `ValueError` for a number that is not finite."""
    text = json.dumps(redacted(content), indent=2, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text + "\n")
    partial.replace(path)


def markdown_table(rows: Sequence[Result]) -> str:
    """Models down, tasks across, in percent; the best of a column is bold, the last line is chance.

    A second table has the scores of the mixed pool, if there are any.
    """
    return "\n".join(map(_markdown, _by_pool(rows)))


def _markdown(rows: Sequence[Result]) -> str:
    head, body = _table(rows)
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    lines += [[name, *(f"**{text}**" if best else text for text, best in cells)] for name, cells in body]
    return "\n".join(f"| {' | '.join(map(escape_markdown, line))} |" for line in lines) + "\n"


def terminal_table(rows: Sequence[Result]) -> Group:
    """The same tables for `rich.console.Console.print`."""
    return Group(*map(_terminal, _by_pool(rows)))


def _by_pool(rows: Sequence[Result]) -> list[list[Result]]:
    """Rows of the own pools, then those of the mixed pool."""
    pools = [[row for row in rows if row.pool == pool] for pool in ("task", "mixed")]
    return [some for some in pools if some]


def _terminal(rows: Sequence[Result]) -> Table:
    head, body = _table(rows)
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(head[0], no_wrap=True)
    for title in head[1:]:
        table.add_column(Text(title), justify="right")
    for name, cells in body:
        style = "dim" if name == "chance" else ""
        table.add_row(Text(name), *(Text(text, "bold" if best else "") for text, best in cells), style=style)
    return table


def plot_scores(rows: Sequence[Result]) -> str:
    """One panel per task and metric, one thin bar per model, a dotted line at chance. SVG text, the same every time.

    The mixed pool has its panels after those of the own pools.
    """
    models, columns, found = _index([row for some in _by_pool(rows) for row in some])
    return plot_panels(
        columns,
        models,
        lambda axes, column: _draw_scores(axes, models, column, found),
        "Retrieval scores by task and model",
    )


def plot_losses(curves: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Loss over steps, as `plot_curves`."""
    return plot_curves(curves, "loss", "Training loss by step")


def plot_curves(curves: Mapping[str, Sequence[tuple[int, float]]], label: str, title: str) -> str:
    """A value over steps, one thin line per curve, its name at its end if there are several. SVG text, the same every
    time. The axis has 0 on it, and starts there if no value is negative.

    `curves` maps a name to its (step, value) pairs in order of steps; at least one curve, none of them empty. `title`
    is for readers who cannot see the plot.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.2), layout="constrained")
        axes = figure.subplots()
        lowest = min(value for curve in curves.values() for _, value in curve)
        for (steps, values), color in zip(_columns(curves), colors(len(curves)), strict=True):
            axes.plot(steps, values, color=color, marker="." if len(steps) < _MARKED else "")
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 0) if lowest < 0 else 0, max(high, 0))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("step")
        axes.set_title(label, loc="left", fontsize=9, color=QUIET)
        axes.grid(axis="y", color=FAINT, linewidth=0.5)
        axes.tick_params(length=0, labelcolor=QUIET)
        axes.margins(x=0)
        if len(curves) > 1:
            _label_ends(axes, curves)
        return svg_text(figure, title)


def _index(rows: Sequence[Result]) -> tuple[list[str], list[Column], dict[tuple[str, Column], Result]]:
    """Models and columns in order of first appearance, and the result of each pair. Two for one pair is an error."""
    found: dict[tuple[str, Column], Result] = {}
    for row in rows:
        key = (row.model, (row.pool, row.task, row.metric))
        if key in found:
            raise ValueError(f"two results of {row.model} on {row.task} {row.metric}")
        found[key] = row
    return list(dict.fromkeys(m for m, _ in found)), list(dict.fromkeys(c for _, c in found)), found


def _table(rows: Sequence[Result]) -> tuple[list[str], list[tuple[str, list[tuple[str, bool]]]]]:
    """Header, and per line its name and cells: text, and whether it is the best of several."""
    models, columns, found = _index(rows)
    best = {column: max(row.value for (_, c), row in found.items() if c == column) for column in columns}
    body = []
    for model in models:
        cells = []
        for column in columns:
            row = found.get((model, column))
            is_best = row is not None and len(models) > 1 and row.value == best[column]
            cells.append((_percent(row.value) if row else "–", is_best))
        body.append((model, cells))
    body.append(("chance", [(_percent(_chance(column, found)), False) for column in columns]))
    first = f"model ({MIXED_POOL})" if columns[0][0] == "mixed" else "model"
    return [first, *(f"{task_title(task)}, {_metric(metric)}" for _, task, metric in columns)], body


def _draw_scores(axes: Axes, models: list[str], column: Column, found: Mapping[tuple[str, Column], Result]) -> None:
    pool, task, metric = column
    chance = _chance(column, found)
    axes.axvline(100 * chance, color=INK, linewidth=0.8, linestyle=":")
    rows = [found.get((model, column)) for model in models]
    where = f"{MIXED_POOL}: " if pool == "mixed" else ""
    title = f"{task_title(task)}\n{where}{_metric(metric)}, %  ⋮ chance {_percent(chance)}"
    draw_bars(axes, [row.value if row else None for row in rows], _percent, title)


def _label_ends(axes: Axes, curves: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """Names right of the lines' ends, pushed apart where they would overlap."""
    low, high = axes.get_ylim()
    line_height = 0.065 * (high - low)
    right = max(step for curve in curves.values() for step, _ in curve)
    color_of = dict(zip(curves, colors(len(curves)), strict=True))
    ends = sorted((curve[-1][1], name) for name, curve in curves.items())
    height = -math.inf
    for loss, name in ends:
        height = max(loss, height + line_height)
        axes.annotate(
            name,
            (right, height),
            (6, 0),
            textcoords="offset points",
            va="center",
            color=color_of[name],
            annotation_clip=False,
        )


def _columns(curves: Mapping[str, Sequence[tuple[int, float]]]) -> list[tuple[list[int], list[float]]]:
    return [([step for step, _ in curve], [loss for _, loss in curve]) for curve in curves.values()]


def _chance(column: Column, found: Mapping[tuple[str, Column], Result]) -> float:
    return next(row.chance for (_, c), row in found.items() if c == column)


def task_title(task: str) -> str:
    """As tables and plots show it."""
    return TASKS[task].title if task in TASKS else task


def _metric(metric: str) -> str:
    return metric.replace("ndcg", "nDCG").replace("mrr", "MRR").replace("_", " ")


def _percent(value: float) -> str:
    """With one decimal; chance of large pools keeps two digits."""
    return f"{100 * value:.2f}" if 0 < value < 0.01 else f"{100 * value:.1f}"
