"""Select the parents of a soup and their weights, from scores only. Higher is better; what is scored does not matter.

Both searches are deterministic, and ask for no weights twice.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import UserError

Weights = Mapping[str, float]  # parent -> weight, positive, of sum 1
Point = tuple[int, ...]  # weights in parts of a whole
STEPS = 100  # a whole has at least so many parts, and a multiple of the number of parents
NEAREST = 0.05  # the last samples lie within this share of the way from the best to anywhere
POOL = 64  # samples from which the next are taken, to have enough that are new


@dataclass(frozen=True)
class Selection:
    """The weights of a soup (positive, of sum 1), its score, and all that was scored on the way, in order."""

    weights: dict[str, float]
    score: float
    trace: list[dict[str, Any]]


def greedy_weights(scores: Mapping[str, float], score_of: Callable[[Weights], float]) -> Selection:
    """Take parents by their own `scores` from the best down. Keep each if the mean scores higher with it than without.

    This is recipe 1 of Wortsman et al. (arXiv 2203.05482), except that it keeps no parent that changes nothing: that
    would cost rank. Equal scores are ordered by name. `score_of` is called once for each parent but the best.
    """
    for name, own in scores.items():
        _check_finite({name: 1.0}, own)
    first, *others = sorted(scores, key=lambda name: (-scores[name], name))
    kept, score = [first], scores[first]
    trace: list[dict[str, Any]] = [{"weights": {first: 1.0}, "score": score, "kept": True}]
    for name in others:
        weights = dict.fromkeys([*kept, name], 1 / (len(kept) + 1))
        found = score_of(weights)
        _check_finite(weights, found)
        trace.append({"weights": weights, "score": found, "kept": found > score})
        if found > score:
            kept, score = [*kept, name], found
    return Selection(dict.fromkeys(kept, 1 / len(kept)), score, trace)


def searched_weights(
    names: Sequence[str],
    scores_of: Callable[[Sequence[Weights]], Sequence[float]],
    *,
    evaluations: int,
    at_once: int,
    seed: int,
    scores: Mapping[str, float] | None = None,
) -> Selection:
    """Return the best of at most `evaluations` weights. Each call of `scores_of` scores up to `at_once` of them.

    Equal weights and single parents come first, except those whose `scores` are known. Then each call gets the best
    point of a quadratic model of the scores so far (Scheffé's polynomial for mixtures), once there are enough scores.
    The other points are samples of a simplex that narrows around the best. Weights are multiples of about 1/100.
    """
    names = sorted(names)
    parts = len(names) * math.ceil(STEPS / len(names))
    singles = {name: tuple(parts * (name == other) for other in names) for name in names}
    found: dict[Point, float] = {singles[name]: scores[name] for name in names if scores and name in scores}
    trace: list[dict[str, Any]] = []
    for point, score in found.items():
        _check_finite(_weights(point, names), score)
    waiting = [p for p in dict.fromkeys([(parts // len(names),) * len(names), *singles.values()]) if p not in found]
    rng = np.random.default_rng(seed)
    while (left := evaluations - len(trace)) > 0:
        count = min(at_once, left)
        points, waiting = waiting[:count], waiting[count:]
        if not points:
            reach = NEAREST ** (len(trace) / evaluations)
            points = _propose(found, parts, reach, count, rng)
        if not points:
            break  # every point near the best is known
        batch = [_weights(point, names) for point in points]
        for point, weights, score in zip(points, batch, scores_of(batch), strict=True):
            _check_finite(weights, score)
            found[point] = score
            trace.append({"weights": weights, "score": score})
    best = _best(found)
    return Selection(_weights(best, names), found[best], trace)


def _propose(
    found: Mapping[Point, float], parts: int, reach: float, count: int, rng: np.random.Generator
) -> list[Point]:
    """Return new points: the best by a model, except in turns of samples only, and samples around the best so far."""
    centre_P = np.array(_best(found)) / parts
    drawn_NP = (1 - reach) * centre_P + reach * rng.dirichlet(np.ones(len(centre_P)), POOL)
    points = [point for point in dict.fromkeys(_rounded(drawn_P, parts) for drawn_P in drawn_NP) if point not in found]
    terms = len(centre_P) * (len(centre_P) + 1) // 2
    if len(found) >= terms and (count > 1 or len(found) % 2 == 0):
        likely = _likely(found, parts, reach)
        points = [*likely, *(point for point in points if point not in likely)]
    return points[:count]


def _likely(found: Mapping[Point, float], parts: int, reach: float) -> list[Point]:
    """Return the new point that a model of the known ones scores highest, among those on the way up from the best.

    The model is a least-squares fit in which far points count little, because scores are quadratic only near the best.
    """
    best, known_NP = _best(found), np.array(list(found)) / parts
    distances_N = np.linalg.norm(known_NP - np.array(best) / parts, axis=1)
    counts_N = np.exp(-np.square(distances_N / (2 * reach + 0.1))) + 1e-3
    scores_N = np.array(list(found.values()))
    model_T = np.linalg.lstsq(_terms(known_NP) * counts_N[:, None], scores_N * counts_N, rcond=None)[0]
    here, seen = best, {best: float(_terms(np.array([best]) / parts)[0] @ model_T)}
    while moves := _moves(here):
        values_N = _terms(np.array(moves) / parts) @ model_T
        seen.update(zip(moves, values_N.tolist(), strict=True))
        there = moves[int(np.argmax(values_N))]
        if seen[there] <= seen[here] + 1e-12:
            break
        here = there
    new = [point for point in seen if point not in found]
    return [max(new, key=lambda point: (seen[point], point))] if new else []


def _moves(point: Point) -> list[Point]:
    """Return the points that differ by 1, 2, 4, ... parts moved from one parent to another."""
    found = []
    for giver, taker in itertools.permutations(range(len(point)), 2):
        step = 1
        while step <= point[giver]:
            moved = list(point)
            moved[giver] -= step
            moved[taker] += step
            found.append(tuple(moved))
            step *= 2
    return found


def _rounded(weights_P: NDArray[np.float64], parts: int) -> Point:
    """Return whole parts with the sum `parts`: those with the largest fractions are rounded up."""
    floors_P = np.floor(weights_P * parts).astype(int)
    missing = parts - int(floors_P.sum())
    floors_P[np.argsort(floors_P - weights_P * parts, kind="stable")[:missing]] += 1
    return tuple(int(part) for part in floors_P)


def _terms(weights_NP: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return Scheffé's terms: weights and their products in pairs.

    Weights sum to 1, so that squares and a constant are linear combinations of these.
    """
    i, j = np.triu_indices(weights_NP.shape[1], 1)
    return np.concatenate([weights_NP, weights_NP[:, i] * weights_NP[:, j]], axis=1)


def _best(found: Mapping[Point, float]) -> Point:
    return max(found, key=lambda point: (found[point], point))


def _weights(point: Point, names: Sequence[str]) -> dict[str, float]:
    return {name: part / sum(point) for name, part in zip(names, point, strict=True) if part}


def _check_finite(weights: Weights, score: float) -> None:
    if not math.isfinite(score):
        raise UserError(f"score of {dict(weights)}", f"is {score}", "a soup is chosen by finite scores")
