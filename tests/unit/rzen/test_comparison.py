"""Paired intervals of two models, and what diagnostics tell."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipelines.benchmarks.types import Dataset, Query, Row, without_instructions
from pipelines.errors import UserError
from pipelines.items.types import Item
from pipelines.samples import Input, Media
from rzen.evaluation.comparison import (
    compare,
    comparison_table,
    finds_target_modality,
    instruction_sensitivity,
    modality_gap,
)
from rzen.evaluation.dataset_scores import DatasetScores, score_dataset
from rzen.evaluation.vectors import Vectors

ROW = Row("toy", "custom", "mixed", "toy", "global", "hit@1", None, "custom")


def dataset(num_queries: int, name: str = "toy") -> Dataset:
    """Candidates: a text, which is relevant to all, and an image."""
    text, image = (
        Item(f"{1:032}", "text", Input("a"), "a"),
        Item(f"{2:032}", "image", Input("", (Media("image", "p0.jpg"),)), "p"),
    )
    queries = [
        Query(Item(f"q{number:031}", str(number), Input("?"), "q", "Find it:"), {text.id: 1.0})
        for number in range(num_queries)
    ]
    return Dataset(replace(ROW, name=name), queries, [text, image], name)


def scored(right: list[int], name: str = "toy", of: Dataset | None = None) -> DatasetScores:
    """Queries with 1 find the text, those with 0 the image. No two queries are alike, as that would be a collapse."""
    asked = of or dataset(len(right), name)
    queries = np.eye(len(right), len(right) + 2, k=2, dtype=np.float32)
    queries[np.arange(len(right)), [0 if hit else 1 for hit in right]] = 1
    return score_dataset(
        asked,
        Vectors.of((query.item.id for query in asked.queries), queries / np.sqrt(np.float32(2))),
        Vectors.of((item.id for item in asked.candidates), np.eye(2, len(right) + 2, dtype=np.float32)),
    )


def test_equal_models_differ_by_nothing() -> None:
    right = [1, 0, 1, 1, 0]
    found = compare({"toy": scored(right)}, {"toy": scored(right)})
    assert (found["toy"].mean, found["toy"].low, found["toy"].high) == (0, 0, 0)


def test_pairing_tells_a_small_difference_that_two_intervals_would_hide() -> None:
    """The second model answers 12 of 400 queries more, and none less. Unpaired, the interval is 14 points wide."""
    first = [1] * 200 + [0] * 200
    second = [1] * 212 + [0] * 188
    found = compare({"toy": scored(first)}, {"toy": scored(second)})["toy"]
    assert found.mean == pytest.approx(0.03)
    spread = np.sqrt(0.03 * 0.97 / 400)
    assert found.low == pytest.approx(0.03 - 1.96 * spread, abs=0.004)
    assert found.high == pytest.approx(0.03 + 1.96 * spread, abs=0.004)
    unpaired = np.sqrt(2 * 0.25 / 400)
    assert found.low > 0 > 0.03 - 1.96 * unpaired


def test_interval_of_the_mean_draws_each_dataset_by_itself() -> None:
    """All queries of one dataset improve, none of the other: the mean is half a point of each, without any doubt."""
    first = {"a": scored([0, 0, 0, 1], "a"), "b": scored([1, 0, 1, 0], "b")}
    second = {"a": scored([1, 1, 1, 1], "a"), "b": first["b"], "c": scored([1, 0], "c")}
    found = compare(first, second)
    assert list(found) == ["a", "b", "mean"]
    assert (found["b"].low, found["b"].high) == (0, 0)
    assert found["mean"].mean == pytest.approx(3 / 8)
    assert found["mean"].high == pytest.approx(1 / 2)
    assert found["mean"].num_queries == 8


def test_the_same_seed_gives_the_same_interval() -> None:
    first, second = {"toy": scored([1, 0, 1, 0, 0, 1])}, {"toy": scored([1, 1, 1, 0, 1, 0])}
    assert compare(first, second, seed=3) == compare(first, second, seed=3)


def test_models_that_were_asked_different_things_are_not_compared() -> None:
    with pytest.raises(UserError, match="asked different queries"):
        compare({"toy": scored([1, 0])}, {"toy": scored([1, 0, 1])})
    with pytest.raises(UserError, match="no dataset in common"):
        compare({"toy": scored([1, 0])}, {"other": scored([1, 0], "other")})


def test_table_of_differences() -> None:
    found = compare({"toy": scored([0, 0, 0])}, {"toy": scored([1, 1, 0])})
    table = comparison_table(found, "old", "new").splitlines()
    assert table[0] == "| dataset | queries | new - old |"
    assert table[2] == "| toy | 3 | +66.7 [+0.0, +100.0] |"
    certain = compare({"toy": scored([0, 0])}, {"toy": scored([1, 1])})
    assert comparison_table(certain, "old", "new").splitlines()[2] == "| toy | 2 | **+100.0 [+100.0, +100.0]** |"


def test_modality_gap_is_the_distance_of_the_means() -> None:
    queries, candidates = np.array([[1.0, 0], [0, 1.0]]), np.array([[-1.0, 0], [0, 1.0]])
    assert modality_gap(queries, candidates) == pytest.approx(1.0)
    assert modality_gap(queries, queries[::-1]) == 0.0


def test_target_modality() -> None:
    """Three of four queries find a text, as they should, and one an image."""
    assert finds_target_modality(scored([1, 1, 0, 1])).tolist() == [1, 1, 0, 1]


def test_sensitivity_to_instructions() -> None:
    """With instructions one more of four queries is right; the first candidate of three changes."""
    asked = dataset(4)
    gained, changed = instruction_sensitivity(
        scored([1, 1, 0, 1], of=asked), scored([0, 0, 1, 1], of=without_instructions(asked))
    )
    assert gained.mean == pytest.approx(1 / 4)
    assert changed == 3 / 4
