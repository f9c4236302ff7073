"""Whose targets are candidates: of the whole task, or of the query's own source."""

import numpy as np
import pytest

from jobs.evaluation.evaluate import _score
from jobs.evaluation.specs import EvaluateSpec
from jobs.spec.model import ModelRef
from pipelines.config import DataConfig

SPEC = EvaluateSpec(kind="evaluate", models={"m": ModelRef(base="m")}, data=DataConfig(root="d"), out="o")
# Five queries in two sources. The last but one lies nearest to a class of the other source, the last to another class.
EAST, NORTH, WEST = (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0)
QUERIES = np.array([EAST, NORTH, EAST, WEST, WEST], np.float32)
TARGETS = np.array([EAST, NORTH, EAST, NORTH, EAST], np.float32)
IDS = ["red", "blue", "red", "star", "ring"]
POOLS = ["colours", "colours", "colours", "shapes", "shapes"]


def test_classes_of_a_source_are_the_candidates_of_its_queries() -> None:
    """Of two colours every query finds its own; of two shapes the fourth query does and the fifth does not."""
    (row,), by_query = _score(SPEC, "m", "image_class", QUERIES, TARGETS, IDS, POOLS)
    assert np.mean(by_query) == pytest.approx(row.value)
    assert (row.metric, row.num_queries, row.num_candidates) == ("hit@1", 5, 2)
    assert row.value == pytest.approx(4 / 5)
    assert row.chance == pytest.approx(1 / 2)


def test_one_pool_holds_the_targets_of_all_sources() -> None:
    """Red and ring, blue and star have one vector: nobody's target is first but for the ties, which go against it."""
    (first, second), by_query = _score(SPEC, "m", "text_image", QUERIES, TARGETS, IDS, ["text_image"] * 5)
    assert np.mean(by_query) == pytest.approx(first.value)
    assert (first.metric, first.num_candidates, first.value, first.chance) == ("hit@1", 4, 0.0, 0.25)
    assert second.metric == "ndcg@5"


def test_chance_counts_each_pool_by_its_queries() -> None:
    ids = ["red", "blue", "red", "star", "star"]
    targets = np.array([EAST, NORTH, EAST, NORTH, NORTH], np.float32)
    (row,), _ = _score(SPEC, "m", "image_class", QUERIES, targets, ids, POOLS)
    assert row.chance == pytest.approx(3 / 5 * 1 / 2 + 2 / 5 * 1)
