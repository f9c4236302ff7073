"""What hardness weights and false-negative elimination do, apart and together, where the truth is known.

    python -m tests.benchmarks.evidence --write      about 40 CPU minutes; writes evidence.md, evidence.svg
    python -m tests.benchmarks.evidence --seeds 2 --report      the report of what is there

The cells, the seeds and the contrasts below were fixed before the first run of a test seed, and are printed with the
result. Temperatures are chosen on other seeds and other queries. Each run is a line of runs.jsonl: a repeated command
does what is missing, and gives the same numbers.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes

from rzen.evaluation.figures import COLORS, FAINT, INK, plot_panels
from tests.benchmarks.evidence_bed import NUM_EMOJI, TUNING, Bed, Cell, read_bed, train
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.runs import RunFile, percent, points, table
from tests.benchmarks.turns import say, show

OUT = Path("runs/evidence")
SEEDS = 6
TUNING_SEEDS = (TUNING, TUNING + 1)
TEMPERATURES = (0.02, 0.05, 0.1, 0.2)
PUBLISHED, ALPHA = 0.02, 9.0
_DRAWS = 4000

BEDS: dict[str, tuple[str, Cell]] = {
    "hard": ("captions name the tone: three hard negatives a query", Cell()),
    "mixed": ("20% of the captions do not name the tone: some of them are false", Cell(untoned=0.2)),
    "false": ("50% of the captions do not name the tone", Cell(untoned=0.5)),
    "duplicates": ("pictures ask for names, which are in the batch four times", Cell(direction="classes")),
}
ARMS: dict[str, dict[str, bool]] = {
    "nothing": {},
    "ids": {"ids": True},
    "rule": {"rule": True},
    "ids + rule": {"ids": True, "rule": True},
    "oracle": {"oracle": True},
}
ARMS_OF = {  # without arms that are the same run: no content repeats in `hard`, and ids see all of `duplicates`
    "hard": ("nothing", "rule"),
    "mixed": tuple(ARMS),
    "false": tuple(ARMS),
    "duplicates": ("nothing", "ids", "rule", "ids + rule"),
}
EXTRAS: dict[str, dict[str, Any]] = {  # changes to `ids + rule` with hardness weights, at the published temperature
    "normalized weights": {"normalized": True},
    "weights from step 100 on": {"hardness_from": 100},
    "learned temperature, from .02": {"learnable": True},
    "learned temperature, from .2": {"learnable": True, "temperature": 0.2},
    "focal weights": {"options": {"focal_gamma": 1.0}},
    "margin .1": {"options": {"margin": 0.1}},
    "other right answers as positives": {"options": {"duplicates": "positive"}},
}
EXTRA_BEDS = ("mixed", "duplicates")
BATCHES = {32: 1600, 512: 100}  # batch -> steps, for as many pairs as 400 steps of 128


@dataclass(frozen=True)
class Contrast:
    """A sum of cells with weights, such as one cell minus another."""

    title: str
    parts: Mapping[tuple[str, float], int]
    """(arm, alpha) -> weight."""


def _minus(title: str, first: tuple[str, float], second: tuple[str, float]) -> Contrast:
    return Contrast(title, {first: 1, second: -1})


CONTRASTS = (
    _minus("hardness alone", ("nothing", ALPHA), ("nothing", 0)),
    _minus("rule alone", ("rule", 0), ("nothing", 0)),
    _minus("rule and hardness", ("rule", ALPHA), ("nothing", 0)),
    Contrast(
        "their interaction",
        {("rule", ALPHA): 1, ("rule", 0): -1, ("nothing", ALPHA): -1, ("nothing", 0): 1},
    ),
    _minus("ids alone", ("ids", 0), ("nothing", 0)),
    _minus("ids and hardness", ("ids", ALPHA), ("nothing", 0)),
    _minus("rule on top of ids", ("ids + rule", 0), ("ids", 0)),
    _minus("rule on top of ids and hardness", ("ids + rule", ALPHA), ("ids", ALPHA)),
    _minus("truth over ids", ("oracle", 0), ("ids", 0)),
    _minus("truth over ids, with hardness", ("oracle", ALPHA), ("ids", ALPHA)),
)


def core() -> dict[tuple[str, str, float], Cell]:
    """Return (bed, arm, alpha) -> the cell, at the published temperature."""
    return {
        (bed, arm, alpha): replace(BEDS[bed][1], alpha=alpha, temperature=PUBLISHED, **ARMS[arm])
        for bed, arms in ARMS_OF.items()
        for arm in arms
        for alpha in (0.0, ALPHA)
    }


def extras() -> dict[tuple[str, str], Cell]:
    """Return (bed, change) -> the cell."""
    found = {}
    for bed in EXTRA_BEDS:
        full = core()[bed, "ids + rule", ALPHA]
        for name, changes in EXTRAS.items():
            found[bed, name] = replace(full, **changes)
        for batch, steps in BATCHES.items():
            for alpha in (0.0, ALPHA):
                label = f"batch {batch}, alpha {alpha:g}"
                found[bed, label] = replace(full, batch=batch, steps=steps, alpha=alpha)
    return found


def best_temperatures(runs: Mapping[tuple[str, int], dict[str, Any]]) -> dict[tuple[str, str, float], float]:
    """Return the temperature of each cell with the most hits on the tuning seeds. The lower one wins a tie."""
    found = {}
    for place, cell in core().items():
        hits = {
            temperature: sum(
                _hits(runs[replace(cell, temperature=temperature).key(), seed]).mean() for seed in TUNING_SEEDS
            )
            for temperature in TEMPERATURES
        }
        found[place] = max(hits, key=lambda temperature: (hits[temperature], -temperature))
    return found


def to_tune() -> list[tuple[Cell, int]]:
    """Return the runs that choose temperatures."""
    return [
        (replace(cell, temperature=temperature), seed)
        for seed in TUNING_SEEDS
        for cell in core().values()
        for temperature in TEMPERATURES
    ]


def to_test(best: Mapping[tuple[str, str, float], float], seeds: int) -> list[tuple[Cell, int]]:
    """Return the runs that test, seed by seed."""
    cells: dict[str, Cell] = {}
    for place, cell in core().items():
        temperatures = {PUBLISHED, best[place]} | (set(TEMPERATURES[:3]) if place[1] == "nothing" else set())
        for temperature in sorted(temperatures):
            some = replace(cell, temperature=temperature)
            cells[some.key()] = some
    for cell in extras().values():
        cells[cell.key()] = cell
    return [(cell, seed) for seed in range(seeds) for cell in cells.values()]


@lru_cache(maxsize=1)
def _bed(folder: Path) -> Bed:
    torch.set_num_threads(1)
    return read_bed(folder)


def _run(folder: Path, cell: Cell, seed: int) -> dict[str, Any]:
    bed = _bed(folder)
    begun_s = time.process_time()
    outcome = asdict(train(bed, cell, seed))
    outcome["hits"] = np.packbits(outcome["hits"]).tobytes().hex()
    return {"cell": cell.key(), "seed": seed, "cpu_s": round(time.process_time() - begun_s, 2), **outcome}


def do(
    out: Path, wanted: Sequence[tuple[Cell, int]], *, only_read: bool = False
) -> dict[tuple[str, int], dict[str, Any]]:
    """Do what is missing. Return all runs by cell and seed. Exits if a run is missing, and `only_read`."""
    file = RunFile(out / "runs.jsonl")
    missing = file.missing({(cell.key(), seed): (cell, seed) for cell, seed in wanted}, only_read=only_read)
    if missing:
        _bed(out / "packages")  # fetched before several processes ask for it
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            waiting = [pool.submit(_run, out / "packages", cell, seed) for cell, seed in missing]
            for count, future in enumerate(as_completed(waiting), 1):
                file.add(future.result())
                if count % 50 == 0:
                    say(f"{count} of {len(missing)}")
    return file.runs


def _hits(run: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """Return `[E]`, 1 where the test's first answer was right."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(run["hits"]), np.uint8))
    return bits[:NUM_EMOJI].astype(float)


