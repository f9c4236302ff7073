"""Ranks after re-ranking against sorting by hand, ties, the best possible order, weights, calibration, and faults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from pipelines.benchmarks.types import Dataset, Query, Row
from pipelines.items.types import Item, content_id
from pipelines.samples import Input
from rzen.evaluation.dataset_scores import DatasetScores, score_dataset
from rzen.evaluation.rerank_tables import rerank_lines, rerank_table, reranked_json
from rzen.evaluation.reranking import (
    WEIGHTS,
    Shortlist,
    WeightChoice,
    calibrate,
    choose_weight,
    compare_stages,
    reranked,
    score_reranked,
)
from rzen.evaluation.vectors import NONE, Vectors

QUERIES, CANDIDATES, WIDTH = 23, 17, 6


def item(name: str) -> Item:
    return Item(content_id(name), name, Input(name), content_id(name))


def scored(seed: int, pools: bool = False, same: Sequence[int] = ()) -> DatasetScores:
    """Random vectors; each query has one to three relevant candidates. Candidates in `same` have one vector."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(QUERIES + CANDIDATES, WIDTH)).astype(np.float32)
    vectors[[QUERIES + one for one in same]] = vectors[QUERIES]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    candidates = [item(f"c{number}") for number in range(CANDIDATES)]
    queries = []
    for number in range(QUERIES):
        right = rng.choice(CANDIDATES, rng.integers(1, 4), replace=False).tolist()
        pool = sorted({*right, *rng.choice(CANDIDATES, 5).tolist()}) if pools else None
        grades = {candidates[one].id: float(rng.integers(1, 3)) for one in right}
        queries.append(
            Query(item(f"q{number}"), grades, None if pool is None else tuple(candidates[p].id for p in pool))
        )
    row = Row("toy", "custom", "mixed", "toy", "local" if pools else "global", "ndcg_linear@5", None, "custom")
    dataset = Dataset(row, queries, candidates, "toy")
    return score_dataset(
        dataset,
        Vectors.of([query.item.id for query in queries], vectors[:QUERIES]),
        Vectors.of([one.id for one in candidates], vectors[QUERIES:]),
    )


def shortlist(scores: DatasetScores, top_k: int, z: np.ndarray | None = None) -> Shortlist:
    """With random z, or with z of each query and candidate, `[Q, N]`."""
    rows = scores.ranked.rows[:, :top_k]
    if z is None:
        z = np.random.default_rng(9).normal(scale=4, size=(QUERIES, CANDIDATES))
    log_odds = np.take_along_axis(z, np.maximum(rows, 0), axis=1).astype(np.float32)
    return Shortlist(scores, np.where(rows == NONE, np.nan, log_odds).astype(np.float32))


def by_hand(some: Shortlist, weight: float | None) -> list[int]:
    """Rank of each relevant candidate: the shortlist sorted by score, what is relevant last among equals."""
    scores, found = some.scores, []
    for query, row, grade in zip(scores.relevant.query, scores.relevant.row, scores.relevant.grade, strict=True):
        grades = dict(
            zip(
                scores.relevant.row[scores.relevant.query == query],
                scores.relevant.grade[scores.relevant.query == query],
                strict=True,
            )
        )
        listed = []
        for place, candidate in enumerate(scores.ranked.rows[query, : some.top_k]):
            if candidate != NONE:
                z = float(some.log_odds[query, place])
                value = z if weight is None else float(scores.ranked.scores[query, place]) + weight * z
                listed.append((-value, grades.get(candidate, 0.0), int(candidate)))
        order = [candidate for _, _, candidate in sorted(listed)]
        old = scores.ranked.rank[(scores.relevant.query == query) & (scores.relevant.row == row)]
        found.append(order.index(row) + 1 if row in order else int(old[0]))
        assert grade == grades[row]
    return found


@pytest.mark.parametrize("pools", [False, True])
@pytest.mark.parametrize("top_k", [1, 7, 17])
@pytest.mark.parametrize("weight", [None, 0.03, 2.0])
def test_ranks_are_those_of_a_sorted_shortlist(pools: bool, top_k: int, weight: float | None) -> None:
    some = shortlist(scored(top_k, pools), top_k)
    assert reranked(some, weight).tolist() == by_hand(some, weight)
    swapped = replace(some, log_odds=-some.log_odds)
    assert top_k == 1 or reranked(swapped, weight).tolist() != by_hand(some, weight)


def test_a_weight_of_zero_leaves_the_order_of_the_embedder() -> None:
    scores = scored(3, same=range(6))
    assert scores.decided_by_ties > 0
    for top_k in (2, 5, 17):
        assert reranked(shortlist(scores, top_k), 0.0).tolist() == scores.ranked.rank.tolist()


