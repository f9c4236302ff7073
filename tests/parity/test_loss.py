"""The objective against a double loop in fp64, written from the formulas of the papers and not from the code."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipelines.errors import UserError
from rzen.config import (
    FalseNegativeConfig,
    HardnessConfig,
    MinedConfig,
    ObjectiveConfig,
    TaskObjectiveConfig,
    TemperatureConfig,
)
from rzen.objective.batch import Batch, Mined
from rzen.objective.graded import cosent
from rzen.objective.identity import Identity
from rzen.objective.loss import Objective

RULE = FalseNegativeConfig(threshold=0.2, warmup_steps=10, max_dropped_fraction=0.3)
NO_CAP = FalseNegativeConfig(threshold=0.2, warmup_steps=10, max_dropped_fraction=1.0)
TASKS = ["text_video", "text_image"]
OFFSET, OWN, ALL, MINED, WIDTH = 4, 5, 11, 6, 6
IDS = [
    0,
    1,
    2,
    3,
    4,
    5,
    4,
    7,
    8,
    5,
    4,
]  # rows 4 to 8 are positives; 6 and 10 are duplicates of 4, 9 is a duplicate of 5
OWNERS = [4, 4, 6, -1, 8, 1]  # queries that the mined negatives belong to; one is padding
# Queries 2, 4 and 9 are equal. Query 7 shows what targets 5 and 9 show, and query 10 what its own target shows.
QUERY_IDS = [20, 21, 24, 23, 24, 25, 26, 5, 28, 24, 4]
INSTRUCTIONS = [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]  # with them, query 9 is not that of 2 and 4
MINED_IDS = [2, 30, 26, 4, 4, 5]  # a right answer of query 4, query 6 itself, and targets of other queries


def config(
    alpha: float = 9.0, rule: FalseNegativeConfig | None = RULE, tau: float = 0.1, **options: Any
) -> ObjectiveConfig:
    hardness = HardnessConfig(alpha=alpha) if alpha else None
    temperature = TemperatureConfig(initial=tau, learnable=True)
    return ObjectiveConfig(**{"hardness": hardness, "false_negatives": rule, "temperature": temperature} | options)


def unit(generator: torch.Generator, rows: int) -> Tensor:
    vectors = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)
    return normalize(vectors, dim=-1).requires_grad_()


def cut(vectors: Tensor, dims: int) -> Tensor:
    return vectors if dims == WIDTH else normalize(vectors[:, :dims], dim=1)


@dataclass
class RankData:
    """What one of two ranks sees: the queries of all, its own among them, the targets of all, mined negatives."""

    queries: Tensor
    targets: Tensor
    mined: Tensor
    ids: list[int] | None = None
    owners: list[int] | None = None
    query_ids: list[int] | None = None
    instructions: list[int] | None = None
    mined_ids: list[int] | None = None

    @property
    def own(self) -> Tensor:
        return self.queries[OFFSET : OFFSET + OWN]


def batch(ids: list[int] | None = None, owners: list[int] | None = None) -> RankData:
    generator = torch.Generator().manual_seed(3)
    return RankData(unit(generator, ALL), unit(generator, ALL), unit(generator, MINED), ids, owners)


@dataclass
class Column:
    """One term that a row may have in its denominator."""

    pool: str
    score: Tensor
    key: Tensor  # vector that is compared with the positive
    known: bool  # no negative, as the ids show
    is_answer: bool  # a right answer of the row
    hardness: HardnessConfig | None


@dataclass
class Known:
    """What the ids say, pair by pair. Contents are numbers; those without an id are equal to nothing."""

    data: RankData
    fault: str = ""

    def target(self, j: int) -> int:
        return self.data.ids[j] if self.data.ids else 1000 + j

    def query(self, j: int) -> int:
        return self.data.query_ids[j] if self.data.query_ids else 2000 + j

    def mined(self, m: int) -> int:
        return self.data.mined_ids[m] if self.data.mined_ids else 3000 + m

    def asked(self, j: int) -> tuple[int, int]:
        with_instruction = self.data.instructions and self.fault != "instructions ignored"
        return self.query(j), self.data.instructions[j] if with_instruction and self.data.instructions else 0

    def answers(self, i: int, content: int) -> bool:
        """Whether some pair calls this content a right answer of query i."""
        if self.fault == "equal queries are negatives":
            return content == self.target(i)
        return any(self.asked(k) == self.asked(i) and self.target(k) == content for k in range(ALL))

    def are_a_pair(self, one: int, other: int) -> bool:
        return any({one, other} == {self.query(k), self.target(k)} for k in range(ALL))

    def of_query(self, i: int, content: int) -> bool:
        """Whether a target or mined negative of this content is no negative of query i."""
        if self.answers(i, content):
            return True
        if self.fault == "the query itself stays":
            return False
        answered = any(self.target(k) == self.query(i) and self.query(k) == content for k in range(ALL))
        return content == self.query(i) or answered

    def of_queries(self, i: int, j: int) -> bool:
        in_common = any(self.answers(i, self.target(k)) and self.answers(j, self.target(k)) for k in range(ALL))
        return in_common or self.of_query(i, self.query(j))

    def of_target_and_query(self, i: int, j: int) -> bool:
        if self.answers(j, self.target(i)):
            return True
        if self.fault == "the query itself stays":
            return False
        answers = any(self.query(k) == self.target(i) and self.target(k) == self.query(j) for k in range(ALL))
        return self.query(j) == self.target(i) or answers

    def of_targets(self, i: int, j: int) -> bool:
        one, other = self.target(i), self.target(j)
        in_common = any(self.answers(k, one) and self.answers(k, other) for k in range(ALL))
        return one == other or in_common or self.are_a_pair(one, other)


@dataclass
class Oracle:
    """The loss, term by term, in the multiplicative form of the papers. `fault` plants a mistake."""

    config: ObjectiveConfig
    fault: str = ""
    step: int = 10

    def loss(self, batch: RankData, theta: Tensor) -> Tensor:
        tau_B = torch.exp(theta).expand(OWN)
        if self.fault == "one temperature for all rows":
            tau_B = tau_B[:1].expand(OWN)
        per_width = []
        first = 0 if self.fault == "own rows from zero" else OFFSET
        for dims in [*self.config.matryoshka, WIDTH]:
            forth = [self.row(*self.columns(batch, first + b, dims), tau_B[b]) for b in range(OWN)]
            back = [self.row(*self.columns_back(batch, OFFSET + b, dims), tau_B[b]) for b in range(OWN)]
            share = self.config.symmetric
            per_width.append((1 - share) * sum(forth) / OWN + share * sum(back) / OWN)
        return sum(per_width) / len(per_width)

    def cut(self, vectors: Tensor, dims: int) -> Tensor:
        return vectors[:, :dims] if self.fault == "widths not normalized" else cut(vectors, dims)

    def columns(self, batch: RankData, i: int, dims: int) -> tuple[Column, list[Column]]:
        """The positive of query i, and everything else it meets."""
        queries, targets, mined = (self.cut(part, dims) for part in (batch.queries, batch.targets, batch.mined))
        hardness, ids = self.config.hardness, Known(batch, self.fault)

        def column(pool: str, score: Tensor, j: int, known: bool, is_answer: bool = False) -> Column:
            return Column(pool, score, batch.targets[j].detach(), known, is_answer, hardness)

        def target(j: int) -> Column:
            content = ids.target(j)
            return column("targets", queries[i] @ targets[j], j, ids.of_query(i, content), ids.answers(i, content))

        positive = target(i)
        others = [target(j) for j in range(ALL) if j != i and self.config.in_batch]
        with_itself = self.fault == "a row is its own negative"
        if "queries" in self.config.same_side:
            for j in range(ALL):
                if j != i or with_itself:
                    known = ids.of_queries(i, j) and not (j == i and with_itself)
                    others.append(column("queries", queries[i] @ queries[j], j, known))
        if "targets" in self.config.same_side:
            for j in range(ALL):
                if j != i or with_itself:
                    known = ids.of_targets(i, j) and not (j == i and with_itself)
                    others.append(column("same targets", targets[i] @ targets[j], j, known))
        if batch.owners is not None:
            shared, weights = self.config.mined.shared, self.config.mined.hardness
            for m, owner in enumerate(batch.owners):
                mine = i + 1 if self.fault == "mined for the next query" else i
                if owner == mine or (owner >= 0 and shared):
                    key = batch.mined[m].detach()
                    known = ids.of_query(i, ids.mined(m)) and self.fault != "mined negatives without ids"
                    others.append(Column("mined", queries[i] @ mined[m], key, known, False, weights))
        return positive, others

    def columns_back(self, batch: RankData, i: int, dims: int) -> tuple[Column, list[Column]]:
        """The query of target i, and all other queries."""
        queries, targets = (self.cut(part, dims) for part in (batch.queries, batch.targets))
        found, ids = [], Known(batch, self.fault)
        for j in range(ALL):
            known, is_answer = ids.of_target_and_query(i, j), ids.answers(j, ids.target(i))
            key = batch.targets[j].detach()
            found.append(Column("targets", targets[i] @ queries[j], key, known, is_answer, self.config.hardness))
        return found[i], found[:i] + found[i + 1 :]

    def row(self, positive: Column, others: list[Column], tau: Tensor) -> Tensor:
        rule = self.config.false_negatives if self.step >= 10 else None
        duplicates = [column for column in others if column.known]
        dropped = set() if self.fault == "duplicates stay" else {id(column) for column in duplicates}
        if rule is not None:
            like = {id(column): float(column.key @ positive.key) for column in others}
            if self.fault == "likeness to the query":
                like = {id(column): float(column.score.detach()) for column in others}
            if self.fault != "duplicates stay":
                like |= {id(column): math.inf for column in duplicates}
            cap = len(others) if self.fault == "no cap" else int(rule.max_dropped_fraction * len(others))
            falling = [*sorted((like[id(column)] for column in others), reverse=True), -math.inf]
            least = max(rule.threshold, falling[cap])  # ties at the cap stay
            dropped |= {id(column) for column in others if like[id(column)] > least}
        if self.config.margin is not None:
            most = (0 if self.fault == "margin from zero" else float(positive.score.detach())) + self.config.margin
            dropped |= {id(column) for column in others if float(column.score.detach()) > most}
        kept = [column for column in others if id(column) not in dropped]
        negatives = torch.zeros((), dtype=torch.float64)
        for pool in sorted({column.pool for column in kept}):
            group = [column for column in kept if column.pool == pool]
            weights = [self.weight(column, tau) for column in group]
            hardness = group[0].hardness
            if hardness is not None and hardness.normalized:
                counted = others if self.fault == "mean over dropped too" else group
                of_pool = [self.weight(column, tau) for column in counted if column.pool == pool]
                mean = sum(of_pool) / len(of_pool)
                weights = [weight / mean for weight in weights]
            for weight, column in zip(weights, group, strict=True):
                negatives = negatives + weight * torch.exp(column.score / tau)
        wanted = [positive]
        if self.config.duplicates == "positive":
            wanted += [column for column in duplicates if column.is_answer]
        losses = []
        for column in wanted:
            numerator = torch.exp(column.score / tau)
            denominator = numerator + negatives
            if self.fault == "positive weighted too":
                assert self.config.hardness is not None
                numerator = numerator * torch.exp(self.config.hardness.alpha * column.score.detach())
                denominator = numerator + negatives
            losses.append(-torch.log(numerator / denominator))
        loss = sum(losses) / len(losses)
        if self.config.focal_gamma is not None:
            loss = (1 - torch.exp(-loss)) ** self.config.focal_gamma * loss
        return loss

    def weight(self, column: Column, tau: Tensor) -> Tensor:
        hardness = column.hardness
        if hardness is None:
            return torch.ones((), dtype=torch.float64)
        exponent = hardness.alpha * column.score
        if self.fault == "alpha scaled by temperature":
            exponent = exponent / tau
        flows = (hardness.gradient == "flowing") != (self.fault == "weight not detached")
        return torch.exp(exponent if flows else exponent.detach())


def ids_of(numbers: list[int] | None) -> Tensor | None:
    return None if numbers is None else torch.tensor(numbers)


def mined_of(made: ObjectiveConfig, data: RankData, owners: list[int], teacher: Tensor | None = None) -> Mined:
    """The mined negatives as training brings them: all of them, or those of each own query with room behind them."""
    ids, owner_M = ids_of(data.mined_ids), torch.tensor(owners)
    if made.mined.shared:
        return Mined(data.mined, owner_M, teacher, ids)
    of_query = [[m for m, owner in enumerate(owners) if owner == i] for i in range(OFFSET, OFFSET + OWN)]
    most = max(map(len, of_query))
    place = torch.tensor([(some + [owners.index(-1)] * most)[:most] for some in of_query])  # one without an owner
    owner, scores, contents = (None if part is None else part[place] for part in (owner_M, teacher, ids))
    return Mined(data.mined[place], owner, scores, contents)


def evaluate(made: ObjectiveConfig, data: RankData, step: int = 10, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Our loss, and its gradients by queries, targets, mined negatives and theta."""
    objective = Objective(made, TASKS).to(dtype)
    mined = None if data.owners is None else mined_of(made, data, data.owners)
    loss, _ = objective(
        Batch(
            data.own,
            data.targets,
            "text_image",
            positive_offset=OFFSET,
            all_queries=data.queries if objective.needs_queries else None,
            mined=mined,
            target_ids=ids_of(data.ids),
            query_ids=ids_of(data.query_ids),
            instruction_ids=ids_of(data.instructions),
        ),
        step=step,
    )
    found = gradients(loss, data, objective.theta_T)
    assert found[-1][1] == 0.0  # the other task
    return [*found[:-1], found[-1][0]]


