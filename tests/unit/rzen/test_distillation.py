"""Identities of distillation, and three ways to get it wrong that a plain implementation takes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from rzen.config import DistillationConfig, ObjectiveConfig
from rzen.objective.distillation import distillation_loss

ROWS, COLUMNS, TAU = 6, 9, 0.07
COUNTS = (9, 4, 2, 1, 0, 5)
"""Columns that the teacher has scored in each row. A row with fewer than two learns nothing."""


def scores(seed: int) -> Tensor:
    return torch.rand(ROWS, COLUMNS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def teacher() -> Tensor:
    found = scores(1)
    for row, count in enumerate(COUNTS):
        found[row, count:] = math.nan
    return found


def loss_of(student: Tensor, teacher_scores: Tensor, tau: Tensor | float = TAU, **settings: object) -> Tensor:
    config = DistillationConfig.model_validate({"teacher_temperature": TAU} | settings)
    positives = torch.zeros(ROWS, dtype=torch.int64)
    return distillation_loss(student, teacher_scores, positives, torch.as_tensor(tau, dtype=torch.float64), config)


def test_it_is_the_divergence_of_each_query_without_padding() -> None:
    student, given = scores(2), teacher()
    found = loss_of(student, given, tau=0.3)
    for row, count in enumerate(COUNTS):
        log_s = (student[row, :count] / 0.3).log_softmax(dim=0)
        log_t = (given[row, :count] / TAU).log_softmax(dim=0)
        expected = kl_div(log_s, log_t, reduction="sum", log_target=True) if count > 1 else torch.zeros(())
        assert float(found[row]) == pytest.approx(float(expected), rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("kind", ["kl", "symmetric_kl", "margin_mse"])
def test_a_student_that_equals_its_teacher_has_no_loss_and_no_gradient(kind: str) -> None:
    student = teacher().nan_to_num().requires_grad_()
    loss = loss_of(student, teacher(), loss=kind).sum()
    loss.backward()
    assert student.grad is not None
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-12)
    assert float(student.grad.abs().max()) < 1e-12


def test_a_sure_teacher_gives_the_cross_entropy_of_its_choice() -> None:
    student, given = scores(2), teacher()
    given[0] = torch.full((COLUMNS,), -100.0)
    given[0, 3] = 100.0
    expected = cross_entropy(student[:1] / 0.3, torch.tensor([3]))
    for kind in ("kl", "cross_entropy"):
        assert float(loss_of(student, given, tau=0.3, loss=kind)[0]) == pytest.approx(float(expected), rel=1e-9)


def test_the_gradient_is_the_difference_of_probabilities_by_the_temperature() -> None:
    student, given = scores(2).requires_grad_(), teacher()
    loss_of(student, given, tau=0.3)[:1].sum().backward()
    p_s, p_t = (student[0].detach() / 0.3).softmax(dim=0), (given[0] / TAU).softmax(dim=0)
    assert student.grad is not None
    torch.testing.assert_close(student.grad[0], (p_s - p_t) / 0.3)


@pytest.mark.parametrize("kind", ["kl", "cross_entropy", "symmetric_kl", "margin_mse"])
def test_gradients_of_scores_and_temperature_are_finite_and_those_of_finite_differences(kind: str) -> None:
    student = scores(2).requires_grad_()
    tau = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, t: loss_of(s, teacher(), t, loss=kind), (student, tau))


def test_a_probability_below_any_small_number_still_has_a_gradient() -> None:
    student, given = torch.zeros(ROWS, COLUMNS, dtype=torch.float64), teacher()
    student[0, 1:] = 1.0
    given[0] = torch.tensor([1.0, *[0.0] * (COLUMNS - 1)])
    student.requires_grad_()
    loss_of(student, given, tau=0.02, teacher_temperature=0.01)[:1].sum().backward()
    assert student.grad is not None
    assert float((student.detach()[0] / 0.02).softmax(dim=0)[0]) < 1e-20
    assert float(student.grad[0, 0]) == pytest.approx(-1 / 0.02, rel=1e-6)


def test_one_temperature_for_both_must_not_be_learned() -> None:
    shared = {"distillation": {"teacher_temperature": "student"}}
    with pytest.raises(ValueError, match=r"needs a fixed temperature.*temperature\.learnable: false"):
        ObjectiveConfig.model_validate(shared)
    ObjectiveConfig.model_validate(shared | {"temperature": {"learnable": False}})
    student, given = scores(2), teacher()
    falls = [float(loss_of(student, given, tau, teacher_temperature="student").sum()) for tau in (0.05, 0.1, 0.5)]
    assert falls == sorted(falls, reverse=True)  # why it is refused
