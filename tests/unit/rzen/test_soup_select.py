"""Which parents, with which weights: against scores that are known everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest

from pipelines.errors import UserError
from rzen.soup.select import Selection, greedy_weights, searched_weights

NAMES = ["a", "b", "c"]
Score = Callable[[Mapping[str, float]], float]


def hill(best: Mapping[str, float], *, power: float = 2.0) -> Score:
    """Concave, highest at `best`, falling with a power of the distance."""
    return lambda weights: -(sum((weights.get(n, 0) - w) ** 2 for n, w in best.items()) ** (power / 2))


def distance(found: Mapping[str, float], best: Mapping[str, float]) -> float:
    return math.sqrt(sum((found.get(name, 0) - weight) ** 2 for name, weight in best.items()))


def searched(
    score: Score, *, names: Sequence[str] = NAMES, evaluations: int = 24, at_once: int = 4, seed: int = 0
) -> tuple[Selection, list[list[Mapping[str, float]]]]:
    batches: list[list[Mapping[str, float]]] = []

    def scores_of(batch: Sequence[Mapping[str, float]]) -> list[float]:
        batches.append([dict(weights) for weights in batch])
        return [score(weights) for weights in batch]

    found = searched_weights(names, scores_of, evaluations=evaluations, at_once=at_once, seed=seed)
    return found, batches


def test_greedy_adds_while_the_mean_gets_better() -> None:
    asked: list[dict[str, float]] = []
    means = {"ba": 0.8, "bad": 0.75, "bac": 0.85}

    def score_of(weights: Mapping[str, float]) -> float:
        asked.append(dict(weights))
        return means["".join(weights)]

    found = greedy_weights({"a": 0.6, "b": 0.7, "c": 0.3, "d": 0.5}, score_of)
    third = 1 / 3
    assert found.weights == {"b": third, "a": third, "c": third}
    assert found.score == 0.85
    assert asked == [{"b": 0.5, "a": 0.5}, {"b": third, "a": third, "d": third}, {"b": third, "a": third, "c": third}]
    assert [(step["score"], step["kept"]) for step in found.trace] == [
        (0.7, True),
        (0.8, True),
        (0.75, False),
        (0.85, True),
    ]


def test_greedy_keeps_none_that_changes_nothing_and_orders_equals_by_name() -> None:
    for names in ("cab", "bca"):
        found = greedy_weights(dict.fromkeys(names, 0.5), lambda weights: 0.5)
        assert (found.weights, found.score) == ({"a": 1.0}, 0.5)
        assert [list(step["weights"]) for step in found.trace] == [["a"], ["a", "b"], ["a", "c"]]


def test_greedy_of_one_asks_nothing() -> None:
    assert greedy_weights({"a": 0.5}, lambda weights: pytest.fail("asked")).weights == {"a": 1.0}


BEST = {
    "inside": {"a": 0.55, "b": 0.3, "c": 0.15},
    "edge": {"a": 0.0, "b": 0.35, "c": 0.65},
    "corner": {"a": 0.0, "b": 1.0, "c": 0.0},
}


@pytest.mark.parametrize("best", BEST.values(), ids=BEST)
@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize(("power", "within"), [(2.0, 0.01), (1.0, 0.08)], ids=["quadratic", "cone"])
def test_search_comes_near_the_best(best: dict[str, float], at_once: int, power: float, within: float) -> None:
    """Weights are multiples of 1/102; a cone is nothing that the search has a model of."""
    for seed in range(10):
        found, _ = searched(hill(best, power=power), at_once=at_once, seed=seed)
        assert distance(found.weights, best) < within


def test_search_of_five_parents_in_a_slanted_valley() -> None:
    slopes = np.random.default_rng(0).normal(size=(5, 5))
    best = np.array([0.4, 0.3, 0.2, 0.1, 0.0])

    def score(weights: Mapping[str, float]) -> float:
        away = slopes @ (np.array([weights.get(name, 0.0) for name in "abcde"]) - best)
        return float(np.exp(-away @ away))

    for seed in range(5):
        found, _ = searched(score, names="abcde", evaluations=40, seed=seed)
        assert found.score > 0.95
        assert found.score > max(score({name: 1.0}) for name in "abcde")


def test_search_under_noise_is_better_than_equal_weights() -> None:
    best, noise = BEST["inside"], np.random.default_rng(1)
    exact = hill(best)
    gains = []
    for seed in range(20):
        found, _ = searched(lambda weights: exact(weights) + float(noise.normal(scale=0.01)), seed=seed)
        gains.append(exact(found.weights) - exact(dict.fromkeys(NAMES, 1 / 3)))
    assert sum(gain > 0 for gain in gains) >= 18


def test_search_starts_with_equal_weights_and_asks_nothing_twice() -> None:
    found, batches = searched(hill(BEST["inside"]), at_once=5)
    asked = [weights for batch in batches for weights in batch]
    assert asked[0] == dict.fromkeys(NAMES, 1 / 3)
    assert asked[1:4] == [{"a": 1.0}, {"b": 1.0}, {"c": 1.0}]
    assert len(asked) == len({tuple(sorted(weights.items())) for weights in asked}) == 24
    assert [len(batch) for batch in batches] == [4, 5, 5, 5, 5]
    assert all(sum(weights.values()) == pytest.approx(1) and min(weights.values()) > 0 for weights in asked)
    assert [step["weights"] for step in found.trace] == asked
    assert found.score == max(step["score"] for step in found.trace)


def test_known_scores_are_not_asked_for_and_can_win() -> None:
    scores = {"a": 0.9, "b": 0.1, "c": 0.2}
    asked: list[Mapping[str, float]] = []

    def scores_of(batch: Sequence[Mapping[str, float]]) -> list[float]:
        asked.extend(batch)
        return [0.5] * len(batch)

    found = searched_weights(NAMES, scores_of, evaluations=6, at_once=4, seed=0, scores=scores)
    assert not [weights for weights in asked if len(weights) == 1]
    assert len(asked) == 6
    assert (found.weights, found.score) == ({"a": 1.0}, 0.9)


def test_search_is_decided_by_its_seed_and_not_by_the_order_of_names() -> None:
    score = hill(BEST["inside"], power=1)
    one, _ = searched(score, seed=3)
    assert searched(score, seed=3, names=["c", "a", "b"])[0] == one
    assert searched(score, seed=4)[0].trace != one.trace


def test_search_ends_where_nothing_is_left_to_ask() -> None:
    found, batches = searched(hill({"a": 1.0}), names=["a"], evaluations=9)
    assert (found.weights, batches) == ({"a": 1.0}, [[{"a": 1.0}]])
    found, batches = searched(hill({"a": 0.3, "b": 0.7}), names=["a", "b"], evaluations=400)
    assert found.weights == {"a": 0.3, "b": 0.7}
    asked = [tuple(sorted(weights.items())) for batch in batches for weights in batch]
    assert len(set(asked)) == len(asked) <= 101


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(UserError, match=f"is {bad}"):
        greedy_weights({"a": 1.0, "b": bad}, lambda weights: 1.0)
    with pytest.raises(UserError, match=f"is {bad}"):
        greedy_weights({"a": 1.0, "b": 0.5}, lambda weights: bad)
    with pytest.raises(UserError, match=f"is {bad}"):
        searched(lambda weights: bad)