def expected(made: ObjectiveConfig, data: RankData, step: int = 10, fault: str = "") -> list[Tensor]:
    """The same by the double loop."""
    tau = made.temperature.initial
    theta = torch.tensor(math.log(tau), dtype=torch.float32).double().requires_grad_()
    return gradients(Oracle(made, fault, step).loss(data, theta), data, theta)


def gradients(loss: Tensor, data: RankData, theta: Tensor) -> list[Tensor]:
    leaves = [data.queries, data.targets, data.mined, theta]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    zeros = [torch.zeros_like(leaf) if part is None else part for part, leaf in zip(found, leaves, strict=True)]
    return [loss.detach().reshape(1), *zeros]


def distance(ours: list[Tensor], others: list[Tensor]) -> float:
    """Largest difference, relative to the largest number of its tensor."""
    pairs = zip(ours, others, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-300)) for a, b in pairs)


OPTIONS: dict[str, dict[str, Any]] = {
    "recipe": {},
    "no weights": {"hardness": None},
    "rule off": {"false_negatives": None},
    "uncapped": {"false_negatives": NO_CAP},
    "flowing": {"hardness": HardnessConfig(gradient="flowing")},
    "normalized": {"hardness": HardnessConfig(normalized=True)},
    "normalized, flowing": {"hardness": HardnessConfig(normalized=True, gradient="flowing")},
    "duplicates are positives": {"duplicates": "positive"},
    "margin": {"margin": 0.05},
    "focal": {"focal_gamma": 2.0},
    "symmetric": {"symmetric": 0.5},
    "reverse alone": {"symmetric": 1.0},
    "other queries": {"same_side": ["queries"]},
    "all pairs": {"same_side": ["queries", "targets"]},
    "matryoshka": {"matryoshka": [2, 4]},
    "mined for one": {"mined": MinedConfig(shared=False)},
    "mined without weights": {"mined": MinedConfig(hardness=None)},
    "mined normalized": {"mined": MinedConfig(hardness=HardnessConfig(alpha=2.0, normalized=True))},
    "everything": {
        "hardness": HardnessConfig(alpha=5.0, gradient="flowing", normalized=True),
        "duplicates": "positive",
        "margin": 0.2,
        "focal_gamma": 1.5,
        "symmetric": 0.3,
        "same_side": ["queries", "targets"],
        "matryoshka": [3],
        "mined": MinedConfig(shared=False, hardness=HardnessConfig(alpha=1.0)),
    },
}


