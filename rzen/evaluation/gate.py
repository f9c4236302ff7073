"""Whether a new model replaces the champion, by the scores of both for the same queries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rzen.evaluation.comparison import MEAN, paired_intervals

MIN_QUERIES = 100
"""With 100 queries, the 95% interval of a score of one half is about 10 points to each side. Our choice."""


@dataclass(frozen=True)
class Verdict:
    """The decision, its reasons and its scores: task -> champion, candidate, and their difference."""

    promote: bool
    reasons: list[str]
    scores: dict[str, dict[str, Any]]


def too_few_queries(counts: Mapping[str, int], min_queries: int) -> list[str]:
    """Return why these numbers of queries by task decide nothing; empty if they do."""
    return [
        f"{task} has {count} queries, fewer than {min_queries}: too few to decide"
        for task, count in counts.items()
        if count < min_queries
    ]


def judge(
    champion: Mapping[str, NDArray[np.float64]] | None,
    candidate: Mapping[str, NDArray[np.float64]],
    *,
    min_gain: float,
    max_drop: float,
    minimum: Mapping[str, float],
    draws: int,
    min_queries: int = MIN_QUERIES,
) -> Verdict:
    """Compare scores by task, one for each query ([Q], in the same order for both models), in [0, 1].

    Four conditions promote a model. Each task has at least `min_queries`, because fewer show nothing. The mean gain
    over the tasks is above `min_gain` with its whole 95% interval. No task loses more than `max_drop`. All scores reach
    their `minimum`. Without a champion, only the first and the last one count.
    """
    scores: dict[str, dict[str, Any]] = {task: {"candidate": float(each.mean())} for task, each in candidate.items()}
    reasons = too_few_queries({task: len(each) for task, each in candidate.items()}, min_queries)
    for task, least in minimum.items():
        if task not in scores:
            reasons.append(f"{task} has no score")
        elif scores[task]["candidate"] < least:
            reasons.append(f"{task} scores {scores[task]['candidate']:.3f}, less than {least}")
    if champion is None:
        return Verdict(not reasons, reasons or ["there is no champion yet"], scores)
    gains = {task: candidate[task] - champion[task] for task in candidate}
    intervals = paired_intervals(gains, num_draws=draws)
    for task in gains:
        scores[task] |= {"champion": float(champion[task].mean()), "difference": asdict(intervals[task])}
        if intervals[task].mean < -max_drop:
            reasons.append(f"{task} loses {-intervals[task].mean:.3f}, more than {max_drop}")
    gain = intervals[MEAN]
    scores[MEAN] = {"difference": asdict(gain)}
    told = f"mean gain {gain.mean:+.4f}, 95% interval {gain.low:+.4f} to {gain.high:+.4f}"
    if gain.low <= min_gain:
        reasons.append(f"{told}, not all above {min_gain}")
    return Verdict(not reasons, reasons or [told], scores)
