"""What mined negatives, batches of look-alikes and soups do, where the truth is known.

    python -m tests.benchmarks.evidence_training --write     about 15 CPU minutes; writes evidence_training.md
    python -m tests.benchmarks.evidence_training --report    the report of what is there

The data are the emoji of `evidence`, the towers and the tests are the same. All cells and contrasts were fixed before
the first run, and no setting was chosen by its score. Negatives are chosen by `pipelines.candidates`, as jobs of kind
`mine` choose them.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.candidates.config import NegativeRules, SelectionConfig
from pipelines.candidates.selection import PositiveScores, select
from pipelines.candidates.types import CandidateRows
from tests.benchmarks.evidence_bed import VARIANTS, Bed, Cell, Outcome, Run, train
from tests.benchmarks.evidence_cells import ALPHA, CELLS, EMOJI, SEEDS
from tests.benchmarks.evidence_runs import Found, Runs, Work, do, hits, interval
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.runs import percent, points, table
from tests.benchmarks.turns import say, show

OUT = Path("runs/evidence")
COLUMNS = (("hard", 0.02), ("hard", 0.1), ("false", 0.1))
"""Data and temperature of the runs with mined negatives."""
WEIGHTED = COLUMNS[0]
"""Where hardness weights are tried."""
MINED, MARGIN, DEPTH = 4, 0.05, 100
PARENTS = 3
START_TEMPERATURE = 0.05
BATCHES = {"clusters": 4, "random": 1}
"""Batches -> variants of one item in them."""


@dataclass(frozen=True)
class MinedCell(Cell):
    """A run that mines its negatives with its own model at half of its steps, and trains on with them."""

    mined: int = MINED
    """Negatives of each sample."""
    margin: float | None = None
    """Candidates that score more than 1 - margin of the positive are left out. None keeps them."""


@dataclass(frozen=True)
class DrawnCell(MinedCell):
    """A control: as many negatives at the same step, drawn among all that are trained on."""

    drawn: bool = True
    """Whether they are drawn instead of mined."""


@dataclass(frozen=True)
class MinedOutcome(Outcome):
    """What a run with mined negatives scores."""

    mined: float
    """Negatives of a sample, on average."""
    false: float
    """Share of the mined negatives that are right answers."""


@dataclass(frozen=True)
class SoupCell(Cell):
    """A mean of the weights of three runs, which have half of the steps in common, or none."""

    temperatures: tuple[float, ...] = (START_TEMPERATURE,) * PARENTS
    """Temperature of each parent."""
    is_shared: bool = True
    """Whether the parents have a common start, of half of the steps."""


@dataclass(frozen=True)
class SoupOutcome(Outcome):
    """What a soup scores, and its parents."""

    parents: list[list[bool]]
    """Hits of each parent."""


def mined_cell(data: str, batches: str, mining: str, temperature: float) -> Cell:
    """Return the cell of a way to mine: `none`, `top`, `rule` or `drawn`."""
    plain = replace(CELLS[data], ids=True, tones=BATCHES[batches], temperature=temperature)
    if mining == "none":
        return plain
    if mining == "drawn":
        return DrawnCell(**asdict(plain))
    return MinedCell(**asdict(plain), margin=MARGIN if mining == "rule" else None)


def soup_cells() -> dict[str, SoupCell]:
    """Return kind of soup -> the cell."""
    plain = asdict(replace(CELLS["hard"], ids=True, temperature=START_TEMPERATURE))
    return {
        "three orders": SoupCell(**plain),
        "three temperatures": SoupCell(**plain, temperatures=(0.02, START_TEMPERATURE, 0.1)),
        "three orders, no common start": SoupCell(**plain, is_shared=False),
    }


def cells() -> list[Cell]:
    """Return all cells that are registered."""
    mined = [
        mined_cell(data, batches, mining, temperature)
        for data, temperature in COLUMNS
        for batches in BATCHES
        for mining in ("none", "top", "rule", "drawn")
    ]
    return [*mined, *map(_weighted, BATCHES), *soup_cells().values()]


def _weighted(batches: str) -> Cell:
    """Return a cell with hardness weights and without mined negatives."""
    data, temperature = WEIGHTED
    return replace(mined_cell(data, batches, "none", temperature), alpha=ALPHA)


def train_any(bed: Bed, cell: Cell, seed: int) -> Outcome:
    """Train and test a run of any kind."""
    if isinstance(cell, MinedCell):
        return _train_mined(bed, cell, seed)
    return _train_soup(bed, cell, seed) if isinstance(cell, SoupCell) else train(bed, cell, seed)


def _train_mined(bed: Bed, cell: MinedCell, seed: int) -> MinedOutcome:
    run = Run(bed, cell, seed)
    run.advance(cell.steps // 2)
    run.mined_TK, is_right_TK = mine(run, cell.mined, cell.margin, isinstance(cell, DrawnCell))
    run.advance(cell.steps - run.step)
    is_there_TK, num_samples = run.mined_TK >= 0, (VARIANTS - 1) * bed.num_items
    mined = int(is_there_TK.sum())
    return MinedOutcome(**vars(run.outcome()), mined=mined / num_samples, false=int(is_right_TK.sum()) / max(mined, 1))


@torch.no_grad()
def mine(run: Run, count: int, margin: float | None, drawn: bool = False) -> tuple[Tensor, Tensor]:
    """Return the contents that the model scores highest for the sample of each target, `[5 E, K]`, -1 for none.

    With `drawn`, a generator scores them instead.
    Also returns which of them are right answers, `[5 E, K]`. Candidates are what is trained on, without the known
    answers of the query: targets of samples that ask the same.
    """
    bed, towers = run.bed, run.towers
    row_T = torch.arange(len(bed.targets))
    item_T, variant_T = row_T // VARIANTS, row_T % VARIANTS
    is_toned_T = torch.from_numpy(run.is_toned).flatten()
    asked_T = 6 * item_T + torch.where(is_toned_T, variant_T, VARIANTS)
    sample_S = row_T[variant_T != torch.from_numpy(run.held)[item_T]]
    content_S, asked_S = bed.contents[sample_S], asked_T[sample_S]
    scores_SC = towers.queries(bed.queries[asked_S]) @ towers.targets(bed.targets[bed.distinct]).T
    positive_S = scores_SC.gather(1, content_S[:, None])[:, 0]
    no_candidate_SC = torch.ones_like(scores_SC, dtype=torch.bool)
    no_candidate_SC[:, content_S] = False
    same_s, other_s = (asked_S[:, None] == asked_S).nonzero(as_tuple=True)
    no_candidate_SC[same_s, content_S[other_s]] = True
    if drawn:
        scores_SC = torch.rand(scores_SC.shape, generator=torch.Generator().manual_seed(count))
    top = scores_SC.masked_fill(no_candidate_SC, -torch.inf).topk(DEPTH, dim=1)
    rows = CandidateRows.of(
        list(map(str, sample_S.tolist())),
        [DEPTH] * len(sample_S),
        candidate=top.indices.flatten().numpy(),
        recall=top.values.flatten().numpy(),
        query=1 + asked_S.numpy(),
        positive_recall=positive_S.numpy(),
    )
    config = SelectionConfig(negatives=NegativeRules(margin=margin), negatives_per_sample=count)
    chosen = select(rows, PositiveScores.of([rows], config), config, "evidence", 0).rows
    found_TK = torch.full((len(row_T), count), -1)
    place_M = np.arange(len(chosen.candidate)) - chosen.bounds[:-1][chosen.sample]
    found_TK[sample_S[chosen.sample], place_M] = torch.from_numpy(chosen.candidate)
    right_TC = torch.where(
        is_toned_T[:, None], bed.contents[:, None] == torch.arange(len(bed.distinct)), bed.has[item_T]
    )
    return found_TK, right_TC.gather(1, found_TK.clamp(min=0)) & (found_TK >= 0)


def _train_soup(bed: Bed, cell: SoupCell, seed: int) -> SoupOutcome:
    start = Run(bed, cell, seed)
    if cell.is_shared:
        start.advance(cell.steps // 2)
    parents = []
    for order, temperature in enumerate(cell.temperatures):
        shared = start if cell.is_shared else None
        run = Run(bed, replace(cell, temperature=temperature), seed, shared, order)
        run.advance(cell.steps - start.step)
        parents.append(run)
    soup = Run(bed, cell, seed)
    soup.towers.load_state_dict(mean_of([parent.towers.state_dict() for parent in parents]))
    return SoupOutcome(**vars(soup.outcome()), parents=[parent.outcome().hits for parent in parents])


def mean_of(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of weights."""
    return {name: torch.stack([state[name] for state in states]).mean(dim=0) for name in states[0]}