@pytest.mark.parametrize("ids", [None, IDS], ids=["no ids", "ids"])
@pytest.mark.parametrize("owners", [None, OWNERS], ids=["in-batch", "mined"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_loss_and_gradients_equal_the_double_loop(
    options: dict[str, Any], owners: list[int] | None, ids: list[int] | None
) -> None:
    data = batch(ids, owners)
    made = config(**options)
    assert distance(evaluate(made, data), expected(made, data)) < 1e-9


MINED_ONLY: dict[str, dict[str, Any]] = {
    "shared": {},
    "own": {"mined": MinedConfig(shared=False), "matryoshka": [3]},
    "own, with rules": {"mined": MinedConfig(shared=False, hardness=None), "margin": 0.1, "focal_gamma": 1.5},
}


@pytest.mark.parametrize("tile_rows", [None, 2])
@pytest.mark.parametrize("options", MINED_ONLY.values(), ids=MINED_ONLY)
def test_without_in_batch_negatives_only_mined_ones_count(options: dict[str, Any], tile_rows: int | None) -> None:
    data = replace(batch(IDS, OWNERS), mined_ids=MINED_IDS)
    made = config(in_batch=False, tile_rows=tile_rows, **options)
    assert distance(evaluate(made, data), expected(made, data)) < 1e-9
    assert distance(evaluate(made, data), expected(config(**options), data)) > 1e-2
    lonely, *zeros = evaluate(made, batch(IDS))  # a batch without mined negatives has nothing to learn from
    assert not lonely.any()
    assert not any(part.any() for part in zeros)


def test_own_mined_negatives_are_scored_without_those_of_others() -> None:
    """No tensor has a column for the mined negatives of each query, which a mask would need."""
    num_own, wide = 40, 30
    generator = torch.Generator().manual_seed(1)
    queries, targets, mined = (unit(generator, rows) for rows in (num_own, num_own, num_own * wide))
    given = Mined(mined.view(num_own, wide, -1), torch.arange(num_own)[:, None].expand(-1, wide), ids=None)
    objective = Objective(config(mined=MinedConfig(shared=False)), ["t"]).double()
    with Largest() as seen:
        objective(Batch(queries, targets, "t", mined=given), step=10)[0].backward()
    assert seen.num_bytes <= 8 * num_own * wide * WIDTH


def test_a_task_may_have_settings_of_its_own() -> None:
    own = {"hardness": None, "false_negatives": None, "margin": 0.3, "mined": MinedConfig(shared=False)}
    made = config(margin=0.05, tasks={"text_image": TaskObjectiveConfig(**own)})
    data = batch(IDS, OWNERS)
    alone = made.of_task("text_image")
    assert alone == config(**own)
    assert made.of_task("other") == config(margin=0.05)
    objective = Objective(made, TASKS)
    assert [objective.shares_mined(task) for task in TASKS] == [task != "text_image" for task in TASKS]
    for task, settings in (("text_image", alone), (next(t for t in TASKS if t != "text_image"), made.of_task("x"))):
        losses = [
            Objective(some, TASKS).double()(
                Batch(data.own, data.targets, task, OFFSET, mined=mined_of(settings, data, OWNERS)), step=10
            )[0]
            for some in (made, settings)
        ]
        assert torch.equal(*losses)


def test_settings_of_tasks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"^objective\.tasks\.x: is no task of the sources .*; name one of a, b$"):
        Objective(config(tasks={"x": TaskObjectiveConfig(in_batch=False)}), ["b", "a"])
    with pytest.raises(ValueError, match=r"tasks\.a: in_batch: false leaves symmetric and same_side without negatives"):
        ObjectiveConfig(symmetric=0.5, tasks={"a": TaskObjectiveConfig(in_batch=False)})
    ObjectiveConfig(symmetric=0.5, tasks={"a": TaskObjectiveConfig(in_batch=False, symmetric=0.0)})
    mixed = Objective(config(tasks={"a": TaskObjectiveConfig(margin=0.3)}), ["b", "a"]).double()
    data = batch()
    rows = Batch(data.own, data.targets, ["a"] * (OWN - 1) + ["b"], OFFSET)
    with pytest.raises(UserError, match="tasks 'a' and 'b' are contrasted with each other, and differ"):
        mixed(rows, step=0)


def with_equal_queries(instructions: list[int] | None = None) -> RankData:
    return replace(batch(IDS, OWNERS), query_ids=QUERY_IDS, instructions=instructions, mined_ids=MINED_IDS)


@pytest.mark.parametrize("instructions", [None, INSTRUCTIONS], ids=["no instructions", "instructions"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_ids_of_queries_and_mined_negatives_equal_the_double_loop(
    options: dict[str, Any], instructions: list[int] | None
) -> None:
    data, made = with_equal_queries(instructions), config(**options)
    assert distance(evaluate(made, data), expected(made, data)) < 1e-9


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_ids_without_equal_contents_change_no_bit(options: dict[str, Any]) -> None:
    data, made = batch(IDS, OWNERS), config(**options)
    named = replace(
        data, query_ids=list(range(100, 100 + ALL)), instructions=INSTRUCTIONS, mined_ids=[*range(200, 206)]
    )
    for one, other in zip(evaluate(made, data), evaluate(made, named), strict=True):
        assert torch.equal(one, other)


def test_the_quick_way_for_distinct_queries_marks_the_same() -> None:
    rows = torch.arange(OFFSET, OFFSET + OWN)
    mined = torch.tensor([4, 9, 104, 5, 200, 7])  # targets, a query and others
    made = (torch.tensor(IDS), torch.arange(100, 100 + ALL), None, mined, ALL, MINED, torch.device("cpu"))
    quick = Identity.of(*made)
    slow = replace(quick, is_plain=False)
    assert quick.is_plain
    for name in ("query_to_targets", "query_to_mined", "target_to_queries"):
        marks = getattr(quick, name)(rows)
        assert torch.equal(marks, getattr(slow, name)(rows)), name
        assert marks.any()
    for query_ids in (torch.tensor(QUERY_IDS), torch.arange(1, 1 + ALL), torch.tensor([100] * ALL)):
        assert not Identity.of(made[0], query_ids, *made[2:]).is_plain


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_batch_of_one_query_has_nothing_to_learn(options: dict[str, Any]) -> None:
    """Nothing is a negative of anything, and no gradient becomes NaN by that."""
    targets = list(range(ALL))
    mined = targets[:MINED]
    data = replace(batch(targets, OWNERS), query_ids=[50] * ALL, mined_ids=mined)
    for part in evaluate(config(**options), data):
        assert part.eq(0).all()


@pytest.mark.parametrize("tile_rows", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("tau", [0.5, 0.005], ids=["loss of about 3", "tiny losses"])
@pytest.mark.parametrize("options", [OPTIONS["recipe"], OPTIONS["everything"]], ids=["recipe", "everything"])
def test_tiles_change_nothing(options: dict[str, Any], tau: float, tile_rows: int) -> None:
    data = with_equal_queries()
    whole, tiled = (evaluate(config(tau=tau, tile_rows=rows, **options), data) for rows in (None, tile_rows))
    assert distance(tiled, whole) < 1e-12


IDENTITY_FAULTS: dict[str, dict[str, Any]] = {
    "equal queries are negatives": {"symmetric": 0.5},
    "the query itself stays": {"symmetric": 0.5, "hardness": None},
    "instructions ignored": {"symmetric": 0.5},
    "mined negatives without ids": {},
}


@pytest.mark.parametrize("fault", IDENTITY_FAULTS)
def test_the_double_loop_catches_planted_faults_of_ids(fault: str) -> None:
    data, made = with_equal_queries(INSTRUCTIONS), config(**IDENTITY_FAULTS[fault], rule=None)
    assert distance(evaluate(made, data), expected(made, data)) < 1e-9
    assert distance(evaluate(made, data), expected(made, data, fault=fault)) > 1e-2


FAULTS: dict[str, dict[str, Any]] = {
    "alpha scaled by temperature": {},
    "weight not detached": {},
    "positive weighted too": {},
    "rule too early": {},
    "no cap": {},
    "own rows from zero": {},
    "duplicates stay": {},
    "likeness to the query": {},
    "mined for the next query": {"mined": MinedConfig(shared=False)},
    "a row is its own negative": {"same_side": ["queries", "targets"]},
    "widths not normalized": {"matryoshka": [2, 4]},
    "margin from zero": {"margin": 0.05, "false_negatives": None},
    "mean over dropped too": {"hardness": HardnessConfig(normalized=True)},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_double_loop_catches_planted_faults(fault: str) -> None:
    data, made = batch(IDS, OWNERS), config(**FAULTS[fault])
    assert distance(evaluate(made, data), expected(made, data)) < 1e-9
    step = 9 if fault == "rule too early" else 10
    assert distance(evaluate(made, data, step), expected(made, data, fault=fault)) > 1e-2


def test_the_gradient_is_that_of_whatever_follows_the_loss() -> None:
    """Which the tiles do not know yet when they take theirs; nor do they take what nobody asks for."""
    data = batch(IDS)
    objective = Objective(config(tile_rows=2), TASKS).double()
    leaves = [data.queries, data.targets, objective.theta_T]

    def loss_of(targets: Tensor) -> Tensor:
        ids = torch.tensor(IDS)
        return objective(Batch(data.own, targets, "text_image", positive_offset=OFFSET, target_ids=ids), step=10)[0]

    loss = loss_of(data.targets)
    plain = torch.autograd.grad(loss, leaves, retain_graph=True)
    squared = torch.autograd.grad(loss**2, leaves)
    for once, twice in zip(plain, squared, strict=True):
        torch.testing.assert_close(twice, 2 * loss.detach() * once, rtol=1e-12, atol=0)
    with torch.no_grad():
        assert torch.equal(loss_of(data.targets), loss)
    objective.requires_grad_(False)
    (frozen,) = torch.autograd.grad(loss_of(data.targets.detach()), data.queries)
    assert torch.equal(frozen, plain[0])


@dataclass
class Line:
    """Pairs whose loss is chosen by tau: each query points to its target, or away from it."""

    sign: float
    tau: float


LOSSES = {1e-6: Line(1.0, 0.00884), 1e-3: Line(1.0, 0.0195), 1.0: Line(1.0, 0.471), 10.0: Line(-1.0, 0.16)}


@pytest.mark.parametrize("tile_rows", [None, 1, 2, 4, 5])
@pytest.mark.parametrize("size", LOSSES)
def test_losses_of_all_sizes_keep_their_gradients(size: float, tile_rows: int | None) -> None:
    """Against the double loop in fp64; fp32 keeps four digits of a loss of 1e-6 and of its gradients."""
    made = config(alpha=0.0, rule=None, tau=LOSSES[size].tau, tile_rows=tile_rows)
    data = batch()
    data.queries = normalize(LOSSES[size].sign * data.targets.detach() + 0.1 * data.queries.detach(), dim=1)
    data.queries.requires_grad_()
    exact = expected(made, data)
    assert size / 2 < float(exact[0]) < 2 * size
    assert distance(evaluate(made, data), exact) < 1e-9
    for name in ("queries", "targets", "mined"):
        setattr(data, name, getattr(data, name).detach().float().requires_grad_())
    assert distance(evaluate(made, data, dtype=torch.float32), exact) < 1e-4


class Largest(TorchDispatchMode):
    """Notes the largest memory, in bytes, that any tensor made meanwhile has."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        sizes = [part.untyped_storage().nbytes() for part in tree_leaves(made) if isinstance(part, Tensor)]
        self.num_bytes = max([self.num_bytes, *sizes])
        return made


def largest_tensor(made: ObjectiveConfig, data: RankData) -> int:
    with Largest() as seen:
        evaluate(made, data)
    return seen.num_bytes


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_tiles_never_hold_queries_times_columns(options: dict[str, Any]) -> None:
    """Forward and backward. What a tile holds is at most its rows times all columns, of 8 bytes."""
    data = batch(IDS, OWNERS)
    most_of_one = max(OWNERS.count(owner) for owner in range(OFFSET, OFFSET + OWN))
    num_columns = ALL + (MINED if config(**options).mined.shared else most_of_one)
    if "queries" in (same_side := options.get("same_side", [])):
        num_columns += ALL * len(same_side)
    inputs = 8 * ALL * WIDTH
    tile_rows = 2
    bound = max(inputs, 8 * tile_rows * num_columns)
    assert largest_tensor(config(tile_rows=tile_rows, **options), data) <= bound
    if 8 * OWN * num_columns > bound:
        assert largest_tensor(config(**options), data) > bound  # all at once shows: so would tiles that are ignored


def perfect(groups: list[int], queries: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Unit vectors in fp64. A query is its target, and that of a group is the mean of its targets."""
    generator = torch.Generator().manual_seed(0)
    targets = normalize(torch.randn(len(groups), 16, generator=generator, dtype=torch.float64), dim=1)
    members = torch.tensor([[float(one == other) for other in groups] for one in groups], dtype=torch.float64)
    return normalize(members @ targets, dim=1), targets


ALL_POOLS = {"symmetric": 0.5, "same_side": ["queries", "targets"], "mined": MinedConfig(hardness=None)}


def test_a_perfect_model_has_no_loss_from_equal_queries() -> None:
    """Two pictures that one caption describes. Each is a right answer, so that nothing is left to learn."""
    queries, targets = perfect([0, 0, 2, 3])
    objective = Objective(config(alpha=0.0, rule=None, tau=0.02, **ALL_POOLS), ["t"]).double()
    ids = {"target_ids": torch.arange(4), "query_ids": torch.tensor([10, 10, 12, 13])}
    blind, _ = objective(Batch(queries, targets, "t", all_queries=queries, target_ids=torch.arange(4)), step=0)
    loss, stats = objective(Batch(queries, targets, "t", all_queries=queries, **ids), step=0)
    assert float(blind.detach()) > 0.3
    assert float(loss.detach()) < 1e-3
    assert float(stats["accuracy"]) == 1.0


@pytest.mark.parametrize("owner", [0, 1, 2])
def test_a_mined_negative_that_is_a_positive_is_left_out(owner: int) -> None:
    """By hand in fp64: it shows what target 1 shows, so that only query 1 does without it, whoever it was mined for."""
    queries, targets = perfect([0, 1, 2, 3])
    objective = Objective(config(alpha=0.0, rule=None, tau=0.05, mined=MinedConfig(hardness=None)), ["t"]).double()
    mined = Mined(targets[1:2].clone(), torch.tensor([owner]), ids=torch.tensor([1]))
    loss, _ = objective(Batch(queries, targets, "t", mined=mined, target_ids=torch.arange(4)), step=0)
    rows = []
    for i in range(4):
        columns = [queries[i] @ target for target in targets] + ([] if i == 1 else [queries[i] @ targets[1]])
        rows.append(torch.logsumexp(torch.stack(columns) / 0.05, 0) - queries[i] @ targets[i] / 0.05)
    assert float(loss.detach()) == pytest.approx(float(sum(rows) / 4), rel=1e-5)


def test_a_query_that_is_a_target_is_no_negative_of_itself() -> None:
    """Pairs b -> c and a -> b: b is query 0 and target 1. Query 0 is not pushed away from b, a and c.

    What is left of its negatives is the third pair, which is far.
    """
    one, other = torch.eye(4, dtype=torch.float64)[:2]
    vectors = torch.stack([one, one, other])
    made = config(alpha=0.0, rule=None, tau=0.05, same_side=["queries", "targets"], mined=MinedConfig(hardness=None))
    objective = Objective(made, ["t"]).double()
    for mined_id in (1, 2, 0):  # b itself, its answer, and the query that it answers
        losses = []
        for ids in ({"query_ids": torch.tensor([1, 0, 4])}, {}):
            mined = Mined(one[None], torch.tensor([0]), ids=torch.tensor([mined_id]) if ids else None)
            data = Batch(vectors[:1], vectors, "t", all_queries=vectors, mined=mined, **ids)
            losses.append(float(objective(replace(data, target_ids=torch.tensor([2, 1, 5])), step=0)[0].detach()))
        assert losses[0] < 1e-6
        assert losses[1] > 1


def test_without_extras_it_is_cross_entropy() -> None:
    data = batch()
    loss, _ = Objective(config(alpha=0.0, rule=None), TASKS).double()(
        Batch(data.own, data.targets, "text_image", positive_offset=2), step=0
    )
    plain = torch.nn.functional.cross_entropy(data.own @ data.targets.T / 0.1, torch.arange(2, 7))
    assert float((loss - plain).detach()) == pytest.approx(0.0, abs=1e-6)


def test_hand_written_case() -> None:
    """s+ = 1, one negative at s = 0.6, tau = 0.5, alpha = 2: -log(e^2 / (e^2 + e^1.2 e^1.2)) = log(1 + e^0.4)."""
    query = torch.tensor([[1.0, 0.0]])
    targets = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    loss, stats = Objective(config(alpha=2.0, rule=None, tau=0.5), ["t"])(Batch(query, targets, "t"), step=0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(0.4)), rel=1e-6)
    assert {name: round(float(value), 4) for name, value in stats.items()} == {
        "loss": 0.913,
        "temperature": 0.5,
        "effective_temperature": 0.25,
        "dropped_fraction": 0.0,
        "duplicate_fraction": 0.0,
        "effective_fraction": 1.0,
        "positive_similarity": 1.0,
        "negative_similarity": 0.6,
        "margin": 0.4,
        "accuracy": 1.0,
    }


def test_statistics_count_drops_and_ties_against_the_query() -> None:
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    objective = Objective(config(rule=None), ["t"])
    _, plain = objective(Batch(queries, targets, "t"), step=0)
    _, aware = objective(Batch(queries, targets, "t", target_ids=torch.tensor([7, 8, 7])), step=0)
    assert (float(plain["accuracy"]), float(plain["dropped_fraction"])) == (0.5, 0.0)
    assert (float(aware["accuracy"]), float(aware["dropped_fraction"])) == (1.0, 0.25)
    assert (float(plain["duplicate_fraction"]), float(aware["duplicate_fraction"])) == (0.0, 0.25)
    # The first query has a duplicate of its positive, at the same score. The other one leads by 1.
    assert (float(plain["margin"]), float(aware["margin"])) == (0.5, 1.0)
    assert float(plain["effective_temperature"]) == pytest.approx(1 / (1 / 0.1 + 9))


def test_what_the_rule_drops_is_not_counted_as_duplicates() -> None:
    targets = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, 0.0]]), dim=1)
    rule = FalseNegativeConfig(threshold=0.9, warmup_steps=0, max_dropped_fraction=1.0)
    ids = torch.tensor([1, 2, 3, 1])
    _, stats = Objective(config(rule=rule), ["t"])(Batch(targets[:1], targets, "t", target_ids=ids), step=0)
    assert float(stats["dropped_fraction"]) == pytest.approx(2 / 3)
    assert float(stats["duplicate_fraction"]) == pytest.approx(1 / 3)
    assert float(stats["margin"]) == 1.0
    _, stats = Objective(config(rule=rule), ["t"])(Batch(targets[:1], targets[:2], "t"), step=0)
    assert float(stats["margin"]) == 0.0  # nothing is left to lead


