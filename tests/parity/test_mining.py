"""Mining and selection against sentence-transformers' `mine_hard_negatives`, on stored vectors.

Queries have several positives, and positives belong to several queries. With `range_min`, the library counts ranks
after the other rules, and rzen before them. So that option is compared by itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from sentence_transformers.util import mine_hard_negatives

from jobs.mining.pools import Pool, Positives, SourceSamples
from jobs.mining.search import excluded_rows
from pipelines.candidates.config import SelectionConfig
from pipelines.candidates.selection import PositiveScores, select
from pipelines.candidates.types import CandidateRows
from pipelines.items.types import as_ids
from rzen.neighbors.exact import NONE, nearest, pair_scores

NUM_QUERIES, NUM_TARGETS, WIDTH = 40, 60, 8


def unit(rng: np.random.Generator, num: int) -> Any:
    rows = rng.standard_normal((num, WIDTH)).astype(np.float32) + 0.3
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class StoredVectors:
    """What the library asks of a model."""

    device = torch.device("cpu")

    def __init__(self, queries: Any, targets: Any) -> None:
        self._vectors = {"q": queries, "t": targets}

    def encode_query(self, texts: list[str], **_: Any) -> Any:
        return np.stack([self._vectors[text[0]][int(text[1:])] for text in texts])

    encode_document = encode_query

    def get_embedding_dimension(self) -> int:
        return WIDTH

    def similarity(self, one: Any, other: Any) -> torch.Tensor:
        return torch.as_tensor(one) @ torch.as_tensor(other).T

    def similarity_pairwise(self, one: Any, other: Any) -> torch.Tensor:
        return (torch.as_tensor(one) * torch.as_tensor(other)).sum(-1)


class AllKnown:
    """A store that has the vector of every item."""

    def missing(self, ids: Any) -> Any:
        return np.zeros(len(ids), bool)


def pairs_of(rng: np.random.Generator) -> list[tuple[int, int]]:
    pairs = [(number, number) for number in range(NUM_QUERIES)]
    pairs += [(int(query), int(target)) for query, target in rng.integers(0, [NUM_QUERIES, NUM_TARGETS], (25, 2))]
    return list(dict.fromkeys(pairs))


def ours(pairs: list[tuple[int, int]], queries: Any, targets: Any, rules: dict[str, Any]) -> dict[tuple[int, int], Any]:
    query, target = (np.array(some, np.int64) + 1 for some in zip(*pairs, strict=True))
    samples = SourceSamples(
        target,
        query + 1000,
        as_ids(f"{some:032x}" for some in target),
        as_ids(f"{some:032x}" for some in query),
        np.zeros(len(pairs), np.int8),
    )
    pool = Pool.of([(0, samples)], AllKnown(), owners=False)  # type: ignore[arg-type]
    asked = np.arange(len(pairs))
    vectors = targets[pool.content - 1]
    found = nearest(
        queries[query - 1], vectors, len(pool), excluded=excluded_rows(samples, asked, pool, Positives.of([samples]))
    )
    there = found.rows != NONE
    rows = CandidateRows.of(
        [str(number) for number in asked],
        there.sum(axis=1),
        candidate=pool.content[found.rows[there]] - 1,
        recall=found.scores[there],
        query=samples.query,
        positive_recall=pair_scores(queries[query - 1], targets[target - 1]),
    )
    config = SelectionConfig.model_validate(rules)
    chosen = select(rows, PositiveScores.of([rows], config), config, "s", 0).rows
    return {pair: chosen.candidate[chosen.span(row)].tolist() for row, pair in enumerate(pairs)}


def theirs(pairs: list[tuple[int, int]], queries: Any, targets: Any, options: dict[str, Any]) -> dict[Any, Any]:
    rows = {"query": [f"q{query}" for query, _ in pairs], "positive": [f"t{target}" for _, target in pairs]}
    mined = mine_hard_negatives(
        Dataset.from_dict(rows),
        StoredVectors(queries, targets),  # type: ignore[arg-type]
        range_max=NUM_TARGETS,
        output_format="n-tuple",
        verbose=False,
        **options,
    )
    return {
        (int(row["query"][1:]), int(row["positive"][1:])): [
            int(row[name][1:]) for name in row if name.startswith("negative")
        ]
        for row in mined
    }


@pytest.mark.parametrize(
    ("rules", "options"),
    [
        ({"negatives": {"margin": None}}, {}),
        ({"negatives": {"margin": 0.05}}, {"relative_margin": 0.05}),
        ({"negatives": {"margin": 0.3}}, {"relative_margin": 0.3}),
        ({"negatives": {"margin": None, "max_score": 0.5}}, {"max_score": 0.5}),
        ({"negatives": {"margin": None}, "first_rank": 6}, {"range_min": 5}),
        (
            {"negatives": {"margin": 0.1, "max_score": 0.6}},
            {"relative_margin": 0.1, "max_score": 0.6},
        ),
    ],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_same_negatives_as_sentence_transformers(rules: dict[str, Any], options: dict[str, Any], seed: int) -> None:
    rng = np.random.default_rng(seed)
    pairs = pairs_of(rng)
    queries, targets = unit(rng, NUM_QUERIES), unit(rng, NUM_TARGETS)
    for query, target in pairs:
        targets[target] += 2 * queries[query]
    targets /= np.linalg.norm(targets, axis=1, keepdims=True)
    found = ours(pairs, queries, targets, rules | {"negatives_per_sample": 4})
    expected = theirs(pairs, queries, targets, options | {"num_negatives": 4})
    # Where a positive scores below zero, the library's margin takes negatives that score above it.
    below = {query for query, target in pairs if queries[query] @ targets[target] < 0}
    # It leaves out pairs with fewer negatives than it was asked for.
    found = {pair: some for pair, some in found.items() if len(some) == 4 and pair[0] not in below}
    assert len(found) > len(pairs) // 2
    assert found == {pair: some for pair, some in expected.items() if pair[0] not in below}