@dataclass(frozen=True)
class Results:
    """All runs of the registered cells."""

    runs: Runs
    seeds: int

    def hits(self, cell: Cell) -> np.ndarray[Any, Any]:
        """Return `[S, E]`."""
        found = (self.runs[cell.key(), seed]["hits"] for seed in range(self.seeds))
        return np.stack([hits(packed, EMOJI.num_items) for packed in found])

    def parents(self, cell: SoupCell) -> np.ndarray[Any, Any]:
        """Return the hits of the parents, `[P, S, E]`."""
        found = [self.runs[cell.key(), seed]["parents"] for seed in range(self.seeds)]
        return np.stack([[hits(packed, EMOJI.num_items) for packed in parents] for parents in found], axis=1)

    def mean(self, cell: Cell, name: str) -> float:
        """Return the mean of a value of the runs."""
        return float(np.mean([self.runs[cell.key(), seed][name] for seed in range(self.seeds)]))

    def minus(self, first: Cell, second: Cell) -> Found:
        """Return a difference and its interval."""
        return interval(self.hits(first) - self.hits(second))


Way = tuple[str, str]
"""Batches, and how negatives are mined."""
MINING: dict[str, tuple[Way, Way]] = {
    "clusters instead of random batches": (("clusters", "none"), ("random", "none")),
    "random batches: mined": (("random", "top"), ("random", "none")),
    "random batches: drawn": (("random", "drawn"), ("random", "none")),
    "random batches: mined instead of drawn": (("random", "top"), ("random", "drawn")),
    "random batches: mined, with the rule": (("random", "rule"), ("random", "none")),
    "random batches: the rule on the mined": (("random", "rule"), ("random", "top")),
    "clusters: mined": (("clusters", "top"), ("clusters", "none")),
    "clusters: drawn": (("clusters", "drawn"), ("clusters", "none")),
    "clusters: mined instead of drawn": (("clusters", "top"), ("clusters", "drawn")),
    "clusters: mined, with the rule": (("clusters", "rule"), ("clusters", "none")),
    "clusters: the rule on the mined": (("clusters", "rule"), ("clusters", "top")),
    "mined in random batches instead of clusters": (("random", "top"), ("clusters", "none")),
}
"""Contrast -> what is compared with what."""


