"""A test bed in which hardness weights and false-negative elimination can be seen, because the truth is known.

The data are items in five variants, such as emoji in five skin tones (`evidence_corpora`). A target is an item in one
variant. A query asks for an item in one variant, or in any.

    hard negatives     targets of the same item in other variants, for a query that names the variant
    false negatives    the same targets, for a query that names none: no hash shows them
    duplicates         queries without a variant, in the reverse direction

The learner has two small towers. The loss is `rzen.objective.loss.Objective` itself, so that a run takes seconds. One
variant of each item is never trained on. It is what the tests ask for.

Suffixes: E items, C contents of the 5 E targets, Q queries of a test, B of a batch, K mined negatives of a sample.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from rzen.config import FalseNegativeConfig, HardnessConfig, MinedConfig, ObjectiveConfig, TemperatureConfig
from rzen.evaluation.metrics import Relevant, metrics_by_query
from rzen.evaluation.ranking import rank_candidates
from rzen.objective.batch import Batch, Mined
from rzen.objective.loss import Objective
from rzen.objective.terms import false_negatives

VARIANTS = 5
TUNING = 100
"""Seeds from here on choose settings. They hold out other variants than the seeds below, which test."""
_HIDDEN, _WIDTH = 256, 64
_LR = 2e-3
_WATCHED = 50  # last steps, over which the rule's decisions are counted
_QUERY_IDS = 10_000  # ids of queries start here, behind those of targets


@dataclass(frozen=True)
class Bed:
    """The data: E items in five variants."""

    targets: Tensor
    """`[5 E, D]`, features of item `e` in variant `t` in row `5 e + t`."""
    queries: Tensor
    """`[6 E, F]`, features of the query for variant `t` in row `6 e + t`, for any variant in row `6 e + 5`."""
    contents: Tensor
    """`[5 E]`, number of each target's content, from 0 in the order of their first rows. Equal targets have the same.
    """

    @property
    def num_items(self) -> int:
        """Number of items, E."""
        return len(self.targets) // VARIANTS

    @cached_property
    def distinct(self) -> Tensor:
        """Return `[C]`, the first row of each content."""
        first: dict[int, int] = {}
        for row, content in enumerate(self.contents.tolist()):
            first.setdefault(content, row)
        return torch.tensor(list(first.values()))

    @cached_property
    def has(self) -> Tensor:
        """Return `[E, C]`, whether an item has a content in any variant."""
        found = torch.zeros(self.num_items, len(self.distinct), dtype=torch.bool)
        found[torch.arange(len(self.contents)) // VARIANTS, self.contents] = True
        return found


@dataclass(frozen=True)
class Cell:
    """What a run trains with. Everything else is the same for all runs."""

    direction: str = "names"
    """`names`: queries ask for targets. `classes`: targets ask for items, which repeat in a batch."""
    untoned: float = 0.0
    """Share of the queries that do not name the variant."""
    tones: int = 4
    """Variants of one item in a batch."""
    ids: bool = False
    """Whether the objective is given ids of contents."""
    rule: bool = False
    """Whether negatives that look like the positive are dropped."""
    oracle: bool = False
    """Whether the objective is told which negatives are false."""
    alpha: float = 0.0
    """Strength of hardness weights; 0 turns them off."""
    temperature: float = 0.02
    batch: int = 128
    steps: int = 400
    options: dict[str, Any] = field(default_factory=dict)
    """Further settings of `ObjectiveConfig`."""
    normalized: bool = False
    """Whether hardness weights have a mean of 1."""
    hardness_from: int = 0
    """First step with hardness weights."""
    learnable: bool = False
    """Whether the temperature is learned."""

    def key(self) -> str:
        """Return a text that is equal for equal cells only."""
        return json.dumps(self.__dict__, sort_keys=True)


@dataclass(frozen=True)
class Outcome:
    """What a run scores, from 0 to 1, and what the rule did in its last steps (None without the rule)."""

    scores: dict[str, float]
    hits: list[bool]
    """Per item: whether the test that its direction is trained for found a right answer first."""
    found: float | None
    """Share of the false negatives that the rule drops."""
    lost: float | None
    """Share of the hard negatives that the rule drops."""
    temperature: float


class TruthIdentity:
    """Stands for `rzen.objective.identity.Identity` where the truth is told: `[N, N]`, right answers of each query."""

    def __init__(self, right: Tensor) -> None:
        self._right = right

    def query_to_targets(self, row_R: Tensor) -> Tensor:
        """Return the right answers of some queries, `[R, N]`."""
        return self._right[row_R]


@dataclass(frozen=True)
class OracleBatch(Batch):
    """A batch whose right answers are known."""

    right: Tensor | None = None

    @cached_property
    def identity(self) -> Any:
        assert self.right is not None
        return TruthIdentity(self.right)


class Towers(nn.Module):
    """Two layers on the targets, and two on the queries."""

    def __init__(self, bed: Bed) -> None:
        super().__init__()
        self.target = _tower(bed.targets.shape[1])
        self.query = _tower(bed.queries.shape[1])

    def targets(self, rows: Tensor) -> Tensor:
        """Return the vectors of targets, from their features."""
        return normalize(self.target(rows), dim=1)

    def queries(self, rows: Tensor) -> Tensor:
        """Return the vectors of queries, from their features."""
        return normalize(self.query(rows), dim=1)


def _tower(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, _HIDDEN), nn.GELU(), nn.Linear(_HIDDEN, _WIDTH))


def held_out_variants(num_items: int, seed: int) -> np.ndarray[Any, Any]:
    """Return the variant of each item that a seed never trains on. Seeds that tune and seeds that test share none."""
    rng = np.random.default_rng([seed, 0])
    return 3 + rng.integers(0, 2, num_items) if seed >= TUNING else rng.integers(0, 3, num_items)


class Run:
    """One run. The seed draws the held-out variants, the queries, the weights and the order of the data.

    The queries and the order are the same for all cells that draw the same. Runs of one seed with another `order` draw
    other weights and another order of the same data. With a `start`, they continue from its weights, with a new
    optimizer.
    """

    def __init__(self, bed: Bed, cell: Cell, seed: int, start: Run | None = None, order: int = 0) -> None:
        assert cell.batch % cell.tones == 0
        self.bed, self.cell, self.step = bed, cell, 0
        self.held = held_out_variants(bed.num_items, seed)
        self._rng = np.random.default_rng([seed, 1])
        self.is_toned = self._rng.random((bed.num_items, VARIANTS)) >= cell.untoned
        torch.manual_seed(seed + 1000 * order)
        self.towers = Towers(bed)
        if start is not None:
            self.towers.load_state_dict(start.towers.state_dict())
        if start is not None or order:
            self._rng = np.random.default_rng([seed, 2, order])
        self.loss = _objective(cell, hardness=cell.alpha > 0)
        self._early = _objective(cell, hardness=False)
        weights = [
            {"params": self.towers.parameters(), "lr": _LR},
            {"params": self.loss.parameters(), "lr": 5 * _LR},
        ]
        self._optimizer = torch.optim.AdamW(weights, weight_decay=0.0)
        self._counted: list[tuple[float, float]] = []
        self.mined_TK: Tensor | None = None
        """`[5 E, K]`, contents of the mined negatives of the sample of each target; -1 for none."""

    def advance(self, steps: int) -> None:
        """Train for some steps."""
        for _ in range(steps):
            item, variant = _draw(self._rng, self.held, self.cell)
            asked = np.where(self.is_toned[item, variant], variant, VARIANTS)
            batch, right = self._batch(*map(torch.from_numpy, (item, variant, asked)))
            value, _ = (self._early if self.step < self.cell.hardness_from else self.loss)(batch, self.step)
            self._optimizer.zero_grad()
            value.backward()
            self._optimizer.step()
            self.loss.clamp_()
            if self.cell.rule and self.step >= self.cell.steps - _WATCHED:
                targets, config = batch.targets.detach(), self.loss.config
                self._counted.append(_rule_shares(targets, torch.from_numpy(item), right, config))
            self.step += 1

    def outcome(self) -> Outcome:
        """Return the scores so far."""
        scores, hits = _test(self.bed, self.towers, torch.from_numpy(self.held), self.cell)
        counted = self._counted
        found, lost = (_mean(shares) for shares in (zip(*counted, strict=True) if counted else ((), ())))
        return Outcome(scores, hits, found, lost, self.loss.temperatures()["emoji"])

    def _batch(self, item: Tensor, variant: Tensor, asked: Tensor) -> tuple[Batch, Tensor]:
        """Return a batch, and `[B, B]`: which targets are right answers of each query."""
        bed, towers, cell = self.bed, self.towers, self.cell
        row = VARIANTS * item + variant
        content, vectors = bed.contents[row], towers.targets(bed.targets[row])
        has_BB = bed.has[item][:, content]  # whether the item of a row has the content of a column
        if cell.direction == "classes":
            queries, targets = vectors, towers.queries(bed.queries[6 * item + VARIANTS])
            query_ids, target_ids, right = content, _QUERY_IDS + item, has_BB.T
        else:
            queries, targets = towers.queries(bed.queries[6 * item + asked]), vectors
            query_ids, target_ids = _QUERY_IDS + 6 * item + asked, content
            right = torch.where((asked == VARIANTS)[:, None], has_BB, content[:, None] == content)
        if cell.oracle:
            return OracleBatch(queries, targets, "emoji", right=right), right
        if cell.ids:
            mined = self._mined(row)
            return Batch(queries, targets, "emoji", mined=mined, target_ids=target_ids, query_ids=query_ids), right
        return Batch(queries, targets, "emoji"), right

    def _mined(self, row: Tensor) -> Mined | None:
        """Return the mined negatives of some samples, for all queries of the batch."""
        if self.mined_TK is None:
            return None
        content_M = self.mined_TK[row].flatten()
        is_there_M = content_M >= 0
        owner_M = torch.arange(len(row)).repeat_interleave(self.mined_TK.shape[1])[is_there_M]
        content_M = content_M[is_there_M]
        vectors = self.towers.targets(self.bed.targets[self.bed.distinct[content_M]])
        return Mined(vectors, owner_M, ids=content_M)


def train(bed: Bed, cell: Cell, seed: int) -> Outcome:
    """Train and test one run."""
    run = Run(bed, cell, seed)
    run.advance(cell.steps)
    return run.outcome()


def _mean(shares: Iterable[float]) -> float | None:
    known = [share for share in shares if not math.isnan(share)]
    return statistics.fmean(known) if known else None


def _objective(cell: Cell, hardness: bool) -> Objective:
    weights = HardnessConfig(alpha=cell.alpha, normalized=cell.normalized) if hardness else None
    rule = FalseNegativeConfig() if cell.rule else None
    temperature = TemperatureConfig(initial=cell.temperature, learnable=cell.learnable)
    settings: dict[str, Any] = {"mined": MinedConfig(hardness=weights)} | cell.options
    config = ObjectiveConfig(hardness=weights, false_negatives=rule, temperature=temperature, **settings)
    return Objective(config, ["emoji"])


def _draw(rng: np.random.Generator, held: np.ndarray[Any, Any], cell: Cell) -> tuple[Any, Any]:
    """Return item and variant of each sample of a batch: some variants of each of some items, none of them held out."""
    item = rng.choice(len(held), cell.batch // cell.tones, replace=False)
    order = rng.random((len(item), VARIANTS))
    order[np.arange(len(item)), held[item]] = 2  # last, and never taken
    variant = order.argsort(axis=1)[:, : cell.tones]
    return np.repeat(item, cell.tones), variant.reshape(-1)


def _rule_shares(targets: Tensor, item: Tensor, right: Tensor, config: ObjectiveConfig) -> tuple[float, float]:
    """Return the shares of false and of hard negatives that the rule drops; NaN where there are none."""
    assert config.false_negatives is not None
    itself = torch.eye(len(targets), dtype=torch.bool)
    dropped = false_negatives(targets @ targets.T, itself, torch.zeros_like(itself), config.false_negatives)
    false = right & ~itself
    hard = (item[:, None] == item) & ~right
    return float(dropped[false].float().mean()), float(dropped[hard].float().mean())


@torch.no_grad()
def _test(bed: Bed, towers: Towers, held: Tensor, cell: Cell) -> tuple[dict[str, float], list[bool]]:
    """Score the held-out variants: queries against all contents, and their targets against all items."""
    every = torch.arange(bed.num_items)
    targets, queries = towers.targets(bed.targets), towers.queries(bed.queries)
    contents, items, named = targets[bed.distinct], queries[6 * every + VARIANTS], queries[6 * every + held]
    asked = VARIANTS * every + held
    asked_EC = torch.nn.functional.one_hot(bed.contents[asked], len(contents)).bool()
    spec = _scored(named, contents, asked_EC)["hit@1"]
    classes = _scored(targets[asked], items, bed.has[:, bed.contents[asked]].T)["hit@1"]
    by_query = {
        "spec": spec,
        "map": _scored(items, contents, bed.has)[f"map@{len(contents)}"],
        "ndcg": _scored(named, contents, bed.has, asked_EC)["ndcg_exponential@10"],
        "classes": classes,
    }
    scores = {name: float(values.mean()) for name, values in by_query.items()}
    return scores, ((classes if cell.direction == "classes" else spec) == 1).tolist()


def _scored(queries: Tensor, candidates: Tensor, right_QC: Tensor, best_QC: Tensor | None = None) -> dict[str, Any]:
    """Return the metrics of each query, as evaluations have them. The grade of right answers is 1, of the best 2."""
    query_P, right_P = right_QC.nonzero(as_tuple=True)
    grade_P = torch.ones(len(query_P), dtype=torch.float64)
    if best_QC is not None:
        grade_P += best_QC[query_P, right_P]
    relevant = Relevant(query_P.numpy(), right_P.numpy(), grade_P.numpy(), len(queries))
    ranked = rank_candidates(queries.numpy(), candidates.numpy(), relevant, num_top=1, device="cpu")
    return metrics_by_query(relevant, ranked.rank, (1, 10, len(candidates)))
