"""Nearest neighbors against brute force: in any number of parts, with duplicates, ties and excluded pairs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rzen.neighbors.exact import NONE, Excluded, FloatArray, Neighbors, merge, nearest, pair_scores
from rzen.neighbors.inverted_lists import InvertedLists, recall


def brute_force(queries: FloatArray, vectors: FloatArray, k: int, excluded: Excluded | None = None) -> Neighbors:
    """Every pair by itself in float64, sorted in Python."""
    left_out = set(zip(excluded.query.tolist(), excluded.row.tolist(), strict=True)) if excluded else set()
    rows, scores = [], []
    for number, query in enumerate(queries.astype(np.float64)):
        all_scores = [np.float32((query * vector).sum()) for vector in vectors.astype(np.float64)]
        order = sorted(range(len(vectors)), key=lambda row: (-all_scores[row], row))
        kept = [row for row in order if (number, row) not in left_out][:k]
        rows.append(kept + [NONE] * (k - len(kept)))
        scores.append([all_scores[row] for row in kept] + [-np.inf] * (k - len(kept)))
    return Neighbors(np.array(rows), np.array(scores, np.float32))


def unit(rng: np.random.Generator, num: int, width: int) -> FloatArray:
    rows = rng.standard_normal((num, width)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def with_duplicates(rng: np.random.Generator, num: int, width: int) -> FloatArray:
    rows = unit(rng, num, width)
    return rows[rng.integers(0, max(1, num // 2), num)]


def parts_of(queries: FloatArray, vectors: FloatArray, k: int, num_parts: int) -> Neighbors:
    found = []
    start = 0
    for part in np.array_split(vectors, num_parts):
        some = nearest(queries, part, k, block_rows=7, query_rows=3)
        found.append(Neighbors(np.where(some.rows == NONE, NONE, some.rows + start), some.scores))
        start += len(part)
    return merge(found, k)


@pytest.mark.parametrize("num_parts", [1, 2, 3])
def test_the_best_of_the_parts_best_are_those_of_all(num_parts: int) -> None:
    rng = np.random.default_rng(num_parts)
    queries, vectors = unit(rng, 11, 5), with_duplicates(rng, 97, 5)
    expected = brute_force(queries, vectors, 13)
    found = parts_of(queries, vectors, 13, num_parts)
    assert np.array_equal(found.rows, expected.rows)
    assert np.array_equal(found.scores, expected.scores)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(0, 60), st.integers(1, 40), st.integers(1, 20), st.integers(0, 10**6))
def test_any_shape_with_many_ties_is_that_of_brute_force(q: int, n: int, k: int, block: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    queries, vectors = rng.integers(-1, 2, (q, 3)).astype(np.float32), rng.integers(-1, 2, (n, 3)).astype(np.float32)
    pairs = np.unique(rng.integers(0, [q, max(1, n)], (5, 2)), axis=0)
    excluded = Excluded(pairs[:, 0], pairs[:, 1])
    expected = brute_force(queries, vectors, k, excluded)
    found = nearest(queries, vectors, k, excluded=excluded, block_rows=block, query_rows=4)
    assert np.array_equal(found.rows, expected.rows)
    assert np.array_equal(found.scores, expected.scores)


def test_more_ties_at_the_cut_than_the_second_scoring_takes_are_in_order() -> None:
    vectors = np.repeat(np.eye(2, dtype=np.float32), 200, axis=0)
    found = nearest(np.eye(2, dtype=np.float32), vectors, 5, block_rows=150)
    assert found.rows.tolist() == [[0, 1, 2, 3, 4], [200, 201, 202, 203, 204]]


@pytest.mark.parametrize("order", ["as drawn", "best first", "best last"])
def test_the_order_of_the_vectors_changes_nothing_but_their_rows(order: str) -> None:
    rng = np.random.default_rng(0)
    queries, vectors = unit(rng, 6, 8), unit(rng, 3000, 8)
    if order != "as drawn":  # of the first query: a block has no better one, or all are better
        ascending = np.argsort(vectors @ queries[0])
        vectors = vectors[ascending[::-1] if order == "best first" else ascending]
    expected = brute_force(queries, vectors, 3)
    for block_rows in (16, 64, 3000):
        found = nearest(queries, vectors, 3, block_rows=block_rows, query_rows=4)
        assert np.array_equal(found.rows, expected.rows)
        assert np.array_equal(found.scores, expected.scores)


def test_a_score_is_that_of_the_pair_alone() -> None:
    rng = np.random.default_rng(1)
    queries, vectors = unit(rng, 4, 300), unit(rng, 50, 300)
    found = nearest(queries, vectors, 9)
    for number, rows in enumerate(found.rows):
        alone = [pair_scores(queries[[number]], vectors[[row]])[0] for row in rows]
        assert found.scores[number].tolist() == alone


def test_inverted_lists_find_all_when_all_are_probed_and_most_otherwise() -> None:
    rng = np.random.default_rng(2)
    centers = unit(rng, 20, 16)
    vectors = centers[rng.integers(0, 20, 2000)] + 0.1 * unit(rng, 2000, 16)
    queries = (centers[rng.integers(0, 20, 30)] + 0.1 * unit(rng, 30, 16)).astype(np.float32)
    vectors = vectors.astype(np.float32)
    excluded = Excluded(np.array([0, 0, 3]), nearest(queries, vectors, 2).rows[[0, 0, 3], [0, 1, 0]])
    expected = nearest(queries, vectors, 10, excluded=excluded)
    lists = InvertedLists.from_bytes(InvertedLists.build(vectors, 40, seed=0).to_bytes())
    whole = lists.nearest(queries, vectors, 10, 40, excluded)
    assert np.array_equal(whole.rows, expected.rows)
    assert np.array_equal(whole.scores, expected.scores)
    some = recall(lists.nearest(queries, vectors, 10, 4, excluded), expected)
    few = recall(lists.nearest(queries, vectors, 10, 1, excluded), expected)
    assert few < some <= 1
    assert some > 0.9
