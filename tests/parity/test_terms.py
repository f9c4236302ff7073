"""The seams of the objective: a task for each row, and a term that is registered from here."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.errors import UserError
from rzen.config import ObjectiveConfig
from rzen.objective import terms
from rzen.objective.batch import Batch
from rzen.objective.loss import Objective
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
    mined_of,
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


def rank_batch(made: ObjectiveConfig, data: RankData, tasks: str | list[str], **given: Any) -> Batch:
    mined = mined_of(made, data, OWNERS, given.pop("mined_teacher", None))
    ids = torch.tensor(IDS)
    return Batch(data.own, data.targets, tasks, OFFSET, all_queries=data.queries, mined=mined, target_ids=ids, **given)


@pytest.mark.parametrize("tile_rows", [None, 2])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_rows_of_several_tasks_equal_the_double_loop(options: dict[str, Any], tile_rows: int | None) -> None:
    data, made = batch(IDS, OWNERS), config(tile_rows=tile_rows, **options)
    objective = objective_of(made)
    loss, stats = objective(rank_batch(made, data, ROW_TASKS), step=10)
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
        loss, _ = objective(rank_batch(made, data, tasks), step=10)
        found.append(gradients(loss, data, objective.theta_T))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_row_of_an_unknown_task_is_refused() -> None:
    with pytest.raises(UserError, match=r"^task 'x': has no temperature; known tasks: a, b, c$"):
        objective_of(config())(rank_batch(config(), batch(), ["a", "b", "x", "a", "a"]), step=0)


def test_graded_pairs_of_several_tasks_are_refused() -> None:
    graded = rank_batch(config(), batch(), ROW_TASKS, relevance=torch.arange(ALL).double())
    with pytest.raises(UserError, match=r"^task 'a', 'c': graded pairs of several tasks are contrasted; keep them"):
        objective_of(config())(graded, step=0)


LOSSES = ["kl", "cross_entropy", "symmetric_kl", "margin_mse"]
ALONE = {"hardness": None, "false_negatives": None}
TEACHER_TAU = 0.2
POSITIVE_TEACHER = torch.tensor([0.9, 0.2, 0.7, math.nan, 0.4], dtype=torch.float64)
MINED_TEACHER = torch.tensor([0.3, 0.8, 0.1, 0.9, 0.5, 0.6], dtype=torch.float64)


def of_one_query(data: RankData, i: int, dims: int, tau: Tensor, kind: str, fault: str = "") -> Tensor:
    """The loss of one query by plain softmaxes over its candidates."""
    queries, targets, mined = (cut(part, dims) for part in (data.queries, data.targets, data.mined))
    positive = POSITIVE_TEACHER[i - OFFSET]
    owner = i + 1 if fault == "candidates of the next query" else i
    own = [m for m in range(MINED) if OWNERS[m] == owner]
    teacher = torch.stack([positive, *(MINED_TEACHER[m] for m in own)])
    student = torch.stack([queries[i] @ targets[i], *(queries[i] @ mined[m] for m in own)])
    if kind == "margin_mse":
        errors = ((student[0] - student[1:]) - (teacher[0] - teacher[1:])).square()
        return errors.sum() / max(1, len(own)) if not positive.isnan() else torch.zeros_like(positive)
    if positive.isnan():
        teacher, student = teacher[1:], student[1:]
    if len(teacher) < 2:
        return torch.zeros_like(positive)
    p, q = (teacher / TEACHER_TAU).softmax(dim=0), (student / tau).softmax(dim=0)
    if kind == "cross_entropy":
        return -(p * q.log()).sum()
    forward = (p * (p / q).log()).sum()
    return forward if kind == "kl" else (forward + (q * (q / p).log()).sum()) / 2


def untiled(made: ObjectiveConfig, data: RankData, theta: Tensor, weight: float, kind: str, fault: str = "") -> Tensor:
    """The double loop and the distillation, differentiated by autograd as a whole."""
    widths = [*made.matryoshka, WIDTH]
    rows = range(OFFSET, OFFSET + OWN)
    added = sum(of_one_query(data, i, dims, theta.exp(), kind, fault) for dims in widths for i in rows)
    return Oracle(made).loss(data, theta) + (1 - made.symmetric) * weight * added / (OWN * len(widths))


def distilled(**settings: Any) -> dict[str, Any]:
    return {"distillation": {"teacher_temperature": TEACHER_TAU} | settings}


@pytest.mark.parametrize("tile_rows", [None, 1, 2])
@pytest.mark.parametrize(
    ("options", "kind"),
    [*((ALONE, kind) for kind in LOSSES), *((options, "kl") for options in OPTIONS.values())],
    ids=[*LOSSES, *OPTIONS],
)
def test_distillation_composes_with_all_other_terms(options: dict[str, Any], kind: str, tile_rows: int | None) -> None:
    data, plain = batch(IDS, OWNERS), config(tile_rows=tile_rows, **options)
    if plain.symmetric == 1:
        with pytest.raises(ValueError, match="lower symmetric"):
            config(**options, **distilled())
        return
    objective = Objective(config(tile_rows=tile_rows, **options, **distilled(weight=3.0, loss=kind)), ["a"]).double()
    given = rank_batch(objective.config, data, "a", teacher_scores=POSITIVE_TEACHER, mined_teacher=MINED_TEACHER)
    loss, _ = objective(given, step=10)
    found = gradients(loss, data, objective.theta_T)

    def expected(weight: float, fault: str = "") -> list[Tensor]:
        theta = objective.theta_T.detach().clone().requires_grad_()
        return gradients(untiled(plain, data, theta[0], weight, kind, fault), data, theta)

    assert distance(found, expected(3.0)) < 1e-9
    assert distance(found, expected(0.0)) > 1e-2
    assert distance(found, expected(3.0, "candidates of the next query")) > 1e-2


def test_distillation_without_teacher_scores_changes_nothing() -> None:
    data = batch(IDS, OWNERS)
    losses = [
        Objective(config(**settings), ["a"]).double()(rank_batch(config(), data, "a"), step=10)[0]
        for settings in ({}, distilled(weight=3.0))
    ]
    assert torch.equal(losses[0], losses[1])


def test_the_teacher_may_be_all_that_is_learned() -> None:
    data, settings = batch(IDS, OWNERS), distilled(contrastive_weight=0.0)
    objective = Objective(config(**ALONE, **settings), ["a"]).double()
    given = rank_batch(objective.config, data, "a", teacher_scores=POSITIVE_TEACHER, mined_teacher=MINED_TEACHER)
    loss, _ = objective(given, step=10)
    rows = range(OFFSET, OFFSET + OWN)
    expected = sum(of_one_query(data, i, WIDTH, objective.temperature("a").detach(), "kl") for i in rows) / OWN
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-12)


def test_queries_that_the_teacher_gets_wrong_can_be_left_out() -> None:
    data, settings = batch(IDS, OWNERS), distilled(contrastive_weight=0.0, only_if_right=True)
    objective = Objective(config(**ALONE, **settings), ["a"]).double()
    given = rank_batch(objective.config, data, "a", teacher_scores=POSITIVE_TEACHER, mined_teacher=MINED_TEACHER)
    loss, _ = objective(given, step=10)
    right = []
    for i in range(OFFSET, OFFSET + OWN):
        candidates = [float(MINED_TEACHER[m]) for m in range(MINED) if OWNERS[m] == i]
        if float(POSITIVE_TEACHER[i - OFFSET]) >= max(candidates, default=-1.0):
            right.append(of_one_query(data, i, WIDTH, objective.temperature("a").detach(), "kl"))
    assert 0 < len(right) < OWN
    assert float(loss.detach()) == pytest.approx(float(sum(right)) / OWN, rel=1e-12)


def test_every_option_is_a_term_or_part_of_the_engine() -> None:
    assert set(ObjectiveConfig.model_fields) == {*terms.TERMS, "kind", "temperature", "tile_rows", "in_batch", "tasks"}
