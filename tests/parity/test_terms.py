"""The seams of the objective: a task for each row, and a term that is registered from here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.errors import UserError
from rzen.config import ObjectiveConfig
from rzen.objective import terms
from rzen.objective.batch import Batch, Mined
from rzen.objective.loss import Objective
from rzen.objective.pools import Tile
from rzen.objective.terms import Term
from tests.parity.test_loss import (
    ALL,
    IDS,
    MINED,
    OFFSET,
    OPTIONS,
    OWN,
    OWNERS,
    WIDTH,
    Oracle,
    RankData,
    batch,
    config,
    cut,
    distance,
    gradients,
)

TASKS = ["a", "b", "c"]
ROW_TASKS = ["c", "a", "a", "c", "a"]
TAUS = {"a": 0.1, "b": 0.3, "c": 0.2}


def objective_of(made: ObjectiveConfig) -> Objective:
    """A temperature of its own for each task."""
    objective = Objective(made, TASKS).double()
    with torch.no_grad():
        objective.theta_T.copy_(torch.tensor([math.log(TAUS[task]) for task in TASKS]))
    return objective


def rank_batch(data: RankData, tasks: str | list[str], **given: Any) -> Batch:
    mined = Mined(data.mined, torch.tensor(OWNERS), given.pop("mined_teacher", None))
    ids = torch.tensor(IDS)
    return Batch(data.own, data.targets, tasks, OFFSET, all_queries=data.queries, mined=mined, target_ids=ids, **given)


@pytest.mark.parametrize("tile_rows", [None, 2])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_rows_of_several_tasks_equal_the_double_loop(options: dict[str, Any], tile_rows: int | None) -> None:
    data, made = batch(IDS, OWNERS), config(tile_rows=tile_rows, **options)
    objective = objective_of(made)
    loss, stats = objective(rank_batch(data, ROW_TASKS), step=10)
    found = gradients(loss, data, objective.theta_T)
    assert distance(found, per_row(made, data)) < 1e-9
    assert found[-1][1] == 0.0  # no row is of task b
    assert float(stats["temperature"]) == pytest.approx((3 * 0.1 + 2 * 0.2) / 5)
    assert distance(found, per_row(made, data, "one temperature for all rows")) > 1e-2


def per_row(made: ObjectiveConfig, data: RankData, fault: str = "") -> list[Tensor]:
    """The double loop with the temperature of each row's task."""
    theta_T = objective_of(made).theta_T.detach().requires_grad_()
    theta_B = theta_T[[TASKS.index(task) for task in ROW_TASKS]]
    return gradients(Oracle(made, fault).loss(data, theta_B), data, theta_T)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_rows_that_share_a_task_give_the_bits_of_one_task(options: dict[str, Any]) -> None:
    data, made = batch(IDS, OWNERS), config(tile_rows=2, **options)
    found = []
    for tasks in ("a", ["a"] * OWN):
        objective = objective_of(made)
        loss, _ = objective(rank_batch(data, tasks), step=10)
        found.append(gradients(loss, data, objective.theta_T))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_row_of_an_unknown_task_is_refused() -> None:
    with pytest.raises(UserError, match=r"^task 'x': has no temperature; known tasks: a, b, c$"):
        objective_of(config())(rank_batch(batch(), ["a", "b", "x", "a", "a"]), step=0)


def test_graded_pairs_of_several_tasks_are_refused() -> None:
    graded = rank_batch(batch(), ROW_TASKS, relevance=torch.arange(ALL).double())
    with pytest.raises(UserError, match=r"^task 'a', 'c': graded pairs of several tasks are contrasted; keep them"):
        objective_of(config())(graded, step=0)


# A term of a test: distillation from teacher scores. What follows, up to `ALONE`, is all that an option needs.


class WithDistillation(ObjectiveConfig):
    """The objective's options and one more."""

    distillation: float | None = None


@dataclass(frozen=True)
class Distillation(Term):
    """KL from the teacher's distribution over the positive and the row's own mined negatives to the student's."""

    weight: float

    def loss(self, tile: Tile, scores_RC: Tensor, tau: Tensor) -> Tensor | None:
        """Scaled by tau before masking: the other way round the gradient of tau would be NaN."""
        teacher_RC = tile.teacher_scores()
        if teacher_RC is None:
            return None
        is_known_RC = ~teacher_RC.isnan()
        teacher_RC = (teacher_RC / 0.2).masked_fill(~is_known_RC, -math.inf).log_softmax(dim=1)
        student_RC = (scores_RC / tau).masked_fill(~is_known_RC, -math.inf).log_softmax(dim=1)
        terms_RC = torch.where(is_known_RC, teacher_RC.exp() * (teacher_RC - student_RC), 0.0)
        return self.weight * terms_RC.sum(dim=1)


