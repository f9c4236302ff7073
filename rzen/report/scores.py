"""The rows of results.json as tables: models down, tasks and metrics across."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Cell:
    """One number. `best` is true for the highest of its column, unless the whole column is equal."""

    value: float
    chance: float | None
    best: bool


@dataclass(frozen=True, slots=True)
class Task:
    """A group of columns: readable name, metrics, and how much was ranked for how many queries."""

    label: str
    metrics: tuple[str, ...]
    num_queries: str
    num_candidates: str


@dataclass(frozen=True, slots=True)
class ScoreTable:
    """The rows of one split. `models` maps a model to one cell (or None) a column, `chance` has one a column.

    `interval` is half the width of the widest 95% interval that a hit rate of this table can have. In a `mixed` table,
    the targets of all tasks are the candidates.
    """

    in_sample: bool
    mixed: bool
    tasks: list[Task]
    models: dict[str, list[Cell | None]]
    chance: list[float | None]
    interval: float


def score_tables(rows: Sequence[Row]) -> list[ScoreTable]:
    """Tables of what was held out, then of what was trained on (`split` is `train`): own pools, then the mixed one."""
    tables = []
    for in_sample, mixed in product((False, True), repeat=2):
        part = [row for row in rows if (row.get("split") == "train", row.get("pool") == "mixed") == (in_sample, mixed)]
        tables += [_table(part, in_sample, mixed)] if part else []
    return tables


def hit_interval(share: float, count: int) -> tuple[float, float]:
    """Return the 95% interval of a share of `count` queries (Wilson's)."""
    z_2 = 1.96**2
    center = (share + z_2 / (2 * count)) / (1 + z_2 / count)
    half = 1.96 * math.sqrt(share * (1 - share) / count + z_2 / (4 * count**2)) / (1 + z_2 / count)
    return max(0.0, center - half), min(1.0, center + half)


def task_label(task: str) -> str:
    """`image_text_image` becomes `image + text → image`; the last word is what is searched."""
    *query, target = task.split("_")
    return f"{' + '.join(query)} → {target}" if query else target


def _table(rows: Sequence[Row], in_sample: bool, mixed: bool) -> ScoreTable:
    metrics = {
        task: tuple(_distinct(row["metric"] for row in rows if row["task"] == task))
        for task in _distinct(row["task"] for row in rows)
    }
    columns = [
        {row["model"]: row for row in rows if (row["task"], row["metric"]) == (task, metric)}
        for task, names in metrics.items()
        for metric in names
    ]
    return ScoreTable(
        in_sample=in_sample,
        mixed=mixed,
        tasks=[_task(task, names, rows) for task, names in metrics.items()],
        models={
            model: [_cell(column, model) for column in columns] for model in _distinct(row["model"] for row in rows)
        },
        chance=[next((row["chance"] for row in column.values() if "chance" in row), None) for column in columns],
        interval=0.98 / math.sqrt(min(row["num_queries"] for row in rows)),  # 1.96 * sqrt(p (1 - p) / n) at p = 1/2
    )


def _task(task: str, metrics: tuple[str, ...], rows: Sequence[Row]) -> Task:
    own = [row for row in rows if row["task"] == task]
    return Task(task_label(task), metrics, _span(own, "num_queries"), _span(own, "num_candidates"))


def _cell(column: Mapping[str, Row], model: str) -> Cell | None:
    if model not in column:
        return None
    row = column[model]
    values = [other["value"] for other in column.values()]
    return Cell(row["value"], row.get("chance"), best=row["value"] == max(values) > min(values))


def _span(rows: Sequence[Row], name: str) -> str:
    """`120`, or `96–120` where the rows differ."""
    low, high = min(row[name] for row in rows), max(row[name] for row in rows)
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def _distinct(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
