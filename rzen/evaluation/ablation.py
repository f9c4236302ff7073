"""What an ablation says: mean scores of its variants, paired differences to the baseline, contrasts, tables and plots.

Runs of one seed belong together: they see the same data in the same order. Much of what a seed does is then the same in
both, and cancels in their difference. The interval is that of Student's t over these differences.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from pipelines.redaction import escape_markdown
from rzen.evaluation.figures import FAINT, INK, colors, plot_panels
from rzen.evaluation.results import task_title

MEAN = "mean"
"""Stands among the tasks for the mean over all of them."""
# Two-sided 95% points of Student's t for 1, 2, ... 30 degrees of freedom. Beyond, that of 30 is a little too wide.
_T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)

Scores = Mapping[str, Mapping[int, Mapping[str, float]]]
"""Variant -> seed -> task -> score in [0, 1]. All variants have the same seeds, and all runs the same tasks."""


@dataclass(frozen=True, slots=True)
class Effect:
    """a variant on a task, or on their mean: its mean score over the seeds, and the paired difference to the baseline.

    `low` and `high` bound the 95% interval of the difference; all three are 0 for the baseline itself.
    """

    variant: str
    task: str
    score: float
    difference: float
    low: float
    high: float
    num_seeds: int


@dataclass(frozen=True, slots=True)
class Contrast:
    """A weighted sum of variants on a task, or on their mean, over the seeds. `low` and `high` bound its 95% interval.

    The weights add up to 0: one variant minus another, or an interaction, such as both parts - first - second + none.
    """

    name: str
    task: str
    difference: float
    low: float
    high: float


def effects(scores: Scores, baseline: str) -> list[Effect]:
    """Every variant on every task, the mean of several tasks last. Raises `ValueError` where a run is missing."""
    table = _complete(scores, baseline)
    found = []
    seeds = list(table[baseline])
    for task in _tasks(table):
        for variant, by_seed in table.items():
            differences = [by_seed[seed][task] - table[baseline][seed][task] for seed in seeds]
            score = statistics.fmean(by_seed[seed][task] for seed in seeds)
            found.append(Effect(variant, task, score, *paired_interval(differences), len(seeds)))
    return found


def contrasts(scores: Scores, weights: Mapping[str, Mapping[str, float]]) -> list[Contrast]:
    """Every contrast on every task, the mean of several tasks last. `weights`: contrast -> variant -> weight.

    The sum is taken within each seed. Raises `ValueError` where a run is missing.
    """
    found = []
    for name, parts in weights.items():
        table = _complete({variant: scores[variant] for variant in parts}, next(iter(parts)))
        seeds = list(next(iter(table.values())))
        for task in _tasks(table):
            sums = [
                math.fsum(weight * table[variant][seed][task] for variant, weight in parts.items()) for seed in seeds
            ]
            found.append(Contrast(name, task, *paired_interval(sums)))
    return found


def _complete(scores: Scores, first: str) -> dict[str, dict[int, dict[str, float]]]:
    """Return the scores with the mean of several tasks, seeds ascending. All variants must have those of `first`."""
    table = {
        variant: {seed: _with_mean(by_seed[seed]) for seed in sorted(by_seed)} for variant, by_seed in scores.items()
    }
    tasks = list(next(iter(table[first].values())))
    for variant, by_seed in table.items():
        if list(by_seed) != list(table[first]) or any(list(values) != tasks for values in by_seed.values()):
            raise ValueError(f"{variant} was not scored on the seeds and tasks of {first}")
    return table


def _tasks(table: Scores) -> list[str]:
    return list(next(iter(next(iter(table.values())).values())))


def paired_interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean of at least two differences, and the bounds of its 95% interval."""
    mean = statistics.fmean(differences)
    freedom = len(differences) - 1
    half = _T95[min(freedom, len(_T95)) - 1] * statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, mean - half, mean + half


def _with_mean(values: Mapping[str, float]) -> dict[str, float]:
    return {**values, MEAN: statistics.fmean(values.values())} if len(values) > 1 else dict(values)


def score_table(found: Sequence[Effect]) -> str:
    """Variants down, tasks across: mean scores over the seeds, in percent."""
    return _markdown("variant", {(effect.variant, effect.task): f"{100 * effect.score:.1f}" for effect in found})


def difference_table(found: Sequence[Effect], baseline: str) -> str:
    """The same for the differences to the baseline, in points, with their intervals; bold where 0 is outside."""
    others = [effect for effect in found if effect.variant != baseline]
    return _markdown("variant", {(effect.variant, effect.task): _points(effect) for effect in others})


def contrast_table(found: Sequence[Contrast]) -> str:
    """The same for contrasts."""
    return _markdown("contrast", {(contrast.name, contrast.task): _points(contrast) for contrast in found})


def _points(found: Effect | Contrast) -> str:
    text = f"{100 * found.difference:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    return f"**{text}**" if found.low > 0 or found.high < 0 else text


def _markdown(title: str, cells: Mapping[tuple[str, str], str]) -> str:
    """Return a table of cells by row and task."""
    rows, tasks = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
    lines = [[title, *map(_title, tasks)], ["---", *["---:"] * len(tasks)]]
    lines += [[row, *(cells[row, task] for task in tasks)] for row in rows]
    return "\n".join(f"| {' | '.join(map(escape_markdown, line))} |" for line in lines) + "\n"


def plot_effects(found: Sequence[Effect], baseline: str) -> str:
    """One panel per task, one line per variant: the difference in points and its interval. SVG, the same every time."""
    others = {(effect.variant, effect.task): effect for effect in found if effect.variant != baseline}
    return _plot(others, f"Difference to {baseline} in points", f"points above {baseline}")


def plot_contrasts(found: Sequence[Contrast]) -> str:
    """The same for contrasts."""
    return _plot({(some.name, some.task): some for some in found}, "Contrasts in points", "points")


def _plot(found: Mapping[tuple[str, str], Effect | Contrast], title: str, label: str) -> str:
    rows, tasks = (list(dict.fromkeys(names)) for names in zip(*found, strict=True))
    tasks.sort(key=lambda task: task != MEAN)  # the mean first
    reach = 110 * max(max(abs(some.low), abs(some.high)) for some in found.values()) or 1.0
    unit = "with 95% intervals paired by seed"
    return plot_panels(
        tasks,
        rows,
        lambda axes, task: _draw(axes, task, [found[row, task] for row in rows], reach),
        f"{title}, {unit}",
        f"{label}, {unit}",
    )


def _draw(axes: Axes, task: str, found: Sequence[Effect | Contrast], reach: float) -> None:
    for height, (some, color) in enumerate(zip(found, colors(len(found)), strict=True)):
        axes.plot([100 * some.low, 100 * some.high], [height, height], color=color, linewidth=1.5)
        axes.plot([100 * some.difference], [height], color=color, marker="o", markersize=4)
    axes.axvline(0, color=INK, linewidth=0.8, linestyle=":")
    axes.set_title(_title(task), loc="left", fontsize=9, color=INK)
    axes.set_xlim(-reach, reach)
    axes.grid(axis="x", color=FAINT, linewidth=0.5)


def _title(task: str) -> str:
    return "Mean of the tasks" if task == MEAN else task_title(task)