def _mining_rows(results: Results) -> Iterator[list[str]]:
    for title, (first, second) in MINING.items():
        found = (
            results.minus(mined_cell(data, *first, temperature), mined_cell(data, *second, temperature))
            for data, temperature in COLUMNS
        )
        yield [title, *map(points, found)]
    for batches in BATCHES:
        row = [f"{batches}{' batches' if batches == 'random' else ''}: hardness weights"]
        for data, temperature in COLUMNS:
            plain = mined_cell(data, batches, "none", temperature)
            is_tried = (data, temperature) == WEIGHTED
            row.append(points(results.minus(_weighted(batches), plain)) if is_tried else "")
        yield row


def _mean_parent(hits_PSE: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = hits_PSE.mean(axis=0)
    return found


def _best_parent(hits_PSE: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    best_S = hits_PSE.mean(axis=2).argmax(axis=0)
    return hits_PSE[best_S, np.arange(len(best_S))]


PARENT = {"minus the mean of its parents": _mean_parent, "minus the best parent of each seed": _best_parent}
"""What a soup is compared with -> its hits, of those of the parents."""


def _soup_rows(results: Results) -> Iterator[list[str]]:
    for name, cell in soup_cells().items():
        soup, parents = results.hits(cell), results.parents(cell)
        against = [points(interval(soup - of(parents))) for of in PARENT.values()]
        shares = [*parents.mean(axis=(1, 2)), soup.mean()]
        yield [name, *against, *(percent(float(share)) for share in shares)]


def _mining_scores(results: Results) -> Iterator[list[str]]:
    for data, temperature in COLUMNS:
        for batches in BATCHES:
            of_way = {
                mining: mined_cell(data, batches, mining, temperature) for mining in ("none", "drawn", "top", "rule")
            }
            row = [f"{data}, {batches}, {temperature}"]
            row += [percent(float(results.hits(cell).mean())) for cell in of_way.values()]
            for mining in ("top", "rule"):
                cell = of_way[mining]
                row += [f"{results.mean(cell, 'mined'):.1f}", percent(results.mean(cell, "false"))]
            yield row


def report(results: Results) -> str:
    """Return the report in Markdown."""
    head = ["contrast", *(f"{data}, {temperature}" for data, temperature in COLUMNS)]
    scores = [
        "data, batches, temperature",
        "none",
        "drawn",
        "mined",
        "with the rule",
        "mined a sample",
        "of them false",
    ]
    lines = [
        *_head(results),
        "## Mined negatives and batches",
        "",
        "Points of hit@1 with 95% intervals, paired, over seeds and queries (bootstrap). Bold: 0 is outside.",
        "",
        *table(head, list(_mining_rows(results))),
        "In percent. The last four columns: negatives of a sample after mining, and how many of them are right"
        " answers, without and with the rule.",
        "",
        *table([*scores, "mined a sample, rule", "of them false, rule"], list(_mining_scores(results))),
        "## Soups",
        "",
        "Points, then hit@1 in percent. The best parent of each seed is known after the test only.",
        "",
        *table(["soup", *PARENT, "parent 1", "parent 2", "parent 3", "soup"], list(_soup_rows(results))),
        "## What is not shown",
        "",
        "* One corpus and one small learner from random weights. A pretrained model may differ.",
        "* Bold marks one contrast at a time: of 100 contrasts without an effect, five are bold by chance.",
        "* A batch with 512 drawn negatives has 40% of all trained pictures. A large corpus leaves more to mining.",
        "* Negatives are mined once. Soups have equal weights.",
        "",
    ]
    return "\n".join(lines)


def _head(results: Results) -> list[str]:
    used = [run for (_, seed), run in results.runs.items() if seed < results.seeds]
    widths = [
        (high - low) / 2
        for first, second in MINING.values()
        for _, low, high in [results.minus(mined_cell("hard", *first, 0.02), mined_cell("hard", *second, 0.02))]
    ]
    return [
        "# Evidence: mined negatives, batches of look-alikes, and soups",
        "",
        "**Question.** Where the truth is known, what do negatives gain that the model itself has mined? Do batches of"
        " look-alikes gain as much? What does a soup gain over its parents?",
        "",
        f"**Design.** The emoji of [evidence.md](evidence.md): {EMOJI.num_items} emoji in five skin tones, two small"
        " towers, 400 steps of 128, hit@1 of held-out pictures. In `hard`, captions name the tone. In `false`, half"
        " of them do not. The objective is InfoNCE with ids of contents. Clusters are batches with four tones of 32"
        " emoji. Random batches have one tone of 128 emoji.",
        "",
        "**Mined negatives.** After 200 steps, the model ranks all trained pictures for each caption. Known answers"
        f" are left out. The first {MINED} are negatives of all queries of a batch for the other 200 steps. The rule"
        " leaves out candidates that score more than 95% of the positive (NV-Retriever). A control draws as many"
        f" among all trained pictures. A query then has up to {128 * (1 + MINED) - 1} negatives instead of 127.",
        "",
        "**Soups** are means of three parents with equal weights, on `hard`. The parents have 200 steps in common, at"
        f" temperature {START_TEMPERATURE}, and 200 of their own in three orders of the data. One kind also has the"
        " temperatures .02, .05 and .1. A control has no common start. The learning rate is constant.",
        "",
        f"**Registered before the first run:** {len(cells())} cells, {len(MINING) + len(BATCHES)} contrasts of mining,"
        f" {len(soup_cells()) * len(PARENT)} of soups, seeds 0 to {SEEDS - 1}. No setting was chosen by its"
        " score. The control and its four contrasts were added after seeds 0 and 1 of the other cells, before its own"
        f" first run. This report has {results.seeds} of these seeds.",
        "",
        f"**Power.** With {results.seeds} seeds of {EMOJI.num_items} queries, the 95% intervals of mining in `hard` at"
        f" .02 reach {100 * min(widths):.1f} to {100 * max(widths):.1f} points to each side. Smaller effects are not"
        " seen.",
        "",
        f"{describe_machine()}. {len(used):,} runs, {sum(run['cpu_s'] for run in used) / 60:.0f} CPU minutes.",
        "",
    ]


def main() -> None:
    """Do what is missing, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder of the packages, runs in `training` ({OUT})")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"seeds, from 0 on; {SEEDS} are registered")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="runs at a time (all cores)")
    parser.add_argument("--report", action="store_true", help="do no runs")
    parser.add_argument("--write", action="store_true", help="write evidence_training.md next to this file")
    arguments = parser.parse_args()
    say("registered: " + "; ".join([*MINING, *soup_cells()]))
    wanted = [(cell, seed) for seed in range(arguments.seeds) for cell in cells()]
    work = Work(EMOJI.read, arguments.out / "packages", train_any)
    out = arguments.out / "training"
    runs = do(out, wanted, work, processes=arguments.processes, only_read=arguments.report)
    show(report(Results(runs, arguments.seeds)), __file__, write=arguments.write)


if __name__ == "__main__":
    main()
