"""Fake quantization: values written out, the gradients of LSQ, and the loss against plain loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from rzen.config import ObjectiveConfig
from rzen.objective.batch import Batch
from rzen.objective.loss import Objective
from rzen.objective.quantized import FIRST_STEP, INT8_LEVELS, fake_binary, fake_int8
from tests.parity.test_loss import (
    IDS,
    OPTIONS,
    OWNERS,
    Oracle,
    RankData,
    batch,
    config,
    distance,
    gradients,
)
from tests.parity.test_terms import rank_batch


def test_int8_rounds_to_steps_and_clips() -> None:
    step = torch.tensor(0.2)  # 0.1 for 4 values
    vectors = torch.tensor([[0.31, -0.06, 0.0, 99.0]])
    expected = torch.tensor([[3.0, -1.0, 0.0, 127.0]])
    torch.testing.assert_close(fake_int8(vectors, step), normalize(expected, dim=1))
    assert len(torch.unique((torch.linspace(-2, 2, 9999) / 0.01).clamp(-127, 127).round())) == 2 * INT8_LEVELS + 1


def test_binary_keeps_signs() -> None:
    vectors = torch.tensor([[0.3, -0.7, 0.0, 1e-9]], requires_grad=True)
    rounded = fake_binary(vectors)
    assert rounded.tolist() == [[0.5, -0.5, -0.5, 0.5]]
    (by_vectors,) = torch.autograd.grad((rounded * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum(), vectors)
    assert by_vectors.tolist() == [[1.0, 2.0, 3.0, 4.0]]


def test_the_gradient_of_the_step_is_that_of_lsq() -> None:
    """Before the vectors are scaled to length 1: round(x/s) - x/s within the levels, +-127 beyond."""
    step = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    vectors = torch.tensor([[0.31, -0.06, 13.0, -99.0]], dtype=torch.float64, requires_grad=True)
    rounded, unit = lsq(vectors, step / 2), fake_int8(vectors, step)
    torch.testing.assert_close(unit, normalize(rounded, dim=1))
    weights = torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=torch.float64)
    by_step, by_vectors = torch.autograd.grad((rounded * weights).sum(), [step, vectors], retain_graph=True)
    within = (3 - 3.1) * 1 + (-1 + 0.6) * 10
    assert float(by_step) == pytest.approx((within + 127 * 100 - 127 * 1000) / 2)
    assert by_vectors.tolist() == [[1.0, 10.0, 0.0, 0.0]]
    ours = torch.autograd.grad((unit * weights).sum(), [step, vectors], retain_graph=True)
    theirs = torch.autograd.grad((normalize(rounded, dim=1) * weights).sum(), [step, vectors])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


class _Lsq(torch.autograd.Function):
    """Equations 1 to 5 of the paper, with gradients written by hand and without the scale of the gradient."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, size: Tensor) -> Tensor:
        ctx.save_for_backward(vectors, size)
        return (vectors / size).clamp(-127, 127).round() * size

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, Tensor]:
        vectors, size = ctx.saved_tensors
        levels = vectors / size
        is_within = levels.abs() <= 127
        by_size = torch.where(is_within, levels.round() - levels, 127 * levels.sign())
        return grad[0] * is_within, (grad[0] * by_size).sum()


def lsq(vectors: Tensor, size: Tensor) -> Tensor:
    rounded: Tensor = _Lsq.apply(vectors, size)  # type: ignore[no-untyped-call]
    return rounded


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor) -> Tensor:
        return torch.where(vectors > 0, 1.0, -1.0).double() / math.sqrt(vectors.shape[1])

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        return grad[0]


class RoundedOracle(Oracle):
    """The double loop over rounded vectors."""

    rounding = ""
    size: Tensor

    def cut(self, vectors: Tensor, dims: int) -> Tensor:
        vectors = super().cut(vectors, dims)
        if self.rounding == "int8":
            return normalize(lsq(vectors, self.size / math.sqrt(dims)), dim=1)
        signs: Tensor = _Sign.apply(vectors)  # type: ignore[no-untyped-call]
        return signs