def interval(values_SQ: np.ndarray[Any, Any]) -> tuple[float, float, float]:
    """Return the mean of differences by seed and query, and its 95% interval, drawing seeds and queries again."""
    rng = np.random.default_rng(0)
    num_seeds, num_queries = values_SQ.shape
    seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), _DRAWS) / num_seeds
    queries = rng.multinomial(num_queries, np.full(num_queries, 1 / num_queries), _DRAWS) / num_queries
    means = ((seeds @ values_SQ) * queries).sum(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(values_SQ.mean()), float(low), float(high)


@dataclass(frozen=True)
class Results:
    """All runs, and the temperatures that were chosen."""

    runs: Mapping[tuple[str, int], dict[str, Any]]
    best: Mapping[tuple[str, str, float], float]
    seeds: int

    def hits(self, cell: Cell) -> np.ndarray[Any, Any]:
        """Return `[S, E]`."""
        return np.stack([_hits(self.runs[cell.key(), seed]) for seed in range(self.seeds)])

    def mean(self, cell: Cell, name: str) -> float | None:
        values = [self.runs[cell.key(), seed][name] for seed in range(self.seeds)]
        return None if None in values else float(np.mean(values))

    def score(self, cell: Cell, name: str) -> float:
        return float(np.mean([self.runs[cell.key(), seed]["scores"][name] for seed in range(self.seeds)]))

    def contrast(self, contrast: Contrast, bed: str, tuned: bool) -> tuple[float, float, float] | None:
        """Return the contrast in hits, and its interval; None where the bed lacks one of its arms."""
        cells = core()
        if any((bed, *part) not in cells for part in contrast.parts):
            return None
        total = np.zeros((self.seeds, NUM_EMOJI))
        for part, weight in contrast.parts.items():
            total += weight * self.hits(self.cell(bed, *part, tuned=tuned))
        return interval(total)

    def cell(self, bed: str, arm: str, alpha: float, tuned: bool) -> Cell:
        place = (bed, arm, alpha)
        return replace(core()[place], temperature=self.best[place] if tuned else PUBLISHED)


def report(results: Results) -> str:
    """Return the report in Markdown."""
    widths = [
        (high - low) / 2
        for bed in BEDS
        for contrast in CONTRASTS[:3]
        if (found := results.contrast(contrast, bed, tuned=False))
        for _, low, high in [found]
    ]
    used = [run for (_, seed), run in results.runs.items() if seed < results.seeds or seed >= TUNING]
    cpu_s = sum(run["cpu_s"] for run in used)
    lines = [
        "# Evidence: what hardness weights and false-negative elimination do",
        "",
        "**Question.** Does each of the recipe's two headline terms help, alone and together, and what is the reason?",
        "",
        "**Design.** 304 emoji in five skin tones, 1,520 real pictures. One tone of each emoji is never trained on. A"
        " batch of 128 has four tones of 32 emoji. Two small towers learn from random weights in 400 steps, with the"
        " objective that training uses. The score is hit@1 in percent: captions of the held-out pictures among all"
        " 1,520 pictures, and in `duplicates` the held-out pictures among 304 names.",
        "",
        f"**Registered before the first run of a test seed:** {len(core())} cells at temperature {PUBLISHED} and at the"
        f" best of {', '.join(map(str, TEMPERATURES))} on seeds {TUNING_SEEDS[0]} and {TUNING_SEEDS[1]}, which ask for"
        f" other tones than the tests; {len(CONTRASTS)} contrasts; {len(extras())} further cells; seeds 0 to"
        f" {SEEDS - 1}. This report has {results.seeds} of these seeds. A seed draws the held-out tones, the captions,"
        " the weights and the order.",
        "",
        f"**Power.** With {results.seeds} seeds of {NUM_EMOJI} queries, the 95% intervals of the first three contrasts"
        f" reach {100 * min(widths):.1f} to {100 * max(widths):.1f} points to each side. Smaller effects are not seen.",
        "",
        f"{describe_machine()}. {len(used):,} runs, {cpu_s / 60:.0f} CPU minutes.",
        "",
    ]
    lines += ["| data | content |", "|---|---|", *(f"| {name} | {text} |" for name, (text, _) in BEDS.items()), ""]
    lines += [
        "| arm | what the objective knows |",
        "|---|---|",
        "| nothing | nothing: InfoNCE |",
        "| ids | ids of contents: equal contents and other answers of equal queries are no negatives |",
        "| rule | negatives with a cosine above .95 to the positive are dropped, after 100 steps, at most half |",
        "| oracle | which negatives are false |",
        "",
    ]
    for tuned in (False, True):
        where = "each arm at its own best temperature" if tuned else f"temperature {PUBLISHED}, as published"
        lines += [
            f"## Contrasts: {where}",
            "",
            "Points of hit@1 with 95% intervals, paired, over seeds and queries (bootstrap). Bold: 0 is outside.",
            "",
            *table(
                ["contrast", *BEDS],
                [
                    [contrast.title, *(points(results.contrast(contrast, bed, tuned)) for bed in BEDS)]
                    for contrast in CONTRASTS
                ],
            ),
        ]
    lines += ["![contrasts at the published temperature](evidence.svg)", "", "## Temperature", ""]
    rows = []
    for alpha in (0.0, ALPHA):
        for temperature in TEMPERATURES[1:3]:
            row = [f"{temperature} instead of {PUBLISHED}, alpha {alpha:g}"]
            for bed in BEDS:
                first = replace(core()[bed, "nothing", alpha], temperature=temperature)
                second = replace(core()[bed, "nothing", alpha], temperature=PUBLISHED)
                row.append(points(interval(results.hits(first) - results.hits(second))))
            rows.append(row)
    lines += table(["without ids and rule", *BEDS], rows)
    lines += ["## Scores", ""]
    rows = []
    for (bed, arm, alpha), cell in core().items():
        place = (bed, arm, alpha)
        tuned = results.cell(*place, tuned=True)
        main = "classes" if bed == "duplicates" else "spec"
        rows.append(
            [
                f"{bed}: {arm}, alpha {alpha:g}",
                percent(results.score(cell, main)),
                f"{percent(results.score(tuned, main))} ({results.best[place]})",
                *(percent(results.score(cell, name)) for name in ("map", "ndcg")),
                *(percent(results.mean(cell, name)) for name in ("found", "lost")),
            ]
        )
    head = ["cell", "hit@1 at .02", "at the best", "mAP", "nDCG@10", "false negatives found", "hard negatives lost"]
    lines += [
        "In percent. mAP: the name alone asks for all five pictures. nDCG: the right tone counts 3, the others 1. The"
        " last two: what the rule dropped in the last 50 steps.",
        "",
        *table(head, rows),
        "## Further settings",
        "",
        f"Changes to ids + rule with alpha {ALPHA:g} at temperature {PUBLISHED}; batches see as many pairs.",
        "",
    ]
    rows = []
    for name in dict.fromkeys(name for _, name in extras()):
        row = [name]
        for bed in EXTRA_BEDS:
            cell = extras()[bed, name]
            full = core()[bed, "ids + rule", ALPHA]
            row.append(points(interval(results.hits(cell) - results.hits(full))))
            final = results.mean(cell, "temperature")
            row.append(f"{final:.3f}")
        rows.append(row)
    head = ["change"]
    for bed in EXTRA_BEDS:
        head += [bed, "last temperature"]
    lines += table(head, rows)
    lines += [
        "## What is not shown",
        "",
        "* One corpus and one small learner from random weights. A pretrained model may differ.",
        "* Bold marks one contrast at a time: of 100 contrasts without an effect, five are bold by chance.",
        "* The best temperatures come from two seeds, and from a grid of four values.",
        "",
    ]
    return "\n".join(lines)


def plot(results: Results) -> str:
    """Return a forest plot of the contrasts at the published temperature, as SVG."""

    def draw(axes: Axes, bed: str) -> None:
        axes.axvline(0, color=FAINT)
        for height, contrast in enumerate(CONTRASTS):
            if found := results.contrast(contrast, bed, tuned=False):
                mean, low, high = (100 * value for value in found)
                axes.plot([low, high], [height, height], color=COLORS[0])
                axes.plot([mean], [height], "o", color=COLORS[0], markersize=4)
        axes.set_title(bed, loc="left", fontsize=9, color=INK)

    titles = [contrast.title for contrast in CONTRASTS]
    label = "points of hit@1, with 95% intervals"
    return plot_panels(list(BEDS), titles, draw, f"Contrasts at temperature {PUBLISHED} in {label}", label)


def main() -> None:
    """Do what is missing, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the runs and of the packages")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"test seeds, from 0 on; {SEEDS} are registered")
    parser.add_argument("--report", action="store_true", help="do no runs")
    parser.add_argument("--write", action="store_true", help="write evidence.md and evidence.svg next to this file")
    arguments = parser.parse_args()
    say("registered: " + "; ".join(contrast.title for contrast in CONTRASTS))
    best = best_temperatures(do(arguments.out, to_tune(), only_read=arguments.report))
    runs = do(arguments.out, to_test(best, arguments.seeds), only_read=arguments.report)
    results = Results(runs, best, arguments.seeds)
    show(report(results), __file__, write=arguments.write)
    if arguments.write:
        Path(__file__).with_suffix(".svg").write_text(plot(results), encoding="utf-8")


if __name__ == "__main__":
    main()
