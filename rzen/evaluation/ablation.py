"""What an ablation says: mean scores of its variants, paired differences to the baseline, table and plot.

Runs of one seed belong together: they see the same data in the same order. Much of what a seed does is then the same in
both, and cancels in their difference. The interval is that of Student's t over these differences.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
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


def effects(scores: Scores, baseline: str) -> list[Effect]:
    """Every variant on every task, the mean of the tasks last. Raises `ValueError` where a run is missing."""
    seeds = sorted(scores[baseline])
    tasks = list(scores[baseline][seeds[0]])
    table = {
        variant: {seed: _with_mean(by_seed[seed]) for seed in sorted(by_seed)} for variant, by_seed in scores.items()
    }
    for variant, by_seed in table.items():
        if list(by_seed) != seeds or any(list(values) != [*tasks, MEAN] for values in by_seed.values()):
            raise ValueError(f"{variant} was not scored on the seeds and tasks of {baseline}")
    found = []
    for task in (*tasks, MEAN):
        for variant, by_seed in table.items():
            differences = [by_seed[seed][task] - table[baseline][seed][task] for seed in seeds]
            score = statistics.fmean(by_seed[seed][task] for seed in seeds)
            found.append(Effect(variant, task, score, *paired_interval(differences), len(seeds)))
    return found


def paired_interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean of at least two differences, and the bounds of its 95% interval."""
    mean = statistics.fmean(differences)
    freedom = len(differences) - 1
    half = _T95[min(freedom, len(_T95)) - 1] * statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, mean - half, mean + half


def _with_mean(values: Mapping[str, float]) -> dict[str, float]:
    return {**values, MEAN: statistics.fmean(values.values())}


def score_table(found: Sequence[Effect]) -> str:
    """Variants down, tasks across: mean scores over the seeds, in percent."""
    return _markdown(found, lambda effect: f"{100 * effect.score:.1f}")


def difference_table(found: Sequence[Effect], baseline: str) -> str:
    """The same for the differences to the baseline, in points, with their intervals; bold where 0 is outside."""

    def cell(effect: Effect) -> str:
        text = f"{100 * effect.difference:+.1f} [{100 * effect.low:+.1f}, {100 * effect.high:+.1f}]"
        return f"**{text}**" if effect.low > 0 or effect.high < 0 else text

    return _markdown([effect for effect in found if effect.variant != baseline], cell)


def _markdown(found: Sequence[Effect], cell: Callable[[Effect], str]) -> str:
    variants, tasks = _variants(found), _tasks(found)
    cells = {(effect.variant, effect.task): cell(effect) for effect in found}
    lines = [["variant", *map(_title, tasks)], ["---", *["---:"] * len(tasks)]]
    lines += [[variant, *(cells[variant, task] for task in tasks)] for variant in variants]
    return "\n".join(f"| {' | '.join(map(escape_markdown, line))} |" for line in lines) + "\n"


def plot_effects(found: Sequence[Effect], baseline: str) -> str:
    """One panel per task, one line per variant: the difference in points and its interval. SVG, the same every time."""
    others = [effect for effect in found if effect.variant != baseline]
    variants, tasks = _variants(others), [MEAN, *(task for task in _tasks(others) if task != MEAN)]
    reach = 110 * max(max(abs(effect.low), abs(effect.high)) for effect in others) or 1.0
    unit = "with 95% intervals paired by seed"
    return plot_panels(
        tasks,
        variants,
        lambda axes, task: _draw(axes, variants, [effect for effect in others if effect.task == task], reach),
        f"Difference to {baseline} in points, {unit}",
        f"points above {baseline}, {unit}",
    )


def _draw(axes: Axes, variants: list[str], found: Sequence[Effect], reach: float) -> None:
    for effect, color in zip(found, colors(len(variants)), strict=True):
        height = variants.index(effect.variant)
        axes.plot([100 * effect.low, 100 * effect.high], [height, height], color=color, linewidth=1.5)
        axes.plot([100 * effect.difference], [height], color=color, marker="o", markersize=4)
    axes.axvline(0, color=INK, linewidth=0.8, linestyle=":")
    axes.set_title(_title(found[0].task), loc="left", fontsize=9, color=INK)
    axes.set_xlim(-reach, reach)
    axes.grid(axis="x", color=FAINT, linewidth=0.5)


def _variants(found: Sequence[Effect]) -> list[str]:
    return list(dict.fromkeys(effect.variant for effect in found))


def _tasks(found: Sequence[Effect]) -> list[str]:
    return list(dict.fromkeys(effect.task for effect in found))


def _title(task: str) -> str:
    return "Mean of the tasks" if task == MEAN else task_title(task)