@pytest.mark.parametrize("noise", [0.0, 1e-4, 0.01], ids=["identical", "nearly identical", "anisotropic"])
def test_guard_keeps_the_loss_of_an_untrained_model_above_zero(noise: float) -> None:
    generator = torch.Generator().manual_seed(0)
    alike = torch.ones(8, 6) + noise * torch.randn(8, 6, generator=generator)
    targets = torch.nn.functional.normalize(alike, dim=-1)
    queries = targets.clone().requires_grad_()

    def run(max_dropped_fraction: float) -> tuple[float, float]:
        rule = FalseNegativeConfig(threshold=0.95, warmup_steps=0, max_dropped_fraction=max_dropped_fraction)
        loss, stats = Objective(config(rule=rule), ["t"])(Batch(queries, targets, "t"), step=0)
        return loss.item(), stats["dropped_fraction"].item()

    loss, dropped = run(0.5)  # of 7 negatives at most 3 go
    assert loss > 1.0
    assert dropped <= 3 / 7 + 1e-6
    assert run(1.0) == (0.0, 1.0)  # the trap that the guard is for


def test_copies_fill_the_cap_first() -> None:
    """Of 4 negatives, 3 are duplicates by id. They use up a cap of one half, so the fourth, as similar, stays."""
    targets = torch.tensor([[1.0, 0.0]]).repeat(5, 1)
    rule = FalseNegativeConfig(threshold=0.9, warmup_steps=0, max_dropped_fraction=0.5)
    _, stats = Objective(config(rule=rule), ["t"])(
        Batch(targets[:1], targets, "t", target_ids=torch.tensor([1, 1, 1, 1, 2])), step=0
    )
    assert float(stats["dropped_fraction"]) == 0.75


