"""The objective against a double loop in fp64, written from the formula of the paper and not from the code."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pipelines.errors import UserError
from rzen.config import FalseNegativeConfig, ObjectiveConfig, TemperatureConfig
from rzen.loss import Objective

RULE = FalseNegativeConfig(threshold=0.2, warmup_steps=10, max_dropped_fraction=0.3)
NO_CAP = FalseNegativeConfig(threshold=0.2, warmup_steps=10, max_dropped_fraction=1.0)
TASKS = ["text_video", "text_image"]


def config(alpha: float = 9.0, rule: FalseNegativeConfig | None = RULE, tau: float = 0.1) -> ObjectiveConfig:
    return ObjectiveConfig(
        hardness_alpha=alpha, false_negatives=rule, temperature=TemperatureConfig(initial=tau, learnable=True)
    )


def unit(generator: torch.Generator, rows: int, width: int = 6) -> Tensor:
    vectors = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(vectors, dim=-1).requires_grad_()


def batch(num_queries: int = 5, num_targets: int = 11, num_negatives: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (
        unit(generator, num_queries),
        unit(generator, num_targets),
        unit(generator, max(num_negatives, 1)),
    )


def paper_loss(
    queries: Tensor,
    targets: Tensor,
    negatives: list[Tensor],
    theta: Tensor,
    *,
    offset: int,
    alpha: float,
    rule: FalseNegativeConfig | None = None,
    ids: list[int] | None = None,
    fault: str = "",
) -> Tensor:
    """Sum over negatives one by one, in the multiplicative form of the paper."""
    tau = torch.exp(theta)
    columns = [*targets, *negatives]
    total = torch.zeros((), dtype=torch.float64)
    for b, query in enumerate(queries):
        own = offset + b
        positive = columns[own]
        others = [i for i in range(len(columns)) if i != own]
        copies = {i for i in others if ids is not None and i < len(ids) and ids[i] == ids[own]}
        dropped = set(copies)
        if rule is not None:
            likeness = {i: math.inf if i in copies else float(columns[i].detach() @ positive.detach()) for i in others}
            most_alike = sorted(others, key=lambda i: -likeness[i])[: int(rule.max_dropped_fraction * len(others))]
            dropped |= {i for i in most_alike if likeness[i] > rule.threshold}
        numerator = torch.exp(query @ positive / tau)
        denominator = numerator
        for i in others:
            if i in dropped:
                continue
            similarity = query @ columns[i]
            exponent = alpha * similarity
            if fault == "alpha scaled by temperature":
                exponent = exponent / tau
            weight = torch.exp(exponent if fault == "weight not detached" else exponent.detach())
            denominator = denominator + weight * torch.exp(similarity / tau)
        if fault == "positive weighted too":
            extra = torch.exp(alpha * (query @ positive).detach())
            denominator = denominator + (extra - 1) * numerator
            numerator = extra * numerator
        total = total - torch.log(numerator / denominator)
    return total / len(queries)


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [loss.detach().reshape(1), *torch.autograd.grad(loss, leaves, allow_unused=True)]


def both(
    *,
    alpha: float,
    rule: FalseNegativeConfig | None,
    with_negatives: bool,
    ids: list[int] | None,
    fault: str = "",
    step: int = 10,
    oracle_rule: FalseNegativeConfig | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Loss and gradients of queries, targets, negatives and theta: ours, the oracle's."""
    offset = 4
    queries, targets, negatives = batch()
    leaves = [queries, targets, *([negatives] if with_negatives else [])]
    objective = Objective(config(alpha, rule), TASKS).double()
    loss, _ = objective(
        queries,
        targets,
        "text_image",
        positive_offset=offset,
        step=step,
        negatives_MD=negatives if with_negatives else None,
        target_ids_N=None if ids is None else torch.tensor(ids),
    )
    ours = gradients(loss, *leaves, objective.theta_T)
    assert ours[-1][1] == 0.0  # the other task
    ours[-1] = ours[-1][0]

    theta = torch.tensor(math.log(0.1), dtype=torch.float64, requires_grad=True)
    expected = paper_loss(
        queries,
        targets,
        list(negatives) if with_negatives else [],
        theta,
        offset=offset,
        alpha=alpha,
        rule=oracle_rule,
        ids=ids,
        fault=fault,
    )
    return ours, gradients(expected, *leaves, theta)


def distance(ours: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, expected, strict=True))


IDS = [0, 1, 2, 3, 4, 5, 4, 7, 8, 5, 4]  # rows 4 to 8 are positives; 6 and 10 are copies of 4, 9 is a copy of 5


@pytest.mark.parametrize("ids", [None, IDS], ids=["no ids", "ids"])
@pytest.mark.parametrize("with_negatives", [False, True], ids=["in-batch", "mined"])
@pytest.mark.parametrize("rule", [None, RULE, NO_CAP], ids=["rule off", "capped", "uncapped"])
@pytest.mark.parametrize("alpha", [0.0, 9.0])
def test_loss_and_gradients_equal_the_double_loop(
    alpha: float, rule: FalseNegativeConfig | None, with_negatives: bool, ids: list[int] | None
) -> None:
    ours, expected = both(alpha=alpha, rule=rule, with_negatives=with_negatives, ids=ids, oracle_rule=rule)
    assert distance(ours, expected) < 1e-6  # theta starts as an fp32 number


