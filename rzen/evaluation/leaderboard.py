"""Where a model stands on a benchmark: every dataset of the table, meta-tasks, the mean, and what was not measured.

The official mean is the plain mean over all datasets of the table. One that is missing, failed or lacks queries is
named and scored as 0. The mean of the others is next to it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from pipelines.benchmarks.types import Row
from pipelines.redaction import escape_markdown
from rzen.evaluation.figures import draw_bars, plot_panels
from rzen.evaluation.results import write_json

Scores = Mapping[str, float | int]
"""The content of a `{dataset}_score.json`."""


@dataclass(frozen=True, slots=True)
class DatasetScore:
    """A dataset: the score that counts, or None; `problem` says why it counts 0, and is empty where it counts."""

    row: Row
    value: float | None
    num_queries: int
    problem: str

    @property
    def official(self) -> float:
        return 0.0 if self.value is None or self.problem else self.value


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over `num_datasets`. `num_counted` of them count; `of_counted` is their own mean, None without any."""

    name: str
    official: float
    of_counted: float | None
    num_counted: int
    num_datasets: int


def build_leaderboard(
    rows: Iterable[Row], scores: Mapping[str, Scores], problems: Mapping[str, str]
) -> list[DatasetScore]:
    """A line for every row; `problems` holds a line of text for the datasets that could not be scored."""
    lines = []
    for row in rows:
        if row.name not in scores:
            lines.append(DatasetScore(row, None, 0, problems.get(row.name, "was not scored")))
            continue
        found = int(scores[row.name]["num_data"])
        complete = row.num_queries in (None, found)
        problem = "" if complete else f"{found} of {row.num_queries} queries"
        lines.append(DatasetScore(row, float(scores[row.name][row.metric]), found, problem))
    return lines


def means(lines: Sequence[DatasetScore]) -> list[Mean]:
    """Return the mean of every meta-task, of every modality if there are several, and of all."""
    groups: dict[str, list[DatasetScore]] = {}
    for line in lines:
        groups.setdefault(line.row.meta_task, []).append(line)
    modalities = dict.fromkeys(line.row.modality for line in lines)
    if len(modalities) > 1:
        groups |= {modality: [line for line in lines if line.row.modality == modality] for modality in modalities}
    return [_mean(name, group) for name, group in {**groups, "all": list(lines)}.items()]


def coverage(lines: Sequence[DatasetScore]) -> str:
    """How many datasets count, and one line for each that does not."""
    without = [line for line in lines if line.problem]
    told = [f"{len(lines) - len(without)} of {len(lines)} datasets count; the others count 0 in the official mean"]
    return "\n".join([*told, *(f"  {line.row.name}: {line.problem}" for line in without)]) + "\n"


def markdown(lines: Sequence[DatasetScore]) -> str:
    """Means, then datasets in percent, then what does not count."""
    head = ["", "official mean", "mean of those that count", "datasets"]
    body = [
        [mean.name, _percent(mean.official), _percent(mean.of_counted), f"{mean.num_counted} of {mean.num_datasets}"]
        for mean in means(lines)
    ]
    datasets = [
        [row.name, row.meta_task, row.metric, _percent(line.value), f"{line.num_queries:,}", line.problem]
        for line in lines
        for row in (line.row,)
    ]
    names = ["dataset", "meta-task", "metric", "score", "queries", "counts 0 because"]
    return "\n".join([_grid(head, body), _grid(names, datasets), coverage(lines)])


def terminal(lines: Sequence[DatasetScore]) -> Table:
    """The means, for `rich.console.Console.print`."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("", no_wrap=True)
    for title in ("official mean", "of those that count", "datasets"):
        table.add_column(title, justify="right")
    for mean in means(lines):
        count = f"{mean.num_counted} of {mean.num_datasets}"
        style = "bold" if mean.name == "all" else "" if mean.num_counted else "dim"
        table.add_row(Text(mean.name), _percent(mean.official), _percent(mean.of_counted), count, style=style)
    return table


def side_by_side(leaderboards: Mapping[str, Sequence[DatasetScore]]) -> str:
    """Markdown: models down, official means across. Raises `ValueError` for models with other datasets."""
    table = _official(leaderboards)
    head = ["model", *next(iter(table.values())), "datasets"]
    body = []
    for model, values in table.items():
        counted = means(leaderboards[model])[-1]
        count = f"{counted.num_counted} of {counted.num_datasets}"
        body.append([model, *map(_percent, values.values()), count])
    return _grid(head, body)


def plot_means(leaderboards: Mapping[str, Sequence[DatasetScore]]) -> str:
    """One panel for each mean, one thin bar for each model: official means in percent. SVG, the same every time."""
    table = _official(leaderboards)
    models, names = list(table), list(next(iter(table.values())))
    return plot_panels(
        names,
        models,
        lambda axes, name: draw_bars(axes, [values[name] for values in table.values()], _percent, name),
        "Official means by meta-task and model",
    )


def write_leaderboard(path: Path, lines: Sequence[DatasetScore], settings: Mapping[str, Any]) -> None:
    """Write `{settings, means, datasets}` as JSON, and the tables as Markdown next to it.

    `settings` is whatever makes the numbers repeatable: model, prompt, frames, pixels, versions, revision.
    """
    datasets = [
        {**asdict(line.row), "score": line.value, "queries_found": line.num_queries, "problem": line.problem}
        for line in lines
    ]
    content = {"settings": settings, "means": [asdict(mean) for mean in means(lines)], "datasets": datasets}
    write_json(path, content)
    path.with_suffix(".md").write_text(markdown(lines), encoding="utf-8")


def _official(leaderboards: Mapping[str, Sequence[DatasetScore]]) -> dict[str, dict[str, float]]:
    """Model -> name of the mean -> its value."""
    first = next(iter(leaderboards))
    for model, lines in leaderboards.items():
        if [line.row.name for line in lines] != [line.row.name for line in leaderboards[first]]:
            raise ValueError(f"{model} was not measured on the datasets of {first}")
    return {model: {mean.name: mean.official for mean in means(lines)} for model, lines in leaderboards.items()}


def _mean(name: str, lines: Sequence[DatasetScore]) -> Mean:
    counted = [line.official for line in lines if not line.problem]
    official = statistics.fmean(line.official for line in lines)
    return Mean(name, official, statistics.fmean(counted) if counted else None, len(counted), len(lines))


def _grid(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(map(escape_markdown, line))} |" for line in lines) + "\n"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