def test_log_space_survives_the_smallest_temperature() -> None:
    data = batch()
    objective = Objective(config(alpha=9.0, rule=None, tau=0.005), ["t"])
    loss, _ = objective(Batch(data.own.float(), data.targets.float(), "t"), step=0)
    (gradient,) = torch.autograd.grad(loss, data.queries)
    assert math.isfinite(loss.item())
    assert bool(gradient.isfinite().all())


def test_bf16_embeddings_are_scored_in_fp32_even_under_autocast() -> None:
    queries, targets = (part.detach().bfloat16() for part in (batch().own, batch().targets))
    objective = Objective(config(), ["t"])
    expected, _ = objective(Batch(queries.float(), targets.float(), "t"), step=10)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = objective(Batch(queries, targets, "t"), step=10)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)


def test_temperature_stops_at_its_bounds_and_returns() -> None:
    objective = Objective(config(tau=0.1), ["t"])
    with torch.no_grad():
        objective.theta_T.fill_(math.log(0.001))
    assert objective.temperature("t").item() == pytest.approx(0.005)
    objective.clamp_()
    assert float(objective.theta_T.exp()) == pytest.approx(0.005)
    objective.temperature("t").backward()
    assert float(objective.theta_T.grad) == pytest.approx(0.005)  # d tau / d theta = tau: not cut at the bound
    with torch.no_grad():
        objective.theta_T += 1.0
    assert objective.temperature("t").item() == pytest.approx(0.005 * math.e)


