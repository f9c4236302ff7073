from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from pipelines.errors import UserError
from rzen.evaluation.metrics import metrics_by_query
from rzen.evaluation.ranking import Kinds, rank_candidates, top_k
from rzen.evaluation.tasks import TASKS, Metric, chance, score_queries
from rzen.evaluation.vectors import NONE, FloatArray, IntArray, check_block_by_block
from tests.ranks import rank_of_gold, relevant_of


def unit(vectors: object) -> FloatArray:
    array = np.asarray(vectors, dtype=np.float32)
    return array / np.linalg.norm(array, axis=-1, keepdims=True)


def at(*degrees: float) -> FloatArray:
    return np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], axis=-1).astype(np.float32)


def random_unit(rows: int, width: int = 8, seed: int = 0) -> FloatArray:
    return unit(np.random.default_rng(seed).normal(size=(rows, width)))


def mean_of(metric: Metric, rank_of_query: IntArray) -> float:
    """The mean score of queries with one relevant target each."""
    return float(score_queries(metric, relevant_of(np.arange(len(rank_of_query))[:, None]), rank_of_query).mean())


def test_hand_written_ranks() -> None:
    """Targets at 0, 30, 60, 90 degrees; queries at 5, 50, 100 degrees, whose relevant targets are rows 1, 1, 0."""
    ranks = rank_of_gold(at(5, 50, 100), at(0, 30, 60, 90), [1, 1, 0])
    assert ranks.tolist() == [2, 2, 4]
    assert mean_of("hit@1", ranks) == 0.0
    at_2 = metrics_by_query(relevant_of(np.array([[1], [1], [0]])), ranks, (2,))
    assert at_2["hit@2"].mean() == pytest.approx(2 / 3)
    assert mean_of("mrr", ranks) == pytest.approx((1 / 2 + 1 / 2 + 1 / 4) / 3)
    assert at_2["ndcg_linear@2"].mean() == pytest.approx(2 / 3 / math.log2(3))
    assert mean_of("ndcg@5", ranks) == pytest.approx((2 / math.log2(3) + 1 / math.log2(5)) / 3)


@pytest.mark.parametrize("block_rows", [1, 3, 7, 1024])
def test_blocks_do_not_change_ranks(block_rows: int) -> None:
    queries, targets = random_unit(10), random_unit(23, seed=1)
    gold = np.arange(10) * 2
    scores = queries.astype(np.float64) @ targets.T.astype(np.float64)
    expected = [1 + sum(scores[q, n] > scores[q, g] for n in range(23)) for q, g in enumerate(gold)]
    assert rank_of_gold(queries, targets, gold, block_rows=block_rows).tolist() == expected


@pytest.mark.parametrize("block_rows", [1, 3, 1024])
def test_kinds_leave_out_other_candidates(block_rows: int) -> None:
    """Ranks and first candidates are those of a pool without the other kinds."""
    queries, targets = random_unit(6), random_unit(23, seed=1)
    kind = np.arange(23) % 3
    asked = np.array([[True, False, False], [False, True, True], [True, True, True]] * 2)
    gold = np.array([0, 1, 2, 3, 5, 7])
    relevant = relevant_of(gold[:, None])
    kinds = Kinds(kind, asked)
    found = rank_candidates(
        queries, targets, relevant, kinds=kinds, num_top=23, device="cpu", block_rows=block_rows, query_rows=4
    )
    for query in range(6):
        left = np.flatnonzero(asked[query][kind])
        own = relevant_of(np.array([[np.flatnonzero(left == gold[query])[0]]]))
        alone = rank_candidates(queries[[query]], targets[left], own, num_top=23, device="cpu")
        assert found.rank[query] == alone.rank[0]
        assert found.rows[query, : len(left)].tolist() == left[alone.rows[0]].tolist()
        assert (found.rows[query, len(left) :] == NONE).all()


def test_ties_go_against_the_relevant_target_wherever_it_stands() -> None:
    targets = at(0, 0, 0, 90)
    assert rank_of_gold(at(0, 0, 0, 90), targets, [0, 1, 2, 3]).tolist() == [3, 3, 3, 1]


def test_rounding_does_not_break_ties() -> None:
    """Equal vectors whose products may differ in the last bit, because they fall into other blocks."""
    targets = np.repeat(random_unit(1, width=1536), 37, axis=0)
    targets[5:] *= np.float32(1 + 1e-7)
    assert rank_of_gold(random_unit(4, width=1536, seed=2), targets, [0, 9, 20, 36], block_rows=5).tolist() == [37] * 4


def test_collapsed_vectors_score_nothing_and_are_told() -> None:
    rng = np.random.default_rng(0)
    collapsed = unit(np.ones((50, 16)) + 1e-4 * rng.normal(size=(50, 16)))
    untrained = unit(np.ones((50, 16)) + 0.1 * rng.normal(size=(50, 16)))
    identical = np.repeat(collapsed[:1], 50, axis=0)
    found = [
        check_block_by_block(vectors, "targets", block_rows=7, collapse_is_error=False)
        for vectors in (collapsed, identical, untrained, identical[:1])
    ]
    assert found == [True, True, False, False]
    assert mean_of("hit@1", rank_of_gold(identical, identical, np.arange(50))) == 0.0
    with pytest.raises(UserError, match="targets: all 50 are one vector"):
        check_block_by_block(collapsed, "targets")


