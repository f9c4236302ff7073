"""Held-out scores of vectors that are given: what is a query, what is a candidate, and what ranks first."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rzen.training.embedding_held_out import score
from rzen.training.held_out import HeldOut, HeldOutScorer, HeldOutShare

NAN = math.nan
X, Y, Z = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]


class Given:
    """In place of a learner: the inputs are their own vectors."""

    def score(self, shares: Any) -> Any:
        return score(given_vectors, shares)


def given_vectors(batches: Any) -> Any:
    return np.array([vector for batch in batches for vector in batch.vectors], np.float32)


def share(*samples: tuple[int, int, list[float], list[float]]) -> HeldOutShare:
    """Samples of id of the query, id of the target, and their vectors. Their rows are 10, 11, ..."""
    query_ids, target_ids, queries, targets = zip(*samples, strict=True)

    def side(vectors: Any) -> Any:
        return SimpleNamespace(vectors=vectors)

    pairs: Any = SimpleNamespace(
        query_ids=np.array(query_ids),
        target_ids=np.array(target_ids),
        instruction_ids=np.zeros(len(samples), np.int64),
        queries=side(queries),
        targets=side(targets),
    )
    return HeldOutShare(range(10, 10 + len(samples)), pairs)


def scored(*samples: Any) -> Any:
    return score(given_vectors, {"s": share(*samples)})["s"]


def test_each_query_is_searched_among_all_targets() -> None:
    found = scored((1, 101, X, X), (2, 102, Y, X), (3, 103, Z, Z))
    assert found == {
        "hit": pytest.approx(1 / 3),
        "candidates": 3,
        "queries": [10, 11, 12],
        "ranks": [2, 3, 1],
        "found": [11, found["found"][1], 12],
    }
    assert found["found"][1] != 11  # all tie, and ties count against the relevant one


def test_equal_targets_are_one_candidate_and_equal_queries_one_query() -> None:
    found = scored((1, 101, X, X), (2, 101, Y, X), (1, 103, X, Y), (4, 104, Z, Z))
    assert (found["candidates"], found["queries"]) == (3, [10, 11, 13])
    assert found["ranks"] == [1, 3, 1]  # the first query has two relevant targets


def test_a_target_that_shows_what_the_query_shows_is_no_answer() -> None:
    samples = ((3, 101, Z, X), (101, 102, X, Y))
    assert scored(*samples)["ranks"] == [2, 1]
    assert scored(samples[0], (5, 102, X, Y))["ranks"] == [2, 2]  # another query is not told from the first target


def test_vectors_that_are_not_finite_find_nothing() -> None:
    lost = [NAN, NAN, NAN]
    found = scored((1, 101, lost, lost), (2, 102, lost, lost), (3, 103, X, lost))
    assert found["hit"] == 0
    assert found["ranks"] == [3, 3, 3]


def test_a_collapsed_model_finds_nothing() -> None:
    assert scored(*((number, 100 + number, X, X) for number in range(1, 5)))["hit"] == 0


def test_sources_without_samples_are_left_out_and_the_mean_is_over_the_others() -> None:
    modes: list[str] = []
    engine = SimpleNamespace(eval=lambda: modes.append("eval"), train=lambda: modes.append("train"), module=Given())
    shares = {"a": share((1, 101, X, X)), "none": HeldOutShare((), None), "b": share((1, 101, X, Y), (2, 102, Y, X))}
    reads: list[int] = []

    def read() -> dict[str, HeldOutShare]:
        reads.append(1)
        return shares

    rows: list[Any] = []
    scorer = HeldOutScorer(engine, HeldOut(3, read), num_steps=5, on_scores=rows.append)
    for done in range(6):
        scorer.after(done)
    assert [(row["step"], row["hit"], list(row["sources"])) for row in rows] == [
        (done, 0.5, ["a", "b"]) for done in (0, 3, 5)
    ]
    assert len(reads) == 1
    assert modes == ["eval", "train"] * 3