def test_fixed_temperature_is_not_trained() -> None:
    fixed = ObjectiveConfig(temperature=TemperatureConfig(initial=0.02, learnable=False))
    assert [p.requires_grad for p in Objective(fixed, ["t"]).parameters()] == [False]


def test_unknown_task_names_the_known_ones() -> None:
    data = batch()
    with pytest.raises(UserError, match=r"task 'audio'.*known tasks: text_image, text_video"):
        Objective(config(), TASKS)(Batch(data.own, data.targets, "audio"), step=0)


def test_small_losses_keep_their_precision() -> None:
    """At a loss of 1e-6 the fp32 loss is still right to 1e-4 of itself: a difference of logarithms would not be."""
    generator = torch.Generator().manual_seed(0)
    targets = normalize(torch.randn(64, 16, generator=generator, dtype=torch.float64), dim=1)
    made = config(alpha=0.0, rule=None, tau=0.05)
    exact, _ = Objective(made, ["t"]).double()(Batch(targets, targets, "t"), step=0)
    loss, _ = Objective(made, ["t"])(Batch(targets.float(), targets.float(), "t"), step=0)
    assert 1e-8 < float(exact) < 1e-2
    assert float(loss) == pytest.approx(float(exact), rel=1e-4)


RELEVANCE = [0.0, 1, 2, 2, -4, 5.5, 3, 3, 1, 2, 7]  # with ties


