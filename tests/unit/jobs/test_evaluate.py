"""Whose targets are candidates: of the whole task, or of the query's own source."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jobs.evaluation.datasets import split_bundle
from jobs.evaluation.evaluate import _split_scores
from jobs.evaluation.report import SuiteResults
from jobs.evaluation.specs import EvaluateSpec
from jobs.spec.model import ModelRef
from pipelines.benchmarks.split import split_dataset
from pipelines.config import DataConfig
from pipelines.errors import UserError
from pipelines.feed.reader import Reader
from pipelines.items.listing import ListedShard
from pipelines.items.types import Item
from pipelines.samples import Input, Sample
from pipelines.storage.location import open_store
from rzen.evaluation.dataset_scores import score_dataset
from rzen.evaluation.results import Result
from rzen.evaluation.vectors import Vectors
from tests.data import publish

SPEC = EvaluateSpec(kind="evaluate", models={"m": ModelRef(base="m")}, data=DataConfig(root="d"), out="o")
# Five queries in two sources. The last but one lies nearest to a class of the other source, the last to another class.
EAST, NORTH, WEST = (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0)
QUERIES = np.array([EAST, NORTH, EAST, WEST, WEST], np.float32)
TARGETS = np.array([EAST, NORTH, EAST, NORTH, EAST], np.float32)
IDS = ["red", "blue", "red", "star", "ring"]
POOLS = ["colours", "colours", "colours", "shapes", "shapes"]


def score(
    task: str,
    targets: np.ndarray,
    ids: list[str],
    sources: list[str],
    *,
    pool_is_source: bool,
    queries: np.ndarray = QUERIES,
    query_ids: list[str] | None = None,
    instructions: list[str] | None = None,
) -> tuple[list[Result], list[float]]:
    """The rows of a split with these samples, and the first metric of each query."""
    shards = {source: ListedShard("held_out", source, task, 0, 9, "") for source in sources}
    samples = []
    for index, (source, id) in enumerate(zip(sources, ids, strict=True)):
        query_id = query_ids[index] if query_ids else f"query {index}"
        sample = Sample(str(index), source, task, Input("q"), Input("t"), target_sha256=id, query_sha256=query_id)
        instruction = instructions[index] if instructions else ""
        samples.append((shards[source], index, replace(sample, instruction=instruction)))
    dataset = split_dataset(task, "held_out", samples, pool_is_source=pool_is_source, metric="hit@1", modality="image")
    scores = score_dataset(
        dataset,
        Vectors.of(
            (query.item.id for query in dataset.queries), queries[rows_of(query.item for query in dataset.queries)]
        ),
        Vectors.of((item.id for item in dataset.candidates), targets[rows_of(dataset.candidates)]),
        collapse_is_error=False,
    )
    assert SPEC.data is not None
    found = _split_scores(SPEC, SPEC.data, "m", SuiteResults({task: scores}))
    return found.rows, found.by_query[task]


def rows_of(items: Iterable[Item]) -> list[int]:
    return [item.row.index for item in items if item.row is not None]


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_equal_queries_are_one_with_all_their_targets() -> None:
    """One caption of two pictures, and four of one picture each: a perfect model has all of them right."""
    targets = unit(np.random.default_rng(0).normal(size=(6, 8)))
    queries = targets.copy()
    queries[:2] = unit(targets[:1] + targets[1:2])
    captions = ["both", "both", "c", "d", "e", "f"]
    rows, by_query = score(
        "text_image", targets, list("abcdef"), ["p"] * 6, pool_is_source=False, queries=queries, query_ids=captions
    )
    assert [(row.metric, row.value) for row in rows] == [("hit@1", 1.0), ("ndcg@5", pytest.approx(1.0))]
    assert by_query == [1.0] * 5
    assert (rows[0].num_queries, rows[0].num_candidates) == (5, 6)
    assert rows[0].chance == pytest.approx((4 * 1 / 6 + 2 / 6) / 5)


def test_five_captions_of_a_picture_are_five_right_answers() -> None:
    targets = unit(np.random.default_rng(0).normal(size=(10, 64)))
    queries = np.repeat(unit(targets.reshape(2, 5, 64).sum(axis=1)), 5, axis=0)
    pictures = ["one"] * 5 + ["two"] * 5
    (row, *_), _ = score(
        "text_image", targets, list("abcdefghij"), ["p"] * 10, pool_is_source=False, queries=queries, query_ids=pictures
    )
    assert (row.value, row.num_queries) == (1.0, 2)


def test_a_query_with_another_instruction_is_another_query() -> None:
    targets = unit(np.random.default_rng(0).normal(size=(2, 8)))
    given = {"pool_is_source": False, "queries": targets, "query_ids": ["same", "same"]}
    (row, *_), _ = score("text_image", targets, ["a", "b"], ["p"] * 2, instructions=["What?", "Where?"], **given)
    assert (row.value, row.num_queries) == (1.0, 2)
    (row, *_), _ = score("text_image", targets, ["a", "b"], ["p"] * 2, instructions=["What?", "What?"], **given)
    assert row.num_queries == 1


def test_equal_queries_of_two_sources_with_classes_of_their_own_are_two() -> None:
    (row,), _ = score("image_class", TARGETS, IDS, POOLS, pool_is_source=True, query_ids=["a", "b", "a", "a", "b"])
    assert (row.num_queries, row.num_candidates) == (4, 2)


def test_a_candidate_that_shows_the_query_is_not_ranked() -> None:
    """Duplicate questions: b answers a, and c answers b. Query b would find itself first."""
    near = unit(np.array([(1.0, 0.0), (0.8, 0.6)]))
    targets, queries = np.stack([near[0], near[1]]), np.stack([near[0], near[0]])
    (row, *_), by_query = score(
        "text_image", targets, ["b", "c"], ["p"] * 2, pool_is_source=False, queries=queries, query_ids=["a", "b"]
    )
    assert by_query == [1.0, 1.0]
    assert row.chance == pytest.approx((1 / 2 + 1) / 2)


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


def test_tasks_of_any_name_are_scored_after_those_of_the_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`tasks: null` leaves none out: a task that no table has is retrieval among all its targets."""
    data = DataConfig(root=str(tmp_path / "data"), split="held_out")
    sources = {"charts": ("chart_qa", 9), "more": ("chart_qa", 3), "photos": ("text_image", 5)}
    publish(open_store(data.root), sources, split="held_out")
    spec = SPEC.model_copy(update={"data": data})
    bundle = split_bundle(spec, Reader(data), open_store(str(tmp_path / "listings")))
    assert [row.name for row, _ in bundle.entries] == ["text_image", "chart_qa"]
    charts = bundle.entries[1][1]()
    assert (len(charts.queries), len(charts.candidates)) == (12, 9)  # pictures of equal numbers are equal
    assert (charts.row.metric, charts.row.modality, charts.row.pool) == ("hit@1", "mixed", "global")
    assert "scored as retrieval of any input by any input: chart_qa" in capsys.readouterr().out

    only = spec.model_copy(update={"tasks": ["chart_qa"]})
    bundle = split_bundle(only, Reader(data), open_store(str(tmp_path / "listings")))
    assert [row.name for row, _ in bundle.entries] == ["chart_qa"]
    with pytest.raises(UserError, match="has no samples of task 'text_page'; its tasks: text_image, chart_qa"):
        split_bundle(spec.model_copy(update={"tasks": ["text_page"]}), Reader(data), open_store(str(tmp_path)))
