"""The corpora, cells, contrasts and seeds of the evidence, registered before the first run of a test seed.

Temperatures are chosen on other seeds and other queries. `Results` reads the differences out of the runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tests.benchmarks.evidence_bed import TUNING, Cell
from tests.benchmarks.evidence_corpora import LANGUAGES, NUM_EMOJI, NUM_STAMPS, read_emoji, read_stamps
from tests.benchmarks.evidence_runs import Found, Read, Runs, hits, interval

SEEDS = 6
TEMPERATURES = (0.02, 0.05, 0.1, 0.2)
PUBLISHED, ALPHA = 0.02, 9.0

ARMS: dict[str, dict[str, bool]] = {
    "nothing": {},
    "ids": {"ids": True},
    "rule": {"rule": True},
    "ids + rule": {"ids": True, "rule": True},
    "oracle": {"oracle": True},
}
CELLS = {
    "hard": Cell(),
    "mixed": Cell(untoned=0.2),
    "false": Cell(untoned=0.5),
    "duplicates": Cell(direction="classes"),
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
BATCHES = {32: 1600, 512: 100}  # batch -> steps, for as many pairs as 400 steps of 128


@dataclass(frozen=True)
class Corpus:
    """A corpus of the evidence: its data, and what of it is registered."""

    read: Read
    num_items: int
    design: str
    """What the data are, and what the score is."""
    contents: Mapping[str, str]
    """Data -> what they are."""
    arms_of: Mapping[str, Sequence[str]]
    """Data -> arms, without those that are the same run as another."""
    variants: str
    """What a seed holds out."""
    queries: str
    """What a seed draws."""
    graded: str
    """How mAP and nDCG ask."""
    tuning_seeds: Sequence[int] = ()
    """Seeds that choose the best temperature of each cell."""
    second: float = 0.0
    """Temperature next to the published one, where no seeds choose it."""
    extra_data: Sequence[str] = ()
    """Data on which further settings are tried."""

    @property
    def higher(self) -> Sequence[float]:
        """Temperatures that are compared with the published one, without ids and rule."""
        return TEMPERATURES[1:3] if self.tuning_seeds else (self.second,)

    def core(self) -> dict[tuple[str, str, float], Cell]:
        """Return (data, arm, alpha) -> the cell, at the published temperature."""
        return {
            (data, arm, alpha): replace(CELLS[data], alpha=alpha, temperature=PUBLISHED, **ARMS[arm])
            for data, arms in self.arms_of.items()
            for arm in arms
            for alpha in (0.0, ALPHA)
        }

    def contrasts(self) -> list[Contrast]:
        """Return the contrasts whose cells some of the data have."""
        cells = self.core()
        return [
            contrast
            for contrast in CONTRASTS
            if any(all((data, *part) in cells for part in contrast.parts) for data in self.contents)
        ]

    def extras(self) -> dict[tuple[str, str], Cell]:
        """Return (data, change) -> the cell."""
        found = {}
        for data in self.extra_data:
            full = self.core()[data, "ids + rule", ALPHA]
            for name, changes in EXTRAS.items():
                found[data, name] = replace(full, **changes)
            for batch, steps in BATCHES.items():
                for alpha in (0.0, ALPHA):
                    label = f"batch {batch}, alpha {alpha:g}"
                    found[data, label] = replace(full, batch=batch, steps=steps, alpha=alpha)
        return found


EMOJI = Corpus(
    read_emoji,
    NUM_EMOJI,
    f"{NUM_EMOJI} emoji in five skin tones, 1,520 real pictures. One tone of each emoji is never trained on. A batch of"
    " 128 has four tones of 32 emoji. Two small towers learn from random weights in 400 steps, with the objective that"
    " training uses. The score is hit@1 in percent: captions of the held-out pictures among all 1,520 pictures, and in"
    f" `duplicates` the held-out pictures among {NUM_EMOJI} names.",
    {
        "hard": "captions name the tone: three hard negatives a query",
        "mixed": "20% of the captions do not name the tone: some of them are false",
        "false": "50% of the captions do not name the tone",
        "duplicates": "pictures ask for names, which are in the batch four times",
    },
    {  # no content repeats in `hard`, and ids see all of `duplicates`
        "hard": ("nothing", "rule"),
        "mixed": tuple(ARMS),
        "false": tuple(ARMS),
        "duplicates": ("nothing", "ids", "rule", "ids + rule"),
    },
    variants="tones",
    queries="captions",
    graded="mAP: the name alone asks for all five pictures. nDCG: the right tone counts 3, the others 1.",
    tuning_seeds=(TUNING, TUNING + 1),
    extra_data=("mixed", "duplicates"),
)
STAMPS = Corpus(
    read_stamps,
    NUM_STAMPS,
    f"{NUM_STAMPS} stamps of Tux Paint, real pictures with their names in five languages ({', '.join(LANGUAGES)})."
    " Here, names are the targets. A query is a picture with a language, or without one. Names that are spelled"
    " the same in two languages are one content. One language of each stamp is never trained on. A batch of 128 has"
    f" the names of 32 stamps in four languages. Towers, steps and objective are those of the first corpus. The score"
    " is hit@1 in percent: pictures with the held-out language among all distinct names, and in `duplicates` the"
    f" held-out names among {NUM_STAMPS} pictures.",
    {
        "hard": "queries name the language: three hard negatives a query, of which some are spelled the same",
        "false": "50% of the queries do not name the language",
        "duplicates": "names ask for pictures, which are in the batch four times",
    },
    {  # ids see all of `duplicates`
        "hard": ("nothing", "rule"),
        "false": ("nothing", "ids", "rule", "oracle"),
        "duplicates": ("nothing", "ids", "rule"),
    },
    variants="languages",
    queries="queries",
    graded="mAP: the picture alone asks for its names. nDCG: the right language counts 3, the others 1.",
    second=0.1,
)
CORPORA = {"emoji": EMOJI, "stamps": STAMPS}


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


def best_temperatures(corpus: Corpus, runs: Runs) -> dict[tuple[str, str, float], float]:
    """Return the temperature of each cell with the most hits on the tuning seeds. The lower one wins a tie."""
    if not corpus.tuning_seeds:
        return dict.fromkeys(corpus.core(), corpus.second)
    found = {}
    for place, cell in corpus.core().items():
        right = {
            temperature: sum(
                hits(runs[replace(cell, temperature=temperature).key(), seed]["hits"], corpus.num_items).mean()
                for seed in corpus.tuning_seeds
            )
            for temperature in TEMPERATURES
        }
        found[place] = max(right, key=lambda temperature: (right[temperature], -temperature))
    return found


def to_tune(corpus: Corpus) -> list[tuple[Cell, int]]:
    """Return the runs that choose temperatures."""
    return [
        (replace(cell, temperature=temperature), seed)
        for seed in corpus.tuning_seeds
        for cell in corpus.core().values()
        for temperature in TEMPERATURES
    ]


def to_test(corpus: Corpus, best: Mapping[tuple[str, str, float], float], seeds: int) -> list[tuple[Cell, int]]:
    """Return the runs that test, seed by seed."""
    cells: dict[str, Cell] = {}
    for place, cell in corpus.core().items():
        temperatures = {PUBLISHED, best[place]} | set(corpus.higher if place[1] == "nothing" else ())
        for temperature in sorted(temperatures):
            some = replace(cell, temperature=temperature)
            cells[some.key()] = some
    for cell in corpus.extras().values():
        cells[cell.key()] = cell
    return [(cell, seed) for seed in range(seeds) for cell in cells.values()]


@dataclass(frozen=True)
class Results:
    """All runs of a corpus, and the temperatures that were chosen."""

    corpus: Corpus
    runs: Runs
    best: Mapping[tuple[str, str, float], float]
    seeds: int

    def hits(self, cell: Cell) -> np.ndarray[Any, Any]:
        """Return `[S, E]`."""
        return np.stack(
            [hits(self.runs[cell.key(), seed]["hits"], self.corpus.num_items) for seed in range(self.seeds)]
        )

    def mean(self, cell: Cell, name: str) -> float | None:
        """Return the mean of a value of the runs; None where they have none."""
        values = [self.runs[cell.key(), seed][name] for seed in range(self.seeds)]
        return None if None in values else float(np.mean(values))

    def score(self, cell: Cell, name: str) -> float:
        """Return the mean of a score."""
        return float(np.mean([self.runs[cell.key(), seed]["scores"][name] for seed in range(self.seeds)]))

    def contrast(self, contrast: Contrast, data: str, tuned: bool) -> Found | None:
        """Return the contrast in hits, and its interval; None where the data lack one of its arms."""
        cells = self.corpus.core()
        if any((data, *part) not in cells for part in contrast.parts):
            return None
        total = np.zeros((self.seeds, self.corpus.num_items))
        for part, weight in contrast.parts.items():
            total += weight * self.hits(self.cell(data, *part, tuned=tuned))
        return interval(total)

    def temperature(self, data: str, alpha: float, temperature: float) -> Found:
        """Return what a temperature changes without ids and rule, and its interval."""
        cell = self.corpus.core()[data, "nothing", alpha]
        return interval(self.hits(replace(cell, temperature=temperature)) - self.hits(cell))

    def cell(self, data: str, arm: str, alpha: float, tuned: bool) -> Cell:
        """Return a cell at the published temperature or at its best."""
        place = (data, arm, alpha)
        return replace(self.corpus.core()[place], temperature=self.best[place] if tuned else PUBLISHED)