def cosent_loop(scores: Tensor, relevance: list[float], tau: Tensor, fault: str = "") -> Tensor:
    total = torch.ones((), dtype=torch.float64)
    for i, j in product(range(len(relevance)), repeat=2):
        if relevance[i] > relevance[j] or (fault == "ties ordered too" and i < j and relevance[i] == relevance[j]):
            gap = scores[i] - scores[j] if fault == "order reversed" else scores[j] - scores[i]
            weight = relevance[i] - relevance[j] if fault == "weighted by the distance" else 1.0
            total = total + weight * torch.exp(gap / tau)
    return torch.log(total)


def graded(made: ObjectiveConfig, data: RankData, relevance: list[float]) -> list[Tensor]:
    objective = Objective(made, TASKS).double()
    loss, _ = objective(
        Batch(
            data.own,
            data.targets,
            "text_image",
            positive_offset=OFFSET,
            all_queries=data.queries,
            mined=mined_of(made, data, OWNERS),
            target_ids=torch.tensor(IDS),
            relevance=torch.tensor(relevance, dtype=torch.float64),
        ),
        step=10,
    )
    found = gradients(loss, data, objective.theta_T)
    return [*found[:-1], found[-1][0]]


def graded_loop(made: ObjectiveConfig, data: RankData, relevance: list[float], fault: str = "") -> list[Tensor]:
    theta = torch.tensor(math.log(made.temperature.initial), dtype=torch.float32).double().requires_grad_()
    per_width = []
    for dims in [*made.matryoshka, WIDTH]:
        scores = (cut(data.queries, dims) * cut(data.targets, dims)).sum(dim=1)
        per_width.append(cosent_loop(scores, relevance, theta.exp(), fault))
    return gradients(sum(per_width) / len(per_width), data, theta)


