"""From vectors by id to ranks and files: blocks, ties, and the ways in which vectors can be wrong."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipelines.benchmarks.types import Dataset, Query, Row
from pipelines.errors import UserError
from pipelines.items.types import Item, content_id
from pipelines.samples import Input
from rzen.evaluation.dataset_scores import DatasetScores, score_dataset
from rzen.evaluation.files import write_files
from rzen.evaluation.metrics import METRIC_NAMES, Relevant, metrics_by_query
from rzen.evaluation.ranking import rank_candidates, rank_pools
from rzen.evaluation.vectors import NONE, TIE, FloatArray, Vectors, check_block_by_block

EAST, NORTH, WEST = (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0)
ROW = Row("toy", "custom", "mixed", "toy", "global", "hit@1", None, "custom")


def unit(vectors: object) -> FloatArray:
    array = np.asarray(vectors, dtype=np.float32)
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


def random_unit(rows: int, width: int = 8, seed: int = 0) -> FloatArray:
    return unit(np.random.default_rng(seed).normal(size=(rows, width)))


def pairs(relevant: Sequence[dict[int, float]]) -> Relevant:
    """One dictionary of rows and grades for each query."""
    flat = [(query, row, grade) for query, mine in enumerate(relevant) for row, grade in mine.items()]
    query, row, grade = (np.array(column) for column in zip(*flat, strict=True))
    return Relevant(query, row, grade.astype(np.float64), len(relevant))


def item(name: str) -> Item:
    return Item(f"{name:0>32}", name, Input(name), content_id(name))


def toy(
    relevant: Sequence[dict[str, float]], candidates: Sequence[str], pools: Sequence[Sequence[str]] = ()
) -> Dataset:
    """Queries q0, q1, ... with grades by name, and pools by name if there are any."""
    queries = [
        Query(
            item(f"q{number}"),
            {item(name).id: grade for name, grade in mine.items()},
            tuple(item(name).id for name in pools[number]) if pools else None,
        )
        for number, mine in enumerate(relevant)
    ]
    return Dataset(replace(ROW, pool="local" if pools else "global"), queries, list(map(item, candidates)), "toy")


def vectors(names: Sequence[str], rows: object) -> Vectors:
    return Vectors.of([item(name).id for name in names], np.asarray(rows, dtype=np.float32))


def score(dataset: Dataset, queries: object, candidates: object, **options: int) -> DatasetScores:
    return score_dataset(
        dataset,
        vectors([query.item.name for query in dataset.queries], queries),
        vectors([one.name for one in dataset.candidates], candidates),
        **options,
    )


def test_metrics_of_one_query_by_hand() -> None:
    """Relevant candidates of grades 3, 1, 2 at ranks 2, 4, 7."""
    found = metrics_by_query(pairs([{0: 3.0, 1: 1.0, 2: 2.0}]), np.array([2, 4, 7]))
    log = np.log2
    assert {name: float(values[0]) for name, values in found.items()} == pytest.approx(
        {
            **{"hit@1": 0, "hit@5": 1, "hit@10": 1, "mrr@1": 0, "mrr@5": 1 / 2, "mrr@10": 1 / 2},
            **{"precision@1": 0, "precision@5": 2 / 5, "precision@10": 3 / 10},
            **{"recall@1": 0, "recall@5": 2 / 3, "recall@10": 1},
            **{"f1@1": 0, "f1@5": 1 / 2, "f1@10": 6 / 13},
            **{"map@1": 0, "map@5": (1 / 2 + 2 / 4) / 3, "map@10": (1 / 2 + 2 / 4 + 3 / 7) / 3},
            "ndcg_linear@1": 0,
            "ndcg_linear@5": (3 / log(3) + 1 / log(5)) / (3 + 2 / log(3) + 1 / 2),
            "ndcg_linear@10": (3 / log(3) + 1 / log(5) + 2 / 3) / (3 + 2 / log(3) + 1 / 2),
            "ndcg_exponential@1": 0,
            "ndcg_exponential@5": (7 / log(3) + 1 / log(5)) / (7 + 3 / log(3) + 1 / 2),
            "ndcg_exponential@10": (7 / log(3) + 1 / log(5) + 3 / 3) / (7 + 3 / log(3) + 1 / 2),
        }
    )


def test_ideal_order_ends_at_the_cut() -> None:
    """Two relevant candidates on the first two places: at 1 the better grade is the ideal, and the worse was found."""
    found = metrics_by_query(pairs([{0: 1.0, 1: 2.0}]), np.array([1, 2]))
    assert found["ndcg_linear@1"][0] == pytest.approx(1 / 2)
    assert found["ndcg_exponential@1"][0] == pytest.approx(1 / 3)
    assert found["map@1"][0] == 1.0


def test_queries_without_anything_relevant_score_nothing() -> None:
    found = metrics_by_query(Relevant(np.array([1]), np.array([0]), np.array([1.0]), 3), np.array([1]))
    assert all(values.tolist() == [0.0, values[1], 0.0] and values[1] > 0 for values in found.values())


@pytest.mark.parametrize(("block_rows", "query_rows"), [(1, 1), (3, 7), (7, 3), (1000, 1000)])
def test_ranks_and_first_candidates_do_not_depend_on_blocks(block_rows: int, query_rows: int) -> None:
    """Against a sort of all scores in fp64."""
    queries, candidates = random_unit(20), random_unit(53, seed=1)
    scores = queries.astype(np.float64) @ candidates.T.astype(np.float64)
    order = np.argsort(-scores, axis=1)
    relevant = pairs([{5: 1.0, 17: 2.0, 40: 1.0} if number % 3 else {number: 1.0} for number in range(20)])
    found = rank_candidates(
        queries, candidates, relevant, num_top=9, device="cpu", block_rows=block_rows, query_rows=query_rows
    )
    places = np.argsort(order, axis=1) + 1
    assert found.rank.tolist() == places[relevant.query, relevant.row].tolist()
    assert found.rows.tolist() == order[:, :9].tolist()
    np.testing.assert_allclose(found.scores, np.take_along_axis(scores, order[:, :9], axis=1), atol=1e-6)


@pytest.mark.parametrize("block_rows", [1, 2, 100])
def test_ties_go_against_the_relevant_candidate_though_it_is_listed_first(block_rows: int) -> None:
    """Row 0 is relevant and ties with rows 1 and 2; the list of what was found shows it third."""
    candidates = np.array([EAST, EAST, EAST, WEST])
    found = rank_candidates(np.array([EAST]), candidates, pairs([{0: 1.0}]), num_top=4, block_rows=block_rows)
    assert (found.rank.tolist(), found.tied.tolist()) == ([3], [2])
    assert found.rows.tolist() == [[1, 2, 0, 3]]


@pytest.mark.parametrize(("block_rows", "query_rows"), [(1, 2), (5, 7), (1000, 1000)])
def test_ties_are_counted_among_candidates_that_are_not_relevant(block_rows: int, query_rows: int) -> None:
    """Against a count over all scores, which come in four steps; a relevant candidate ties with no other relevant one.

    Scores that are `TIE` and more apart are no tie: every query has a candidate just above and just below the first.
    """
    rng = np.random.default_rng(3)
    scores = rng.integers(1, 5, size=(20, 31)) / 32
    scores[:, 1:3] = scores[:, :1] + 3 * TIE * np.array([1, -1])
    grades = rng.integers(1, 3, size=scores.shape) * (rng.random(scores.shape) < 0.2)
    grades[:, 0], grades[:, 1:3] = 1, 0
    query, row = np.nonzero(grades)
    relevant = Relevant(query, row, grades[query, row].astype(float), len(scores))
    queries = np.concatenate([scores, np.sqrt(1 - np.square(scores).sum(axis=1, keepdims=True))], axis=1)
    candidates = np.eye(31, 32, dtype=np.float64)
    inside = (rng.random(scores.shape) < 0.5) | (grades > 0)
    for pools in (np.ones_like(inside), inside):
        others = pools & (grades == 0)
        expected = [(others[q] & (abs(scores[q] - scores[q, n]) <= TIE)).sum() for q, n in zip(query, row, strict=True)]
        if pools.all():
            found = rank_candidates(queries, candidates, relevant, block_rows=block_rows, query_rows=query_rows)
        else:
            found = rank_pools(queries, candidates, relevant, [np.flatnonzero(mine) for mine in pools])
        assert found.tied.tolist() == expected
        assert max(expected) > 3


def test_of_tied_relevant_candidates_the_worse_grade_comes_first() -> None:
    candidates = np.array([EAST, EAST, EAST, WEST])
    found = rank_candidates(np.array([EAST]), candidates, pairs([{0: 2.0, 1: 1.0, 3: 3.0}]), num_top=4)
    assert found.rank.tolist() == [3, 2, 4]
    assert found.rows.tolist() == [[2, 1, 0, 3]]


def test_rounding_does_not_break_ties() -> None:
    candidates = np.repeat(random_unit(1, 1536), 37, axis=0)
    candidates[5:] *= np.float32(1 + 1e-7)
    relevant = pairs([{row: 1.0} for row in (0, 9, 36)])
    assert rank_candidates(random_unit(3, 1536, 2), candidates, relevant, block_rows=5).rank.tolist() == [37] * 3


def test_pools_of_its_own_hide_what_others_search() -> None:
    """The best candidate of all is in the pool of the second query alone."""
    candidates = unit([(1, 0), (1, 1), (0, 1), (1, 0.1)])
    pools = [np.array([2, 1]), np.array([0, 1, 3])]
    found = rank_pools(np.array([EAST, EAST]), candidates, pairs([{1: 1.0}, {1: 1.0}]), pools, num_top=3)
    assert found.rank.tolist() == [1, 3]
    assert found.rows.tolist() == [[1, 2, NONE], [0, 3, 1]]
    assert found.scores[0, 2] == 0


def test_queries_of_equal_pools_in_any_order_are_scored_as_one_by_one() -> None:
    queries, candidates = random_unit(6), random_unit(12, seed=1)
    relevant = pairs([{number: 1.0, 11: 2.0} for number in range(6)])
    pools = [np.roll(np.arange(12), number) for number in range(6)]
    together, alone = rank_pools(queries, candidates, relevant, pools), rank_candidates(queries, candidates, relevant)
    assert together.rank.tolist() == alone.rank.tolist()
    assert together.rows.tolist() == alone.rows.tolist()


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that is made meanwhile."""

    num_bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        sizes = [part.untyped_storage().nbytes() for part in tree_leaves(made) if isinstance(part, torch.Tensor)]
        self.num_bytes = max([self.num_bytes, *sizes])
        return made