def distillation_of(config: ObjectiveConfig) -> list[Term]:
    weight = getattr(config, "distillation", None)
    return [Distillation(weight)] if weight else []


ALONE = {"hardness": None, "false_negatives": None}
POSITIVE_TEACHER = torch.tensor([0.9, 0.2, 0.7, math.nan, 0.4], dtype=torch.float64)
MINED_TEACHER = torch.tensor([0.3, 0.8, 0.1, 0.9, 0.5, 0.6], dtype=torch.float64)


def divergence(data: RankData, i: int, dims: int, tau: Tensor, fault: str = "") -> Tensor:
    """KL of one query by a plain softmax over its candidates."""
    queries, targets, mined = (cut(part, dims) for part in (data.queries, data.targets, data.mined))
    teacher, student = [], []
    if not POSITIVE_TEACHER[i - OFFSET].isnan():
        teacher.append(POSITIVE_TEACHER[i - OFFSET])
        student.append(queries[i] @ targets[i])
    owner = i + 1 if fault == "candidates of the next query" else i
    for m in range(MINED):
        if OWNERS[m] == owner:
            teacher.append(MINED_TEACHER[m])
            student.append(queries[i] @ mined[m])
    if not teacher:
        return torch.zeros((), dtype=torch.float64)
    p = (torch.stack(teacher) / 0.2).softmax(dim=0)
    q = (torch.stack(student) / tau).softmax(dim=0)
    return (p * (p / q).log()).sum()


def untiled(made: ObjectiveConfig, data: RankData, theta: Tensor, weight: float, fault: str = "") -> Tensor:
    """The double loop and the divergence, differentiated by autograd as a whole."""
    widths = [*made.matryoshka, WIDTH]
    rows = range(OFFSET, OFFSET + OWN)
    added = sum(divergence(data, i, dims, theta.exp(), fault) for dims in widths for i in rows)
    return Oracle(made).loss(data, theta) + (1 - made.symmetric) * weight * added / (OWN * len(widths))


@pytest.mark.parametrize("tile_rows", [None, 1, 2])
@pytest.mark.parametrize("options", [ALONE, *OPTIONS.values()], ids=["alone", *OPTIONS])
def test_a_registered_term_composes_with_all_others(
    options: dict[str, Any], tile_rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(terms.TERMS, "distillation", distillation_of)  # type: ignore[arg-type]
    data, plain = batch(IDS, OWNERS), config(tile_rows=tile_rows, **options)
    made = WithDistillation(**plain.model_dump(), distillation=3.0)
    objective = Objective(made, ["a"]).double()
    given = rank_batch(data, "a", teacher_scores=POSITIVE_TEACHER, mined_teacher=MINED_TEACHER)
    loss, _ = objective(given, step=10)
    found = gradients(loss, data, objective.theta_T)

    def expected(weight: float, fault: str = "") -> list[Tensor]:
        theta = objective.theta_T.detach().clone().requires_grad_()
        return gradients(untiled(plain, data, theta[0], weight, fault), data, theta)

    assert distance(found, expected(3.0)) < 1e-9
    if plain.symmetric < 1:  # the reverse direction has no teacher
        assert distance(found, expected(0.0)) > 1e-2
        assert distance(found, expected(3.0, "candidates of the next query")) > 1e-2


def test_a_term_without_teacher_scores_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(terms.TERMS, "distillation", distillation_of)  # type: ignore[arg-type]
    data = batch(IDS, OWNERS)
    losses = [
        Objective(made, ["a"]).double()(rank_batch(data, "a"), step=10)[0]
        for made in (config(), WithDistillation(**config().model_dump(), distillation=3.0))
    ]
    assert torch.equal(losses[0], losses[1])


def test_every_option_is_a_term_or_part_of_the_engine() -> None:
    assert set(ObjectiveConfig.model_fields) == {*terms.TERMS, "temperature", "tile_rows"}