@pytest.mark.parametrize(
    "fault", ["alpha scaled by temperature", "weight not detached", "positive weighted too", "rule too early", "no cap"]
)
def test_the_double_loop_catches_planted_faults(fault: str) -> None:
    oracle_rule = {"no cap": NO_CAP}.get(fault, RULE)
    step = 9 if fault == "rule too early" else 10
    ours, expected = both(
        alpha=9.0, rule=RULE, with_negatives=True, ids=IDS, fault=fault, step=step, oracle_rule=oracle_rule
    )
    assert distance(ours, expected) > 1e-2


def test_rule_waits_for_the_end_of_warmup() -> None:
    before, without = both(alpha=9.0, rule=RULE, with_negatives=True, ids=None, step=9)
    assert distance(before, without) < 1e-6
    after, without = both(alpha=9.0, rule=RULE, with_negatives=True, ids=None, step=10)
    assert distance(after, without) > 1e-2


def test_without_extras_it_is_cross_entropy() -> None:
    queries, targets, _ = batch()
    loss, _ = Objective(config(alpha=0.0, rule=None), TASKS).double()(
        queries, targets, "text_image", positive_offset=2, step=0
    )
    expected = torch.nn.functional.cross_entropy(queries @ targets.T / 0.1, torch.arange(2, 7))
    assert float((loss - expected).detach()) == pytest.approx(0.0, abs=1e-6)


def test_hand_written_case() -> None:
    """s+ = 1, one negative at s = 0.6, tau = 0.5, alpha = 2: -log(e^2 / (e^2 + e^1.2 e^1.2)) = log(1 + e^0.4)."""
    query = torch.tensor([[1.0, 0.0]])
    targets = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    loss, stats = Objective(config(alpha=2.0, rule=None, tau=0.5), ["t"])(
        query, targets, "t", positive_offset=0, step=0
    )
    assert loss.item() == pytest.approx(math.log(1 + math.exp(0.4)), rel=1e-6)
    assert {name: round(float(value), 4) for name, value in stats.items()} == {
        "loss": 0.913,
        "temperature": 0.5,
        "dropped_fraction": 0.0,
        "positive_similarity": 1.0,
        "negative_similarity": 0.6,
        "accuracy": 1.0,
    }


def test_statistics_count_drops_and_ties_against_the_query() -> None:
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    objective = Objective(config(rule=None), ["t"])
    _, plain = objective(queries, targets, "t", positive_offset=0, step=0)
    _, aware = objective(queries, targets, "t", positive_offset=0, step=0, target_ids_N=torch.tensor([7, 8, 7]))
    assert (float(plain["accuracy"]), float(plain["dropped_fraction"])) == (0.5, 0.0)
    assert (float(aware["accuracy"]), float(aware["dropped_fraction"])) == (1.0, 0.25)


@pytest.mark.parametrize("noise", [0.0, 1e-4, 0.01], ids=["identical", "nearly identical", "anisotropic"])
def test_guard_keeps_the_loss_of_an_untrained_model_above_zero(noise: float) -> None:
    generator = torch.Generator().manual_seed(0)
    alike = torch.ones(8, 6) + noise * torch.randn(8, 6, generator=generator)
    targets = torch.nn.functional.normalize(alike, dim=-1)
    queries = targets.clone().requires_grad_()

    def run(max_dropped_fraction: float) -> tuple[float, float]:
        rule = FalseNegativeConfig(threshold=0.95, warmup_steps=0, max_dropped_fraction=max_dropped_fraction)
        loss, stats = Objective(config(rule=rule), ["t"])(queries, targets, "t", positive_offset=0, step=0)
        return loss.item(), stats["dropped_fraction"].item()

    loss, dropped = run(0.5)  # of 7 negatives at most 3 go
    assert loss > 1.0
    assert dropped <= 3 / 7 + 1e-6
    assert run(1.0) == (0.0, 1.0)  # the trap that the guard is for


def test_copies_fill_the_cap_first() -> None:
    """Of 4 negatives 3 are copies by id; a cap of one half is spent, and the fourth, as alike as they are, stays."""
    targets = torch.tensor([[1.0, 0.0]]).repeat(5, 1)
    rule = FalseNegativeConfig(threshold=0.9, warmup_steps=0, max_dropped_fraction=0.5)
    _, stats = Objective(config(rule=rule), ["t"])(
        targets[:1], targets, "t", positive_offset=0, step=0, target_ids_N=torch.tensor([1, 1, 1, 1, 2])
    )
    assert float(stats["dropped_fraction"]) == 0.75


def test_log_space_survives_the_smallest_temperature() -> None:
    queries, targets, _ = batch()
    objective = Objective(config(alpha=9.0, rule=None, tau=0.005), ["t"])
    loss, _ = objective(queries.float(), targets.float(), "t", positive_offset=0, step=0)
    (gradient,) = torch.autograd.grad(loss, queries)
    assert math.isfinite(loss.item())
    assert bool(gradient.isfinite().all())


def test_bf16_embeddings_are_scored_in_fp32_even_under_autocast() -> None:
    queries, targets, _ = (part.detach().bfloat16() for part in batch())
    objective = Objective(config(), ["t"])
    expected, _ = objective(queries.float(), targets.float(), "t", positive_offset=0, step=10)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = objective(queries, targets, "t", positive_offset=0, step=10)
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
    queries, targets, _ = batch()
    with pytest.raises(UserError, match=r"task 'audio'.*known tasks: text_image, text_video"):
        Objective(config(), TASKS)(queries, targets, "audio", positive_offset=0, step=0)