def test_memory_does_not_grow_with_the_candidates(tmp_path: Path) -> None:
    """200,000 memory-mapped candidates in fp16 and 64 queries: queries x candidates would be 51 MB, the candidates in
    fp32 51 MB too. Held are blocks of 1000, numpy's and torch's memory both counted.
    """
    path = tmp_path / "candidates.npy"
    mapped = np.lib.format.open_memmap(path, "w+", np.float16, (200_000, 64))
    for start in range(0, len(mapped), 10_000):
        mapped[start : start + 10_000] = random_unit(10_000, 64, seed=start)
    mapped.flush()
    candidates = np.load(path, mmap_mode="r")
    queries = unit(candidates[7:71].astype(np.float32))
    relevant = pairs([{7 + number: 1.0} for number in range(64)])
    with Largest() as seen:
        found = rank_candidates(queries, candidates, relevant, num_top=5, device="cpu", block_rows=1000)
    tracemalloc.start()
    check_block_by_block(candidates, "candidates", block_rows=1000)
    rank_candidates(queries, candidates, relevant, num_top=5, device="cpu", block_rows=1000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.rank.tolist() == [1] * 64
    assert peak < 8e6
    assert seen.num_bytes <= 64 * 1000 * 8


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_vectors_of_any_float_type_are_read_from_a_file(kind: type, tmp_path: Path) -> None:
    vectors_ND = random_unit(30)
    np.save(tmp_path / "candidates.npy", vectors_ND.astype(kind))
    candidates = np.load(tmp_path / "candidates.npy", mmap_mode="r")
    relevant = pairs([{number: 1.0} for number in range(10)])
    assert rank_candidates(vectors_ND[:10], candidates, relevant, block_rows=7).rank.tolist() == [1] * 10


def test_a_dataset_is_scored_whatever_the_order_of_its_vectors() -> None:
    dataset = toy([{"a": 1.0}, {"b": 2.0, "c": 1.0}], ["a", "b", "c"])
    queries, candidates = vectors(["q1", "q0"], [NORTH, EAST]), vectors(["c", "a", "b"], [WEST, EAST, NORTH])
    found = score_dataset(dataset, queries, candidates)
    assert (found.value, found.metrics["recall@1"], found.num_candidates) == (1.0, 3 / 4, 3)
    assert {found.names[int(row)] for row in found.ranked.rows[:, 0]} == {"a", "b"}
    assert tuple(found.metrics) == METRIC_NAMES


def test_shards_are_joined_and_padding_is_refused() -> None:
    """Three queries on two ranks: the second rank was padded with a query of the first."""
    dataset = toy([{"a": 1.0}, {"b": 1.0}, {"a": 1.0}], ["a", "b"])
    candidates = vectors(["a", "b"], [EAST, NORTH])
    ids = [item(name).id for name in ("q0", "q1", "q2", "q0")]
    rows = np.array([EAST, NORTH, EAST, EAST], np.float32)
    good = Vectors.join([(ids[:2], rows[:2]), (ids[2:3], rows[2:3])])
    assert score_dataset(dataset, good, candidates).value == 1.0
    with pytest.raises(UserError, match=r"q0: came twice \(1 such ids\)"):
        score_dataset(dataset, Vectors.join([(ids[:2], rows[:2]), (ids[2:], rows[2:])]), candidates)


def test_ids_that_are_missing_or_strange_are_refused() -> None:
    dataset = toy([{"a": 1.0}, {"b": 1.0}], ["a", "b"])
    queries, candidates = vectors(["q0", "q1"], [EAST, NORTH]), vectors(["a", "b"], [EAST, NORTH])
    with pytest.raises(UserError, match=r"candidates 0+b: did not come back"):
        score_dataset(dataset, queries, vectors(["a"], [EAST]))
    with pytest.raises(UserError, match=r"queries 0+q7: was not asked for"):
        score_dataset(dataset, vectors(["q0", "q1", "q7"], [EAST, NORTH, WEST]), candidates)
    with pytest.raises(UserError, match="2 ids for 1 vectors"):
        score_dataset(dataset, queries, Vectors(candidates.ids, candidates.rows[:1]))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_vectors_that_are_not_finite_stop_the_dataset(bad: float) -> None:
    dataset = toy([{"a": 1.0}, {"b": 1.0}], ["a", "b"])
    with pytest.raises(UserError, match=r"toy candidates\[1\]: is not finite"):
        score(dataset, [EAST, NORTH], [EAST, (0, bad)])
    with pytest.raises(UserError, match=r"toy queries\[0\]: is not unit"):
        score(dataset, [(2, 0), NORTH], [EAST, NORTH])


def test_vectors_of_two_models_stop_the_dataset() -> None:
    dataset = toy([{"a": 1.0}, {"b": 1.0}], ["a", "b"])
    with pytest.raises(UserError, match=r"toy queries: has vectors of width 2, not 3"):
        score(dataset, [EAST, NORTH], [(1, 0, 0), (0, 1, 0)])


@pytest.mark.parametrize("input", ["queries", "candidates"])
def test_collapse_stops_the_dataset(input: str) -> None:
    """A model that tells nothing apart would score 100% where the relevant candidate is listed first."""
    dataset = toy([{"a": 1.0}, {"b": 1.0}], ["a", "b"], [["a", "b"], ["b", "a"]])
    collapsed, good = unit([(1, 1e-3), (1, 0)]), [EAST, NORTH]
    with pytest.raises(UserError, match=f"toy {input}: all 2 are one vector"):
        score(dataset, *((collapsed, good) if input == "queries" else (good, collapsed)))


def test_collapse_is_told_block_by_block() -> None:
    """Blocks that are each one vector, and differ, are no collapse; bad rows are told by their own numbers."""
    different = np.repeat(np.array([EAST, NORTH], np.float32), 4, axis=0)
    check_block_by_block(different, "candidates", block_rows=4)
    different[6] = np.nan
    with pytest.raises(UserError, match=r"candidates\[4:\]\[2\]: is not finite"):
        check_block_by_block(different, "candidates", block_rows=4)


def test_ties_that_decide_are_counted() -> None:
    """The first query's relevant candidate has a twin, the second's has none."""
    dataset = toy([{"a": 1.0}, {"c": 1.0}], ["a", "b", "c"])
    found = score(dataset, [EAST, NORTH], [EAST, EAST, NORTH])
    assert (found.value, found.decided_by_ties) == (1 / 2, 1)


def test_unknown_metric_is_refused() -> None:
    dataset = toy([{"a": 1.0}], ["a", "b"])
    with pytest.raises(UserError, match="'hit@3': is not known; use one of hit@1"):
        score(replace(dataset, row=replace(ROW, metric="hit@3")), [EAST], [EAST, NORTH])


def test_three_files_of_a_dataset(tmp_path: Path) -> None:
    dataset = toy([{"a": 1.0}, {"b": 2.0, "a": 1.0}], ["a", "b", "c"], [["a", "c"], ["a", "b", "c"]])
    found = score(dataset, [EAST, NORTH], [EAST, NORTH, unit((1, 1))], num_top=2)
    write_files(found, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy_info.jsonl", "toy_pred.jsonl", "toy_score.json"]
    info, predictions = (
        [json.loads(line) for line in (tmp_path / f"toy_{name}.jsonl").read_text().splitlines()]
        for name in ("info", "pred")
    )
    assert info[1] == {
        "query_id": item("q1").id,
        "query_name": "q1",
        "label_name": ["b", "a"],
        "rel_scores": [2.0, 1.0],
        "cand_names": ["a", "b", "c"],
    }
    assert predictions[0]["prediction"] == ["a", "c"]
    assert predictions[1] == {
        "query_id": item("q1").id,
        "prediction": ["b", "c"],
        "cosines": [1.0, 0.707107],
        "label": ["b", "a"],
        "rel_scores": [2.0, 1.0],
        "label_ranks": [1, 3],
    }
    scores = json.loads((tmp_path / "toy_score.json").read_text())
    assert scores == {**found.metrics, "num_pred": 2, "num_data": 2}
    assert set(scores) == {*METRIC_NAMES, "num_pred", "num_data"}