def test_untrained_vectors_score_at_chance() -> None:
    ranks = rank_of_gold(random_unit(400), random_unit(20, seed=1), np.arange(400) % 20)
    assert mean_of("hit@1", ranks) == pytest.approx(chance("hit@1", 20), abs=0.04)
    assert mean_of("ndcg@5", ranks) == pytest.approx(chance("ndcg@5", 20), abs=0.04)


def test_several_relevant_targets_with_grades() -> None:
    """One query ranks rows 0, 1, 2, 3 in order. Relevant: row 1 (grade 1) and row 2 (grade 3); then row 0 alone."""
    gold = np.array([[1, 2], [0, NONE]])
    grades = np.array([[1.0, 3.0], [2.0, 0.0]])
    relevant = relevant_of(gold, grades)
    ranks = rank_candidates(at(0, 0), at(0, 30, 60, 90), relevant, device="cpu").rank
    assert ranks.tolist() == [2, 3, 1]
    first = (1 / math.log2(3) + 3 / math.log2(4)) / (3 / math.log2(2) + 1 / math.log2(3))
    found = metrics_by_query(relevant, ranks, (1, 2, 5))
    assert found["ndcg_linear@5"].tolist() == pytest.approx([first, 1.0])
    assert found["ndcg_linear@2"][0] == pytest.approx((1 / math.log2(3)) / (3 + 1 / math.log2(3)))
    binary = (1 / math.log2(3) + 1 / math.log2(4)) / (1 + 1 / math.log2(3))
    assert metrics_by_query(relevant_of(gold), ranks)["ndcg_linear@5"].tolist() == pytest.approx([binary, 1.0])
    assert found["hit@1"].mean() == 0.5
    assert found["mrr@5"].mean() == 0.75


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_vectors_that_are_not_finite_are_refused(bad: float) -> None:
    targets = random_unit(4)
    targets[2, 1] = bad
    with pytest.raises(UserError, match=r"targets\[2\]: is not finite \(1 of 4\)"):
        check_block_by_block(targets, "targets")


def test_vectors_that_are_not_unit_are_refused() -> None:
    with pytest.raises(UserError, match=r"queries\[0\]: is not unit \(4 of 4\)"):
        check_block_by_block(2 * random_unit(4), "queries")


def test_top_k_in_order_of_score_then_row() -> None:
    rows, scores = top_k(at(0)[0], at(90, 0, 60, 0), 3)
    assert rows.tolist() == [1, 3, 2]
    assert scores.tolist() == pytest.approx([1.0, 1.0, 0.5])
    assert top_k(at(0, 90), at(90, 0, 60, 0), 9)[0].tolist() == [[1, 3, 2, 0], [0, 2, 1, 3]]


def test_chance_is_the_mean_over_all_ranks() -> None:
    assert chance("hit@1", 400) == 0.0025
    assert chance("hit@5", 400) == 0.0125
    assert chance("ndcg@5", 2) == pytest.approx((1 + 1 / math.log2(3)) / 2)
    assert chance("mrr", 4) == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)


@pytest.mark.parametrize("num_relevant", [1, 2, 3, 5])
@pytest.mark.parametrize("metric", ["hit@1", "hit@5", "ndcg@5", "mrr"])
def test_chance_of_several_relevant_targets_is_the_mean_over_all_orders(metric: Metric, num_relevant: int) -> None:
    orders = np.array(list(combinations(range(1, 8), num_relevant)))  # ranks of the relevant ones among seven
    relevant = relevant_of(np.tile(np.arange(num_relevant), (len(orders), 1)))
    expected = score_queries(metric, relevant, orders.reshape(-1)).mean()
    assert chance(metric, 7, num_relevant) == pytest.approx(expected)


def test_a_query_with_several_relevant_targets_is_scored_by_all() -> None:
    """Ranks 2 and 3, then 1 and 9."""
    relevant = relevant_of(np.array([[0, 1], [0, 1]]))
    ranks = np.array([2, 3, 1, 9])
    assert score_queries("mrr", relevant, ranks).tolist() == [1 / 2, 1.0]
    assert score_queries("hit@1", relevant, ranks).tolist() == [0.0, 1.0]
    ideal = 1 + 1 / math.log2(3)
    first = (1 / math.log2(3) + 1 / math.log2(4)) / ideal
    assert score_queries("ndcg@5", relevant, ranks).tolist() == pytest.approx([first, 1 / ideal])


def test_table_of_tasks() -> None:
    assert {name: (task.query, task.target, task.metrics[0]) for name, task in TASKS.items()} == {
        "text_image": ("text", "image", "hit@1"),
        "text_page": ("text", "page", "ndcg@5"),
        "text_video": ("text", "video", "hit@1"),
        "image_text_image": ("image+text", "image", "hit@1"),
        "text_text": ("text", "text", "hit@1"),
        "image_class": ("image", "class", "hit@1"),
    }
