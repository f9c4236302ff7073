"""Distillation from a teacher's vectors against plain loops in fp64, with all other terms, and planted faults."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from rzen.config import EmbeddingDistillationConfig, ObjectiveConfig
from rzen.objective.batch import Batch, TeacherVectors
from rzen.objective.distillation import distillation_loss
from rzen.objective.loss import Objective
from tests.parity.test_loss import (
    ALL,
    IDS,
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
from tests.parity.test_terms import rank_batch

LOSSES = ["kl", "cross_entropy", "symmetric_kl", "mse"]
ALONE = {"hardness": None, "false_negatives": None}
TAU = 0.2
TEACHER_WIDTH = 17
NO_QUERY, NO_TARGET = (5, 9), (2, 4, 6)
"""Pairs without a teacher's vector of the query, and of the target. Pairs 4 to 8 are the own ones."""


def teacher_vectors(seed: int = 3) -> TeacherVectors:
    generator = torch.Generator().manual_seed(seed)
    queries, targets = (
        normalize(torch.randn(ALL, TEACHER_WIDTH, generator=generator, dtype=torch.float64), dim=1) for _ in range(2)
    )
    queries[list(NO_QUERY)] = math.nan
    targets[list(NO_TARGET)] = math.nan
    return TeacherVectors(queries, targets)


def of_one_row(student: list[Tensor], teacher: list[Tensor], tau: Tensor, kind: str) -> Tensor:
    """The loss of one row over the columns that both have."""
    s, t = torch.stack(student), torch.stack(teacher)
    if kind == "mse":
        return (s - t).square().mean()
    p, q = (t / TAU).softmax(dim=0), (s / tau).softmax(dim=0)
    if kind == "cross_entropy":
        return -(p * q.log()).sum()
    forward = (p * (p / q).log()).sum()
    return forward if kind == "kl" else (forward + (q * (q / p).log()).sum()) / 2


def double_loop(made: ObjectiveConfig, data: RankData, tau: Tensor, kind: str, fault: str = "") -> Tensor:
    """The mean over the own rows, widths and directions."""
    teacher = teacher_vectors()
    total = torch.zeros((), dtype=torch.float64)
    widths = [*made.matryoshka, WIDTH]
    for dims in widths:
        forward = (cut(data.queries, dims), cut(data.targets, dims), teacher.queries, teacher.targets)
        reverse = (forward[1], forward[0], forward[3], forward[2])
        for (rows, columns, t_rows, t_columns), share in ((forward, 1 - made.symmetric), (reverse, made.symmetric)):
            if fault == "reverse as forward":
                t_rows, t_columns = forward[2:]
            for i in range(OFFSET, OFFSET + OWN):
                mine = i - OFFSET if fault == "teacher of rank 0" else i
                known = [j for j in range(ALL) if not (t_rows[mine] @ t_columns[j]).isnan()]
                if fault == "without the positive":
                    known = [j for j in known if j != i]
                if len(known) < 2:
                    continue
                student = [rows[i] @ columns[j] for j in known]
                given = [t_rows[mine] @ t_columns[j] for j in known]
                if fault == "columns of others":
                    given = given[1:] + given[:1]
                total = total + share * of_one_row(student, given, tau, kind)
    return total / (OWN * len(widths))


def settings(kind: str = "kl", **more: Any) -> dict[str, Any]:
    return {"embedding_distillation": {"loss": kind, "teacher_temperature": TAU} | more}


@pytest.mark.parametrize("tile_rows", [None, 2])
@pytest.mark.parametrize(
    ("options", "kind"),
    [*((ALONE | {"symmetric": 0.3}, kind) for kind in LOSSES), *((options, "kl") for options in OPTIONS.values())],
    ids=[*LOSSES, *OPTIONS],
)
def test_it_equals_the_double_loop_with_all_other_terms(
    options: dict[str, Any], kind: str, tile_rows: int | None
) -> None:
    data, plain = batch(IDS, OWNERS), config(tile_rows=tile_rows, **options)
    objective = Objective(config(tile_rows=tile_rows, **options, **settings(kind, weight=3.0)), ["a"]).double()
    loss, _ = objective(rank_batch(objective.config, data, "a", teacher_vectors=teacher_vectors()), step=10)
    found = gradients(loss, data, objective.theta_T)

    def expected(weight: float, fault: str = "") -> list[Tensor]:
        theta = objective.theta_T.detach().clone().requires_grad_()
        added = weight * double_loop(plain, data, theta[0].exp(), kind, fault)
        return gradients(Oracle(plain).loss(data, theta) + added, data, theta)

    assert distance(found, expected(3.0)) < 1e-9
    faults = ["teacher of rank 0", "columns of others", "without the positive"]
    for fault in faults + (["reverse as forward"] if plain.symmetric else []):
        assert distance(found, expected(3.0, fault)) > 1e-3, fault
    assert distance(found, expected(0.0)) > 1e-3


