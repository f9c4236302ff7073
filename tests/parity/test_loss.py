"""The objective against a double loop in fp64, written from the formulas of the papers and not from the code."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from pipelines.errors import UserError
from rzen.config import FalseNegativeConfig, HardnessConfig, MinedConfig, ObjectiveConfig, TemperatureConfig
from rzen.loss import Mined, Objective

RULE = FalseNegativeConfig(threshold=0.2, warmup_steps=10, max_dropped_fraction=0.3)
NO_CAP = FalseNegativeConfig(threshold=0.2, warmup_steps=10, max_dropped_fraction=1.0)
TASKS = ["text_video", "text_image"]
OFFSET, OWN, ALL, MINED, WIDTH = 4, 5, 11, 6, 6
IDS = [0, 1, 2, 3, 4, 5, 4, 7, 8, 5, 4]  # rows 4 to 8 are positives; 6 and 10 are copies of 4, 9 is a copy of 5
OWNERS = [4, 4, 6, -1, 8, 1]  # queries that the mined negatives belong to; one is padding


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
class Batch:
    """What one of two ranks sees: the queries of all, its own among them, the targets of all, mined negatives."""

    queries: Tensor
    targets: Tensor
    mined: Tensor
    ids: list[int] | None = None
    owners: list[int] | None = None

    @property
    def own(self) -> Tensor:
        return self.queries[OFFSET : OFFSET + OWN]


def batch(ids: list[int] | None = None, owners: list[int] | None = None) -> Batch:
    generator = torch.Generator().manual_seed(3)
    return Batch(unit(generator, ALL), unit(generator, ALL), unit(generator, MINED), ids, owners)


@dataclass
class Column:
    """One term that a row may have in its denominator."""

    pool: str
    score: Tensor
    key: Tensor  # vector that is compared with the positive
    content: int | None
    hardness: HardnessConfig | None


@dataclass
class Oracle:
    """The loss, term by term, in the multiplicative form of the papers. `fault` plants a mistake."""

    config: ObjectiveConfig
    fault: str = ""
    step: int = 10

    def loss(self, batch: Batch, theta: Tensor) -> Tensor:
        tau = torch.exp(theta)
        per_width = []
        for dims in [*self.config.matryoshka, WIDTH]:
            forth = [self.row(*self.columns(batch, i, dims), tau) for i in range(OFFSET, OFFSET + OWN)]
            back = [self.row(*self.columns_back(batch, i, dims), tau) for i in range(OFFSET, OFFSET + OWN)]
            share = self.config.symmetric
            per_width.append((1 - share) * sum(forth) / OWN + share * sum(back) / OWN)
        return sum(per_width) / len(per_width)

    def columns(self, batch: Batch, i: int, dims: int) -> tuple[Column, list[Column]]:
        """The positive of query i, and everything else it meets."""
        queries, targets, mined = (cut(part, dims) for part in (batch.queries, batch.targets, batch.mined))
        content = batch.ids or list(range(ALL))
        hardness = self.config.hardness

        def column(pool: str, score: Tensor, j: int) -> Column:
            return Column(pool, score, batch.targets[j].detach(), content[j], hardness)

        positive = column("targets", queries[i] @ targets[i], i)
        others = [column("targets", queries[i] @ targets[j], j) for j in range(ALL) if j != i]
        if "queries" in self.config.same_side:
            others += [column("queries", queries[i] @ queries[j], j) for j in range(ALL) if j != i]
        if "targets" in self.config.same_side:
            others += [column("same targets", targets[i] @ targets[j], j) for j in range(ALL) if j != i]
        if batch.owners is not None:
            shared, weights = self.config.mined.shared, self.config.mined.hardness
            for m, owner in enumerate(batch.owners):
                if owner == i or (owner >= 0 and shared):
                    key = batch.mined[m].detach()
                    others.append(Column("mined", queries[i] @ mined[m], key, None, weights))
        return positive, others

    def columns_back(self, batch: Batch, i: int, dims: int) -> tuple[Column, list[Column]]:
        """The query of target i, and all other queries."""
        queries, targets = (cut(part, dims) for part in (batch.queries, batch.targets))
        content = batch.ids or list(range(ALL))
        found = [
            Column("targets", targets[i] @ queries[j], batch.targets[j].detach(), content[j], self.config.hardness)
            for j in range(ALL)
        ]
        return found[i], found[:i] + found[i + 1 :]

    def row(self, positive: Column, others: list[Column], tau: Tensor) -> Tensor:
        rule = self.config.false_negatives if self.step >= 10 else None
        copies = [column for column in others if column.content is not None and column.content == positive.content]
        dropped = {id(column) for column in copies}
        if rule is not None:
            like = {id(column): float(column.key @ positive.key) for column in others}
            like |= {id(column): math.inf for column in copies}
            cap = len(others) if self.fault == "no cap" else int(rule.max_dropped_fraction * len(others))
            most_alike = sorted(others, key=lambda column: -like[id(column)])[:cap]
            dropped |= {id(column) for column in most_alike if like[id(column)] > rule.threshold}
        if self.config.margin is not None:
            most = float(positive.score.detach()) + self.config.margin
            dropped |= {id(column) for column in others if float(column.score.detach()) > most}
        kept = [column for column in others if id(column) not in dropped]
        negatives = torch.zeros((), dtype=torch.float64)
        for pool in sorted({column.pool for column in kept}):
            group = [column for column in kept if column.pool == pool]
            weights = [self.weight(column, tau) for column in group]
            hardness = group[0].hardness
            if hardness is not None and hardness.normalized:
                mean = sum(weights) / len(weights)
                weights = [weight / mean for weight in weights]
            for weight, column in zip(weights, group, strict=True):
                negatives = negatives + weight * torch.exp(column.score / tau)
        wanted = [positive]
        if self.config.copies == "positive":
            wanted += [column for column in copies if column.pool == "targets"]
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


def evaluate(made: ObjectiveConfig, data: Batch, step: int = 10) -> list[Tensor]:
    """Our loss, and its gradients by queries, targets, mined negatives and theta."""
    objective = Objective(made, TASKS).double()
    mined = None if data.owners is None else Mined(data.mined, torch.tensor(data.owners))
    loss, _ = objective(
        data.own,
        data.targets,
        "text_image",
        positive_offset=OFFSET,
        step=step,
        queries_ND=data.queries if objective.needs_queries else None,
        mined=mined,
        target_ids_N=None if data.ids is None else torch.tensor(data.ids),
    )
    found = gradients(loss, data, objective.theta_T)
    assert found[-1][1] == 0.0  # the other task
    return [*found[:-1], found[-1][0]]


def expected(made: ObjectiveConfig, data: Batch, step: int = 10, fault: str = "") -> list[Tensor]:
    """The same by the double loop."""
    tau = made.temperature.initial
    theta = torch.tensor(math.log(tau), dtype=torch.float32).double().requires_grad_()
    return gradients(Oracle(made, fault, step).loss(data, theta), data, theta)


def gradients(loss: Tensor, data: Batch, theta: Tensor) -> list[Tensor]:
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
    "copies are positives": {"copies": "positive"},
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
        "copies": "positive",
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


@pytest.mark.parametrize("tile_rows", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("tau", [0.5, 0.005], ids=["loss of about 3", "tiny losses"])
@pytest.mark.parametrize("options", [OPTIONS["recipe"], OPTIONS["everything"]], ids=["recipe", "everything"])
def test_tiles_change_nothing(options: dict[str, Any], tau: float, tile_rows: int) -> None:
    data = batch(IDS, OWNERS)
    whole, tiled = (evaluate(config(tau=tau, tile_rows=rows, **options), data) for rows in (None, tile_rows))
    assert distance(tiled, whole) < 1e-12


@pytest.mark.parametrize(
    "fault", ["alpha scaled by temperature", "weight not detached", "positive weighted too", "rule too early", "no cap"]
)
def test_the_double_loop_catches_planted_faults(fault: str) -> None:
    data, made = batch(IDS, OWNERS), config()
    step = 9 if fault == "rule too early" else 10
    assert distance(evaluate(made, data, step), expected(made, data, fault=fault)) > 1e-2


def test_without_extras_it_is_cross_entropy() -> None:
    data = batch()
    loss, _ = Objective(config(alpha=0.0, rule=None), TASKS).double()(
        data.own, data.targets, "text_image", positive_offset=2, step=0
    )
    plain = torch.nn.functional.cross_entropy(data.own @ data.targets.T / 0.1, torch.arange(2, 7))
    assert float((loss - plain).detach()) == pytest.approx(0.0, abs=1e-6)


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
        "effective_fraction": 1.0,
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
    data = batch()
    objective = Objective(config(alpha=9.0, rule=None, tau=0.005), ["t"])
    loss, _ = objective(data.own.float(), data.targets.float(), "t", positive_offset=0, step=0)
    (gradient,) = torch.autograd.grad(loss, data.queries)
    assert math.isfinite(loss.item())
    assert bool(gradient.isfinite().all())


def test_bf16_embeddings_are_scored_in_fp32_even_under_autocast() -> None:
    queries, targets = (part.detach().bfloat16() for part in (batch().own, batch().targets))
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
    data = batch()
    with pytest.raises(UserError, match=r"task 'audio'.*known tasks: text_image, text_video"):
        Objective(config(), TASKS)(data.own, data.targets, "audio", positive_offset=0, step=0)


def test_small_losses_keep_their_precision() -> None:
    """At a loss of 1e-6 the fp32 loss is still right to 1e-4 of itself: a difference of logarithms would not be."""
    generator = torch.Generator().manual_seed(0)
    targets = normalize(torch.randn(64, 16, generator=generator, dtype=torch.float64), dim=1)
    made = config(alpha=0.0, rule=None, tau=0.05)
    exact, _ = Objective(made, ["t"]).double()(targets, targets, "t", positive_offset=0, step=0)
    loss, _ = Objective(made, ["t"])(targets.float(), targets.float(), "t", positive_offset=0, step=0)
    assert 1e-8 < float(exact) < 1e-2
    assert float(loss) == pytest.approx(float(exact), rel=1e-4)
