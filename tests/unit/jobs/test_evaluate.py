"""Whose targets are candidates: of the whole task, or of the query's own source."""

import numpy as np
import pytest

from jobs.evaluation.evaluate import _split_scores
from jobs.evaluation.specs import EvaluateSpec
from jobs.spec.model import ModelRef
from pipelines.benchmarks.split import split_dataset
from pipelines.config import DataConfig
from pipelines.items.listing import ListedShard
from pipelines.samples import Input, Sample
from rzen.evaluation.dataset_scores import score_dataset
from rzen.evaluation.results import Result
from rzen.evaluation.vectors import Vectors

SPEC = EvaluateSpec(kind="evaluate", models={"m": ModelRef(base="m")}, data=DataConfig(root="d"), out="o")
# Five queries in two sources. The last but one lies nearest to a class of the other source, the last to another class.
EAST, NORTH, WEST = (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0)
QUERIES = np.array([EAST, NORTH, EAST, WEST, WEST], np.float32)
TARGETS = np.array([EAST, NORTH, EAST, NORTH, EAST], np.float32)
IDS = ["red", "blue", "red", "star", "ring"]
POOLS = ["colours", "colours", "colours", "shapes", "shapes"]


def score(
    task: str, targets: np.ndarray, ids: list[str], sources: list[str], *, pool_is_source: bool
) -> tuple[list[Result], list[float]]:
    """The rows of a split with these samples, and the first metric of each query."""
    shards = {source: ListedShard("held_out", source, task, 0, 9, f"{source} content", "") for source in sources}
    samples = [
        (shards[source], index, Sample(str(index), source, task, Input("q"), Input("t"), target_sha256=id))
        for index, (source, id) in enumerate(zip(sources, ids, strict=True))
    ]
    dataset = split_dataset(task, "held_out", samples, pool_is_source=pool_is_source, metric="hit@1", modality="image")
    rows = {item.row.index for item in dataset.candidates if item.row is not None}
    scores = score_dataset(
        dataset,
        Vectors.of((query.item.id for query in dataset.queries), QUERIES),
        Vectors.of((item.id for item in dataset.candidates), targets[sorted(rows)]),
        collapse_is_error=False,
    )
    assert SPEC.data is not None
    found = _split_scores(SPEC, SPEC.data, "m", {task: scores})
    return found.rows, found.by_query[task]


def test_classes_of_a_source_are_the_candidates_of_its_queries() -> None:
    """Of two colours every query finds its own; of two shapes the fourth query does and the fifth does not."""
    (row,), by_query = score("image_class", TARGETS, IDS, POOLS, pool_is_source=True)
    assert np.mean(by_query) == pytest.approx(row.value)
    assert (row.metric, row.num_queries, row.num_candidates) == ("hit@1", 5, 2)
    assert row.value == pytest.approx(4 / 5)
    assert row.chance == pytest.approx(1 / 2)


def test_one_pool_holds_the_targets_of_all_sources() -> None:
    """Red and ring, blue and star have one vector: nobody's target is first but for the ties, which go against it."""
    (first, second), by_query = score("text_image", TARGETS, IDS, POOLS, pool_is_source=False)
    assert np.mean(by_query) == pytest.approx(first.value)
    assert (first.metric, first.num_candidates, first.value, first.chance) == ("hit@1", 4, 0.0, 0.25)
    assert second.metric == "ndcg@5"


def test_chance_counts_each_pool_by_its_queries() -> None:
    ids = ["red", "blue", "red", "star", "star"]
    targets = np.array([EAST, NORTH, EAST, NORTH, NORTH], np.float32)
    (row,), _ = score("image_class", targets, ids, POOLS, pool_is_source=True)
    assert row.chance == pytest.approx(3 / 5 * 1 / 2 + 2 / 5 * 1)