def rounded_loss(made: ObjectiveConfig, data: RankData, theta: Tensor, rounding: str, size: Tensor) -> Tensor:
    oracle = RoundedOracle(made)
    oracle.rounding, oracle.size = rounding, size
    return oracle.loss(data, theta)


@pytest.mark.parametrize("types", [["int8"], ["binary"], ["binary", "int8"]])
@pytest.mark.parametrize("tile_rows", [None, 2])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_loss_is_also_that_of_rounded_vectors(
    options: dict[str, Any], tile_rows: int | None, types: list[str]
) -> None:
    data, plain = batch(IDS, OWNERS), config(**options)
    made = config(tile_rows=tile_rows, **options, quantized={"types": types, "weight": 0.7})
    objective = Objective(made, ["a"]).double()
    if objective.log_step is not None:
        objective.log_step.data.fill_(math.log(0.05))  # coarse: 127 steps of 0.02 do not reach the largest values
    loss, _ = objective(rank_batch(made, data, "a"), step=10)

    def expected(weight: float) -> tuple[list[Tensor], Tensor]:
        theta = objective.theta_T.detach().clone().requires_grad_()
        log_step = torch.tensor(math.log(0.05), dtype=torch.float64, requires_grad=True)
        total = Oracle(plain).loss(data, theta[0])
        for rounding in types:
            total = total + weight * rounded_loss(plain, data, theta[0], rounding, log_step.exp())
        (by_step,) = torch.autograd.grad(total, [log_step], retain_graph=True, allow_unused=True)
        return gradients(total, data, theta), by_step

    if objective.log_step is not None:
        (by_step,) = torch.autograd.grad(loss, [objective.log_step], retain_graph=True)
        assert float(by_step) == pytest.approx(float(expected(0.7)[1]), rel=1e-9)
        assert float(by_step) != 0
    found = gradients(loss, data, objective.theta_T)
    assert distance(found, expected(0.7)[0]) < 1e-8
    assert distance(found, expected(0.0)[0]) > 1e-3


def test_the_first_step_covers_normal_values() -> None:
    vectors = normalize(torch.randn(4096, 256, generator=torch.Generator().manual_seed(0)), dim=1)
    rms = float(vectors.square().mean().sqrt())
    assert pytest.approx(2 * float(vectors.abs().mean()) / rms / math.sqrt(127), rel=0.01) == FIRST_STEP
    rounded = fake_int8(vectors, torch.tensor(FIRST_STEP))
    assert float((rounded * vectors).sum(dim=1).min()) > 0.998
    assert float((fake_binary(vectors) * vectors).sum(dim=1).mean()) == pytest.approx(math.sqrt(2 / math.pi), abs=0.01)


def test_training_for_signs_makes_rounded_vectors_better() -> None:
    """The loss of rounded vectors falls further with the option than without."""
    found = []
    for quantized in (None, {"types": ["binary"]}):
        torch.manual_seed(0)
        features, encoder = torch.randn(64, 24), torch.nn.Linear(24, 12, bias=False)
        made = ObjectiveConfig.model_validate(
            {"hardness": None, "false_negatives": None, "temperature": {"initial": 0.1}, "quantized": quantized}
        )
        objective = Objective(made, ["a"])
        plain = Objective(made.model_copy(update={"quantized": None}), ["a"])
        noisy = features + 0.5 * torch.randn(64, 24)
        optimizer = torch.optim.AdamW(encoder.parameters(), lr=0.02)
        for step in range(60):
            queries, targets = (normalize(encoder(part), dim=1) for part in (features, noisy))
            loss, _ = objective(Batch(queries, targets, "a"), step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            rounded = (fake_binary(normalize(encoder(part), dim=1)) for part in (features, noisy))
            found.append(float(plain(Batch(*rounded, "a"), 0)[0]))
    assert found[1] < 0.9 * found[0], found


def test_one_type_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="types must not name anything twice"):
        ObjectiveConfig.model_validate({"quantized": {"types": ["int8", "int8"]}})