def test_ties_go_against_what_is_relevant() -> None:
    some = shortlist(scored(4), 8, np.zeros((QUERIES, CANDIDATES)))
    for query in range(QUERIES):
        mine = some.scores.relevant.query == query
        inside = mine & (some.scores.ranked.rank <= 8)
        count = int(inside.sum())
        assert sorted(reranked(some, None)[inside]) == list(range(8 - count + 1, 9))


def test_no_order_is_better_than_the_ceiling_and_all_keep_the_recall_of_the_shortlist() -> None:
    some = shortlist(scored(5), 6)
    found = score_reranked(some, WeightChoice(0.1, "given"))
    assert list(found.by_query) == ["before", "reranked", "fused", "ceiling"]
    for stage, metrics in found.by_query.items():
        assert metrics["recall@6"].tolist() == found.by_query["before"]["recall@6"].tolist()
        for name, values in metrics.items():
            assert (values <= found.by_query["ceiling"][name] + 1e-12).all(), (stage, name)
    assert (
        found.by_query["ceiling"]["hit@1"].tolist() == (found.by_query["before"]["recall@6"] > 0).astype(float).tolist()
    )
    assert found.means["before"]["ndcg_linear@5"] == pytest.approx(some.scores.value)
    assert "fused" not in score_reranked(some).by_query


def truth(scores: DatasetScores) -> np.ndarray:
    """1 for relevant candidates, -1 for others, `[Q, N]`."""
    signs = -np.ones((QUERIES, CANDIDATES))
    signs[scores.relevant.query, scores.relevant.row] = 1
    return signs


def test_the_weight_follows_what_the_re_ranker_is_worth() -> None:
    scores = scored(6)
    right = choose_weight(shortlist(scores, 10, 5 * truth(scores)))
    assert right.weight > 0
    assert right.curve is not None
    assert right.curve[right.weight] == max(right.curve.values()) > right.curve[0.0]
    assert right.curve[0.0] == pytest.approx(scores.value)
    assert tuple(right.curve) == WEIGHTS
    assert choose_weight(shortlist(scores, 10, -5 * truth(scores))).weight == 0.0  # it knows the answer, and lies
    assert choose_weight(shortlist(scores, 10, np.zeros((QUERIES, CANDIDATES)))).weight == 0.0


def test_calibration_is_that_of_a_double_loop() -> None:
    some = shortlist(scored(7, pools=True), 4, 2 * truth(scored(7, pools=True)) + 0.5)
    pairs = []
    for query in range(QUERIES):
        right = some.scores.relevant.row[some.scores.relevant.query == query]
        for place, row in enumerate(some.scores.ranked.rows[query, :4]):
            if row != NONE:
                pairs.append((1 / (1 + np.exp(-float(some.log_odds[query, place]))), float(row in right)))
    found = calibrate(some)
    assert found.num_pairs == len(pairs)
    assert found.brier == pytest.approx(np.mean([(p - y) ** 2 for p, y in pairs]))
    error = 0.0
    for number in range(15):
        mine = [(p, y) for p, y in pairs if number / 15 <= p < (number + 1) / 15]
        if mine:
            error += len(mine) / len(pairs) * abs(np.mean([p for p, _ in mine]) - np.mean([y for _, y in mine]))
    assert found.ece == pytest.approx(error)
    assert sum(one.num_pairs for one in found.bins) == len(pairs)
    sure = calibrate(shortlist(scored(7), 4, 50 * truth(scored(7))))
    assert (sure.ece, sure.brier) == (pytest.approx(0), pytest.approx(0))
    assert calibrate(shortlist(scored(7), 4, -50 * truth(scored(7)))).brier == pytest.approx(1)


def test_tables_show_gains_with_intervals_and_no_fused_score_without_a_weight() -> None:
    scores = scored(8)
    perfect = score_reranked(shortlist(scores, 17, 5 * truth(scores)))
    assert perfect.means["reranked"]["hit@1"] == 1.0
    gain = compare_stages({"toy": perfect}, "reranked")["toy"]
    assert gain.low > 0
    assert gain.mean == pytest.approx(perfect.means["reranked"]["ndcg_linear@5"] - scores.value)
    assert compare_stages({"toy": perfect}, "fused") == {}
    lines = rerank_lines({"toy": perfect})
    assert [line.metric for line in lines] == ["ndcg_linear@5", "hit@1", "recall@5"]
    table = rerank_table(lines, "a|b")
    assert table.startswith(
        r"| a\|b | metric | queries | before | re-ranked, top 17 | fused | w | ceiling | ECE | Brier |"
    )
    assert "| – | – |" in table
    content = reranked_json({"toy": perfect})["toy"]
    assert content["gain"]["reranked"][0] == pytest.approx(gain.mean)
    assert "fused" not in content
    fused = reranked_json({"toy": score_reranked(shortlist(scores, 17), WeightChoice(0.5, "given"))})["toy"]
    assert fused["weight"] == {"weight": 0.5, "source": "given", "curve": None, "num_queries": 0}