@pytest.mark.parametrize("tau", [0.5, 0.05, 0.006])
@pytest.mark.parametrize("name", OPTIONS)
def test_graded_pairs_equal_the_double_loop_whatever_the_options(name: str, tau: float) -> None:
    """Their loss knows the temperature and the widths, and none of the rules for negatives."""
    data, made = batch(), config(tau=tau, **OPTIONS[name])
    ours = graded(made, data, RELEVANCE)
    assert distance(ours, graded_loop(made, data, RELEVANCE)) < 1e-9
    assert float(ours[0]) > 0.1


@pytest.mark.parametrize("fault", ["ties ordered too", "order reversed", "weighted by the distance"])
def test_the_double_loop_of_graded_pairs_catches_planted_faults(fault: str) -> None:
    data, made = batch(), config()
    assert distance(graded(made, data, RELEVANCE), graded_loop(made, data, RELEVANCE, fault)) > 1e-2


def test_only_the_order_of_the_relevance_counts() -> None:
    data, made = batch(), config()
    ours = graded(made, data, RELEVANCE)
    stretched = graded(made, data, [math.exp(number) for number in RELEVANCE])
    assert distance(stretched, ours) == 0.0


def test_graded_pairs_of_equal_relevance_have_nothing_to_learn() -> None:
    scores = torch.tensor([0.1, 0.9], requires_grad=True)
    loss = cosent(scores, torch.ones(2), torch.tensor(0.1))
    loss.backward()
    assert float(loss) == 0.0
    assert scores.grad is not None
    assert scores.grad.tolist() == [0.0, 0.0]


def test_memory_of_graded_pairs_grows_with_their_number_alone() -> None:
    scores = torch.rand(1000, requires_grad=True)
    with Largest() as seen:
        cosent(scores, torch.rand(1000), torch.tensor(0.1)).backward()
    assert seen.num_bytes <= 8 * 1000


@pytest.mark.parametrize("tile_rows", [None, 2])
def test_statistics_of_graded_pairs(tile_rows: int | None) -> None:
    """Cosines 0.6, 1, 0, 0.8 for relevance 1, 2, 3, 3: of five ordered pairs of unlike relevance, two are right."""
    targets = torch.tensor([[1.0, 0.0]]).repeat(4, 1)
    queries = torch.tensor([[0.6, 0.8], [1.0, 0.0], [0.0, 1.0], [0.8, 0.6]])
    objective = Objective(config(tile_rows=tile_rows), ["t"])

    def accuracy(first: int, stop: int) -> dict[str, float]:
        _, stats = objective(
            Batch(
                queries[first:stop],
                targets,
                "t",
                positive_offset=first,
                all_queries=queries,
                relevance=torch.tensor([1.0, 2.0, 3.0, 3.0]),
            ),
            step=0,
        )
        return {name: float(value) for name, value in stats.items()}

    whole = accuracy(0, 4)
    assert whole["accuracy"] == pytest.approx(0.4)
    assert whole["positive_similarity"] == pytest.approx(0.4)
    assert whole["negative_similarity"] == pytest.approx(0.8)
    assert (whole["dropped_fraction"], whole["effective_fraction"]) == (0.0, 1.0)
    ranks = [accuracy(0, 2), accuracy(2, 4)]
    for name, value in whole.items():
        assert sum(rank[name] for rank in ranks) / 2 == pytest.approx(value), name
    _, contrasted = objective(Batch(queries, targets, "t"), step=0)
    assert list(contrasted) == list(whole)


@pytest.mark.parametrize("tile_rows", [None, 1])
def test_equal_scores_of_graded_pairs_count_as_wrong(tile_rows: int | None) -> None:
    """Cosines 1, 1, 0, 0 for relevance 2, 1, 1, 0. Of five ordered pairs of unequal relevance, three are right."""
    targets = torch.tensor([[1.0, 0.0]]).repeat(4, 1)
    queries = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    relevance = torch.tensor([2.0, 1.0, 1.0, 0.0])
    data = Batch(queries, targets, "t", all_queries=queries, relevance=relevance)
    _, stats = Objective(config(tile_rows=tile_rows), ["t"])(data, step=0)
    assert float(stats["accuracy"]) == pytest.approx(3 / 5)


def test_pairs_with_and_without_relevance_do_not_mix() -> None:
    relevance = [*RELEVANCE[:-2], math.nan, math.nan]
    problem = r"task 'text_image': 9 of 11 pairs that are contrasted have a relevance, the others have none; give one"
    with pytest.raises(UserError, match=problem):
        graded(config(), batch(), relevance)
    none = graded(config(), batch(IDS, OWNERS), [math.nan] * ALL)
    assert distance(none, evaluate(config(), batch(IDS, OWNERS))) == 0.0


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"same_side": ["queries"], "symmetric": 1.0}, "symmetric: 1 leaves nothing"),
        ({"same_side": ["queries", "queries"]}, "must not name anything twice"),
        ({"matryoshka": [64, 64]}, "must not name anything twice"),
        ({"margin": 2.0}, "less than 2"),
        ({"focal_gamma": 0.5}, "greater than or equal to 1"),
        ({"false_negatives": {"threshold": 1.0}}, "less than 1"),
        ({"false_negatives": {"max_dropped_fraction": 0.0}}, "greater than 0"),
        ({"temperature": {"minimum": 0.02, "maximum": 0.02}}, "nothing to learn; set learnable: false"),
        ({"temperature": {"initial": 0.001}}, "must lie in"),
        ({"tile_rows": 0}, "greater than or equal to 1"),
    ],
)
def test_what_cannot_work_is_refused(wrong: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        ObjectiveConfig.model_validate(wrong)


def test_a_fixed_temperature_may_have_one_bound() -> None:
    assert TemperatureConfig(initial=0.02, minimum=0.02, maximum=0.02, learnable=False).initial == 0.02


@pytest.mark.parametrize("width", [6, 7])
def test_a_matryoshka_width_of_the_model_or_above_is_refused(width: int) -> None:
    problem = (
        rf"^objective.matryoshka: {width} is not below 6, the width of the model's vectors; name widths from 1 to 5$"
    )
    with pytest.raises(UserError, match=problem):
        evaluate(config(matryoshka=[2, width]), batch())
