"""The objective against the losses of sentence-transformers, where the two mean the same: loss and gradients in fp64.

Where they differ, and are not compared: theirs weighs same-side and reverse terms by no hardness, ours does; its
`in_batch_negatives` weighs mined negatives of other queries like in-batch ones, and its `hard_negatives` only a query's
own, while ours has one weight for all mined ones; its joint `doc_to_query` counts the positive twice (as GTE does).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    CoSENTLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from torch import Tensor, nn
from torch.nn.functional import normalize

from rzen.config import HardnessConfig, MinedConfig, ObjectiveConfig, TemperatureConfig
from rzen.objective.batch import Batch, Mined
from rzen.objective.loss import Objective

PAIRS, WIDTH, TAU = 7, 6, 0.05
HARD = HardnessConfig(alpha=9.0)


class Given(nn.Module):
    """A model whose vectors are its input."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": features["vectors"]}

    def get_embedding_dimension(self) -> int:
        return WIDTH

    def __getitem__(self, _: int) -> Given:
        return self


def leaves(inputs: int) -> list[Tensor]:
    """Queries, targets, and one mined negative a query where there are three inputs. Not of length 1."""
    generator = torch.Generator().manual_seed(11)
    return [
        torch.randn(PAIRS, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(inputs)
    ]


def ours(inputs: int, relevance: Tensor | None = None, tau: float = TAU, **options: Any) -> list[Tensor]:
    """Loss and gradients by the leaves."""
    settings = {"hardness": None, "false_negatives": None, "temperature": TemperatureConfig(initial=tau)} | options
    objective = Objective(ObjectiveConfig(**settings), ["t"]).double()
    inputs = leaves(inputs)
    queries, targets, *mined = (normalize(input, dim=1) for input in inputs)
    loss, _ = objective(
        Batch(
            queries,
            targets,
            "t",
            all_queries=queries,
            mined=Mined(mined[0], torch.arange(PAIRS)) if mined else None,
            relevance=relevance,
        ),
        step=0,
    )
    loss.backward()
    return [loss.detach().reshape(1), *(input.grad for input in inputs)]


def theirs(inputs: int, loss: nn.Module, labels: Tensor | None = None) -> list[Tensor]:
    inputs = leaves(inputs)
    vectors = [normalize(input, dim=1).detach().requires_grad_() for input in inputs]
    value = loss([{"vectors": part} for part in vectors], labels)
    value.backward()
    # Their losses normalize too, and the cached one brings its gradients from a hook.
    found = [
        torch.autograd.grad(normalize(input, dim=1), input, part.grad)[0]
        for input, part in zip(inputs, vectors, strict=True)
    ]
    return [value.detach().reshape(1), *found]


def distance(left: list[Tensor], right: list[Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(left, right, strict=True))


def scale(tau: float = TAU) -> float:
    """1 / tau as the objective has it, whose theta is fp32 at first."""
    temperature = TemperatureConfig(initial=tau)
    return 1 / float(Objective(ObjectiveConfig(temperature=temperature), ["t"]).double().temperature("t").detach())


CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    # name: (inputs, our options, theirs)
    "plain": (2, {}, {}),
    "hardness": (2, {"hardness": HARD}, {"hardness_mode": "in_batch_negatives", "hardness_strength": 9.0}),
    "mined": (3, {"mined": MinedConfig(hardness=None)}, {}),
    "mined, hardness of all": (
        3,
        {"hardness": HARD, "mined": MinedConfig(hardness=HARD)},
        {"hardness_mode": "all_negatives", "hardness_strength": 9.0},
    ),
    "two-way": (
        2,
        {"symmetric": 0.5},
        {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
    ),
    "other queries": (2, {"same_side": ["queries"]}, {"directions": ("query_to_doc", "query_to_query")}),
    "all pairs": (
        2,
        {"same_side": ["queries", "targets"]},
        {"directions": ("query_to_doc", "query_to_query", "doc_to_doc")},
    ),
}


@pytest.mark.parametrize("tile_rows", [None, 3])
@pytest.mark.parametrize("case", CASES)
def test_multiple_negatives_ranking(case: str, tile_rows: int | None) -> None:
    inputs, options, their_options = CASES[case]
    expected = theirs(inputs, MultipleNegativesRankingLoss(Given(), scale=scale(), **their_options))
    assert distance(ours(inputs, tile_rows=tile_rows, **options), expected) < 1e-9
    assert distance(ours(inputs, hardness=HardnessConfig(alpha=1.0)), expected) > 1e-2


@pytest.mark.parametrize("case", CASES)
def test_cached_multiple_negatives_ranking(case: str) -> None:
    inputs, options, their_options = CASES[case]
    loss = CachedMultipleNegativesRankingLoss(Given(), scale=scale(), mini_batch_size=3, **their_options)
    assert distance(ours(inputs, tile_rows=3, **options), theirs(inputs, loss)) < 1e-9


@pytest.mark.parametrize("tau", [0.5, 0.05, 0.01])
def test_cosent(tau: float) -> None:
    relevance = torch.tensor([0.0, 3.8, 1.5, 1.5, 5.0, 0.0, 2.2], dtype=torch.float64)
    expected = theirs(2, CoSENTLoss(Given(), scale=scale(tau)), relevance)
    assert distance(ours(2, relevance, tau), expected) < 1e-9
    assert distance(ours(2, relevance.flip(0), tau), expected) > 1e-2


@pytest.mark.parametrize("graded", [False, True], ids=["contrasted", "graded"])
def test_matryoshka(graded: bool) -> None:
    """Theirs is a sum, weighted here to a mean."""
    widths = [2, 4, WIDTH]
    inner = CoSENTLoss(Given(), scale=scale()) if graded else MultipleNegativesRankingLoss(Given(), scale=scale())
    relevance = torch.arange(PAIRS, dtype=torch.float64) if graded else None
    expected = theirs(2, MatryoshkaLoss(inner.model, inner, widths, [1 / 3] * 3), relevance)
    assert distance(ours(2, relevance, matryoshka=[2, 4]), expected) < 1e-9
    assert distance(ours(2, relevance, matryoshka=[2]), expected) > 1e-2
