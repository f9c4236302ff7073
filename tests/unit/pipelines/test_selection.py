"""Rules that choose negatives, against a double loop in plain Python, and on planted false negatives."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.candidates.config import SelectionConfig
from pipelines.candidates.selection import PositiveScores, hashes, positive_ranks, select
from pipelines.candidates.types import CandidateRows

NAN = math.nan


def chosen(rows: CandidateRows, **settings_: Any) -> list[list[int]]:
    found = selected(rows, **settings_).rows
    return [found.candidate[found.span(row)].tolist() for row in range(len(found))]


def selected(rows: CandidateRows, start: int = 0, **settings_: Any) -> Any:
    config = SelectionConfig.model_validate(settings_)
    return select(rows, PositiveScores.of([rows], config), config, "s", start)


def rows_of(counts: list[int], **columns: Any) -> CandidateRows:
    given_ = {"candidate": list(range(sum(counts)))} | columns
    return CandidateRows.of([str(number) for number in range(len(counts))], counts, **given_)


ONE = rows_of([6], recall=[0.9, 0.8, 0.76, 0.5, 0.3, 0.1], positive_recall=[0.8])
NO_MARGIN = {"margin": None}


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ({"negatives": NO_MARGIN}, [0, 1, 2, 3, 4]),
        ({}, [2, 3, 4, 5]),  # at most 0.8 - 0.05 x 0.8 = 0.76
        ({"negatives": {"margin": 0.0}}, [1, 2, 3, 4, 5]),
        ({"negatives": NO_MARGIN | {"max_score": 0.7}}, [3, 4, 5]),
        ({"negatives": NO_MARGIN | {"max_above_mean": 0.0}}, [2, 3, 4, 5]),
        ({"negatives": NO_MARGIN | {"max_above_mean": 0.05}}, [1, 2, 3, 4, 5]),
        ({"negatives": NO_MARGIN, "first_rank": 2, "last_rank": 4}, [1, 2, 3]),
        ({"negatives": NO_MARGIN, "negatives_per_sample": 2}, [0, 1]),
        ({"negatives": NO_MARGIN, "negatives_per_sample": 2, "choice": "spread"}, [0, 5]),
        ({"negatives": NO_MARGIN, "negatives_per_sample": 3, "choice": "spread"}, [0, 2, 5]),
        ({"negatives": NO_MARGIN, "negatives_per_sample": 1, "choice": "spread"}, [0]),
        ({"negatives": NO_MARGIN, "negatives_per_sample": 9, "choice": "spread"}, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_each_rule_removes_what_it_says(rules: dict[str, Any], expected: list[int]) -> None:
    assert chosen(ONE, **rules) == [expected]


def test_the_margin_also_tightens_for_negative_scores() -> None:
    rows = rows_of([3], recall=[-0.19, -0.205, -0.22], positive_recall=[-0.2])
    assert chosen(rows) == [[2]]  # -0.2 - 0.05 x 0.2 = -0.21; 0.95 x -0.2 = -0.19 would take all three


def test_positives_of_equal_queries_count_together() -> None:
    rows = rows_of(
        [2, 2, 2], recall=[0.6, 0.5] * 3, positive_recall=[0.9, 0.58, 0.58], query=[7, 7, 0]
    )  # the lowest positive of query 7 is 0.58: at most 0.551
    assert chosen(rows) == [[1], [3], [5]]
    mean = {"margin": None, "max_above_mean": 0.0}  # 0.74 for query 7, 0.58 for the other
    assert chosen(rows, negatives=mean) == [[0, 1], [2, 3], [5]]
    kept = selected(rows, positives={"min_score": 0.8}).rows.keep.tolist()
    assert kept == [True, True, False]


def test_a_judge_decides_where_it_has_judged() -> None:
    rows = rows_of(
        [3, 1],
        recall=[0.5] * 4,
        teacher=[0.895, 0.885, NAN, 0.1],
        positive_recall=[0.9, 0.9],
        positive_teacher=[0.9, NAN],
    )
    assert chosen(rows, negatives={"judge_margin": 0.01}) == [[1, 2], []]


def test_candidates_of_queries_that_are_alike_are_left_out() -> None:
    rows = rows_of([3], recall=[0.5] * 3, owner=[0.95, 0.5, NAN], positive_recall=[0.9])
    assert chosen(rows, negatives={"max_owner_likeness": 0.9}) == [[1, 2]]


def test_modalities() -> None:
    rows = rows_of(
        [6],
        recall=[0.95, 0.93, 0.9, 0.7, 0.6, 0.5],
        candidate_modality=[3, 3, 0, 3, 0, 0],
        modality=[0],
        positive_recall=[0.8],
    )
    assert chosen(rows, modality="same") == [[4, 5]]
    # Texts above the image that is right, and images from rank 5 on, in turns.
    assert chosen(rows, modality="mm_embed", low_rank=5, negatives_per_sample=3) == [[0, 1, 4]]
    assert chosen(rows, modality="mm_embed", low_rank=5, negatives_per_sample=2) == [[0, 4]]


def test_samples_without_a_good_positive_or_enough_negatives_are_dropped() -> None:
    rows = rows_of([2, 2, 0], recall=[0.7, 0.2, 0.5, 0.4], positive_recall=[0.6, 0.6, NAN], keep=[True, True, False])
    assert positive_ranks(rows).tolist() == [2, 1, 1]
    assert selected(rows).rows.keep.tolist() == [True, True, False]
    assert selected(rows, positives={"max_rank": 1}).rows.keep.tolist() == [False, True, False]
    found = selected(rows, min_negatives=2)
    assert found.rows.keep.tolist() == [False, True, False]
    assert (found.counts.samples, found.counts.dropped, found.counts.without_negatives) == (3, 2, 1)


def test_without_the_score_of_the_positive_nothing_is_chosen() -> None:
    rows = rows_of([2], recall=[0.7, 0.2])
    assert chosen(rows) == [[]]
    assert chosen(rows, negatives={"margin": None, "max_above_mean": 0.1}) == [[]]
    assert chosen(rows, negatives=NO_MARGIN) == [[0, 1]]


def test_counts_say_what_each_rule_removed_in_order_and_alone() -> None:
    counts = selected(ONE, negatives={"max_score": 0.7}, first_rank=2).counts
    assert dict(counts.removed) == {"rank": 1, "max_score": 2, "margin": 0}
    assert dict(counts.removed_alone) == {"rank": 1, "max_score": 3, "margin": 2}
    assert (counts.candidates, counts.chosen) == (6, 3)
    counts.add(counts)
    assert counts.candidates == 12
    assert counts.removed_alone["margin"] == 4


def test_random_choices_depend_on_seed_source_sample_and_candidate_only() -> None:
    rng = np.random.default_rng(0)
    rows = rows_of(
        [50] * 40, candidate=rng.integers(0, 10**6, 2000), recall=rng.random(2000), positive_recall=[2.0] * 40
    )
    random = {"choice": "random", "negatives": NO_MARGIN, "negatives_per_sample": 7}
    whole = chosen(rows, **random)
    parts = chosen(rows.part(0, 13), **random)
    config = SelectionConfig.model_validate(random)
    rest = rows.part(13, 40)
    found = select(rest, PositiveScores.of([rest], config), config, "s", 13).rows
    parts += [found.candidate[found.span(row)].tolist() for row in range(27)]
    assert parts == whole
    assert chosen(rows, **random, seed=1) != whole
    assert all(len(set(some)) <= 7 for some in whole)
    # As many of the best half as of the other.
    first = np.concatenate([np.isin(rows.candidate[rows.span(row)], whole[row])[:25] for row in range(40)])
    assert abs(first.mean() - 7 / 50) < 0.03


def test_hashes_are_splitmix64() -> None:
    def mixed(value: int) -> int:
        value = (value + 0x9E3779B97F4A7C15) % 2**64
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % 2**64
        return value ^ (value >> 31)

    assert mixed(0) == 0xE220A8397B1DCDAF  # the first of splitmix64 with seed 0
    import hashlib

    first = int.from_bytes(hashlib.sha256(b"3/s").digest()[:8])
    expected = mixed(mixed((first + 9 * 0x9E3779B97F4A7C15) % 2**64) ^ 17)
    assert hashes(3, "s", np.array([9]), np.array([17])).tolist() == [expected]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["top", "spread", "random"]), st.integers(1, 6))
def test_rules_together_are_a_double_loop(seed: int, choice: str, most: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 9, 7).tolist()
    num = sum(counts)
    recall = np.concatenate([[], *(np.sort(rng.uniform(-1, 1, count))[::-1] for count in counts)]).astype(np.float32)
    positive = rng.uniform(-1, 1, 7).astype(np.float32)
    owner = rng.uniform(-1, 1, num).astype(np.float32)
    query = rng.integers(0, 4, 7)
    rows = rows_of(counts, recall=recall, positive_recall=positive, owner=owner, query=query)
    limits = {"max_score": 0.8, "margin": 0.1, "max_above_mean": 0.2, "max_owner_likeness": 0.5}
    found = chosen(rows, negatives=limits, last_rank=6, choice=choice, negatives_per_sample=most)
    for row in range(7):
        same = [other for other in range(7) if other == row or (query[other] == query[row] != 0)]
        lowest, mean = (
            min(positive[other] for other in same),
            np.mean([positive[other] for other in same], dtype=np.float64),
        )
        left = []
        for rank, place in enumerate(range(int(rows.bounds[row]), int(rows.bounds[row + 1])), 1):
            score = recall[place]
            near = min(abs(score - (lowest - 0.1 * abs(lowest))), abs(score - mean - 0.2)) < 1e-6
            if near:
                return  # rounding decides
            good = score <= 0.8 and score <= lowest - 0.1 * abs(lowest) and score < mean + 0.2
            if good and owner[place] <= 0.5 and rank <= 6:
                left.append(place)
        if choice == "top":
            expected = left[:most]
        elif choice == "spread":
            few = len(left) <= most
            expected = left if few else [left[i * (len(left) - 1) // max(1, most - 1)] for i in range(most)]
        else:
            values = hashes(0, "s", np.full(len(left), row), np.array(left, np.int64))
            expected = sorted(sorted(left, key=lambda place: values[left.index(place)])[:most])
        assert found[row] == expected


def planted(share: float = 0.2) -> tuple[CandidateRows, Any]:
    """300 samples with 40 candidates: right answers score as the positive does, up to noise, and wrong ones lower."""
    rng = np.random.default_rng(0)
    num, depth = 300, 40
    positive = rng.uniform(0.5, 0.9, num)
    is_right = rng.random((num, depth)) < share
    right = positive[:, None] + rng.normal(0.01, 0.03, (num, depth))
    recall = np.where(is_right, right, positive[:, None] - rng.gamma(2.0, 0.08, (num, depth)))
    teacher = np.where(is_right, rng.normal(0.9, 0.03, (num, depth)), rng.normal(0.3, 0.15, (num, depth)))
    owner = np.where(is_right, rng.normal(0.9, 0.05, (num, depth)), rng.normal(0.4, 0.15, (num, depth)))
    order = np.argsort(-recall, axis=1)
    recall, teacher, owner, is_right = (
        np.take_along_axis(some, order, 1) for some in (recall, teacher, owner, is_right)
    )
    columns = {
        "recall": recall.ravel(),
        "teacher": teacher.ravel(),
        "owner": owner.ravel(),
        "positive_recall": positive,
    }
    return rows_of([depth] * num, **columns, positive_teacher=np.full(num, 0.9)), is_right.ravel()


@pytest.mark.parametrize(
    ("rule", "most_left", "least_precision", "least_recall"),
    [
        ({"margin": None}, 1.0, 0.0, 0.0),
        ({"max_score": 0.7}, 0.6, 0.4, 0.4),
        ({"margin": 0.05}, 0.1, 0.7, 0.9),
        ({"margin": 0.1}, 0.02, 0.5, 0.98),
        ({"max_above_mean": -0.05}, 0.05, 0.6, 0.95),
        ({"judge_margin": 0.15}, 0.01, 0.98, 0.99),
        ({"max_owner_likeness": 0.75}, 0.01, 0.9, 0.99),
    ],
)
def test_rules_find_planted_false_negatives(
    rule: dict[str, Any], most_left: float, least_precision: float, least_recall: float
) -> None:
    rows, is_right = planted()
    found = selected(rows, negatives={"margin": None} | rule, negatives_per_sample=5)
    removed = np.zeros(len(is_right), bool)
    for some in found.removed_by.values():
        removed |= some
    precision, recall = (removed & is_right).sum() / max(1, removed.sum()), (removed & is_right).sum() / is_right.sum()
    left = is_right[found.chosen].mean()
    before = is_right[selected(rows, negatives=NO_MARGIN).chosen].mean()
    assert before > 0.7  # the hardest candidates are mostly right
    assert left <= most_left
    assert precision >= least_precision
    assert recall >= least_recall
    if removed.any():
        assert left < before


def test_clusters_and_scores_of_positives_stay() -> None:
    rows = replace(ONE, cluster=np.array([4]))
    found = selected(rows).rows
    assert found.cluster.tolist() == [4]
    assert found.positive_recall.tolist() == pytest.approx([0.8])
    assert found.recall.tolist() == pytest.approx([0.76, 0.5, 0.3, 0.1])


def test_the_teacher_is_a_mix_of_recall_and_judge_scores() -> None:
    judged = replace(ONE, teacher=np.float32([1, 0, NAN, 0.5, 0.25, 0]), positive_teacher=np.float32([0.9]))
    found = selected(judged, negatives=NO_MARGIN, teacher={"recall": 0.5, "judge": 0.25}).rows
    expected = [0.5 * 0.9 + 0.25, 0.5 * 0.8, NAN, 0.5 * 0.5 + 0.125, 0.5 * 0.3 + 0.0625]
    assert found.teacher.tolist() == pytest.approx(expected, nan_ok=True)
    assert found.positive_teacher.tolist() == pytest.approx([0.5 * 0.8 + 0.25 * 0.9])
    plain = selected(judged, negatives=NO_MARGIN).rows
    assert plain.teacher.tolist() == pytest.approx([1, 0, NAN, 0.5, 0.25], nan_ok=True)