@pytest.mark.parametrize("kind", LOSSES)
def test_a_student_that_equals_its_teacher_has_no_gradient(kind: str) -> None:
    data = batch(IDS)
    shared = settings(kind, contrastive_weight=0.0, teacher_temperature="student")
    made = ObjectiveConfig.model_validate(ALONE | {"symmetric": 0.5, "temperature": {"learnable": False}} | shared)
    objective = Objective(made, ["a"]).double()
    teacher = TeacherVectors(data.queries.detach().clone(), data.targets.detach().clone())
    teacher.queries[list(NO_QUERY)] = math.nan
    teacher.targets[list(NO_TARGET)] = math.nan
    loss, _ = objective(rank_batch(made, data, "a", teacher_vectors=teacher), step=0)
    found = torch.autograd.grad(loss, [data.queries, data.targets])
    assert max(float(part.abs().max()) for part in found) < 1e-13
    if kind != "cross_entropy":
        assert float(loss.detach()) == pytest.approx(0.0, abs=1e-13)


def test_a_teacher_turned_in_space_is_the_same_teacher() -> None:
    """Only its cosines count: any rotation, and zeros behind the values, change nothing."""
    data, teacher = batch(IDS), teacher_vectors()
    rotation = torch.linalg.qr(torch.randn(TEACHER_WIDTH, TEACHER_WIDTH, dtype=torch.float64))[0]
    zeros = torch.zeros(ALL, 4, dtype=torch.float64)
    turned = TeacherVectors(
        *(torch.cat([part @ rotation, zeros], dim=1) for part in (teacher.queries, teacher.targets))
    )
    objective = Objective(config(**settings()), ["a"]).double()
    losses = [
        objective(rank_batch(objective.config, data, "a", teacher_vectors=some), 0)[0] for some in (teacher, turned)
    ]
    assert float(losses[0].detach()) == pytest.approx(float(losses[1].detach()), rel=1e-12)


def test_pairs_without_any_teacher_vector_change_nothing() -> None:
    data = batch(IDS)
    unknown = torch.full((ALL, TEACHER_WIDTH), math.nan, dtype=torch.float64)
    found = []
    for given, made in (
        (None, config()),
        (None, config(**settings())),
        (TeacherVectors(unknown, unknown), config(**settings())),
    ):
        objective = Objective(made, ["a"]).double()
        loss, _ = objective(rank_batch(made, data, "a", teacher_vectors=given), step=0)
        found.append(gradients(loss, data, objective.theta_T))
    assert distance(found[0], found[1]) == 0.0
    assert distance(found[0], found[2]) < 1e-15


def test_mse_is_that_of_written_out_cosines() -> None:
    made = EmbeddingDistillationConfig(loss="mse")
    student = torch.tensor([[0.5, -0.5, 0.0], [1.0, 0.2, 0.4]])
    teacher = torch.tensor([[0.3, math.nan, 0.6], [math.nan, math.nan, 0.4]])
    found = distillation_loss(student, teacher, torch.tensor([0, 1]), torch.tensor(0.1), made)
    assert found.tolist() == pytest.approx([(0.04 + 0.36) / 2, 0.0])  # one known column says nothing about an order


def test_there_is_one_weight_of_the_contrastive_loss() -> None:
    both = {"distillation": {"contrastive_weight": 0.25}, "embedding_distillation": {"contrastive_weight": 0.5}}
    with pytest.raises(ValueError, match=r"have contrastive_weight 0\.25 and 0\.5.*set both to the same"):
        ObjectiveConfig.model_validate(both)
    both["embedding_distillation"]["contrastive_weight"] = 0.25
    data = batch(IDS)
    losses = []
    for made in (config(), config(**both)):
        loss, _ = Objective(made, ["a"]).double()(Batch(data.own, data.targets, "a", OFFSET), step=0)
        losses.append(float(loss.detach()))
    assert losses[1] == pytest.approx(0.25 * losses[0], rel=1e-12)


def test_one_temperature_for_both_must_not_be_learned() -> None:
    shared = settings(teacher_temperature="student")
    with pytest.raises(ValueError, match=r"needs a fixed temperature"):
        ObjectiveConfig.model_validate(shared)
    ObjectiveConfig.model_validate(shared | {"temperature": {"learnable": False}})
