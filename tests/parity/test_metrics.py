"""Metrics of random graded runs, ties included, against trec_eval. Vectors stand in for scores: candidates are the unit
vectors of the axes, so that a query's coordinates are its scores.

trec_eval breaks ties by the names of candidates, the last first: names are given so that ties go against what is
relevant there too. Its map_cut divides by the number of relevant candidates, also where that is more than the cut, and
its gain is linear: the exponential one is asked for with other grades.
"""

from __future__ import annotations

import numpy as np
import pytest

from rzen.evaluation.metrics import CUTOFFS, METRIC_NAMES, Relevant, metrics_by_query
from rzen.evaluation.ranking import Pairs, rank_candidates, rank_pools

pytrec_eval = pytest.importorskip("pytrec_eval")
NUM_QUERIES, NUM_CANDIDATES = 60, 40


def random_run(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores in seven steps, so that most are tied, and grades from 0 to 3: `[Q, N]` both. Some queries have more
    relevant candidates than the longest cut.
    """
    rng = np.random.default_rng(seed)
    scores = rng.integers(1, 8, size=(NUM_QUERIES, NUM_CANDIDATES)) / 8
    share = rng.choice([0.03, 0.2, 0.6], size=(NUM_QUERIES, 1))
    grades = rng.integers(1, 4, size=scores.shape) * (rng.random(scores.shape) < share)
    grades[np.arange(NUM_QUERIES), rng.integers(NUM_CANDIDATES, size=NUM_QUERIES)] = 2
    return scores, grades


def relevant_of(grades: np.ndarray) -> Relevant:
    query, row = np.nonzero(grades)
    return Relevant(query, row, grades[query, row].astype(np.float64), len(grades))


def unit(scores: np.ndarray) -> np.ndarray:
    return (scores / np.linalg.norm(scores, axis=1, keepdims=True)).astype(np.float32)


def ours(scores: np.ndarray, grades: np.ndarray, block_rows: int) -> dict[str, np.ndarray]:
    relevant = relevant_of(grades)
    ranked = rank_candidates(
        unit(scores), np.eye(NUM_CANDIDATES, dtype=np.float32), relevant, block_rows=block_rows, query_rows=17
    )
    return metrics_by_query(relevant, ranked.rank)


def names(grades: np.ndarray) -> list[str]:
    """Of equal scores trec_eval puts the later name first: the lower the grade, the later."""
    return [f"{9 - int(grade)}-{row:03d}" for row, grade in enumerate(grades)]


def theirs(scores: np.ndarray, grades: np.ndarray, gains: np.ndarray) -> dict[str, np.ndarray]:
    run, qrel = {}, {}
    for query in range(len(scores)):
        known = names(grades[query])
        run[str(query)] = dict(zip(known, scores[query].tolist(), strict=True))
        qrel[str(query)] = {name: int(gain) for name, gain in zip(known, gains[query], strict=True) if gain > 0}
    cuts = ",".join(map(str, CUTOFFS))
    measures = {f"{family}.{cuts}" for family in ("P", "recall", "ndcg_cut", "map_cut", "success")} | {"recip_rank"}
    found = pytrec_eval.RelevanceEvaluator(qrel, measures).evaluate(run)
    return {name: np.array([found[str(q)][name] for q in range(len(scores))]) for name in found["0"]}


@pytest.mark.parametrize("block_rows", [1, 7, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_metrics_equal_trec_eval(seed: int, block_rows: int) -> None:
    scores, grades = random_run(seed)
    found, linear = ours(scores, grades, block_rows), theirs(scores, grades, grades)
    exponential = theirs(scores, grades, np.where(grades > 0, 2**grades - 1, 0))
    num_relevant = (grades > 0).sum(axis=1)
    assert (num_relevant > 10).any()
    for k in CUTOFFS:
        precision, recall = linear[f"P_{k}"], linear[f"recall_{k}"]
        both = np.where(precision > 0, precision + recall, 1)
        expected = {
            "hit": linear[f"success_{k}"],
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / both,
            "mrr": np.where(linear["recip_rank"] >= 1 / k - 1e-12, linear["recip_rank"], 0),
            "map": linear[f"map_cut_{k}"] * num_relevant / np.minimum(num_relevant, k),
            "ndcg_linear": linear[f"ndcg_cut_{k}"],
            "ndcg_exponential": exponential[f"ndcg_cut_{k}"],
        }
        assert {f"{family}@{k}" for family in expected} <= set(METRIC_NAMES)
        for family, values in expected.items():
            np.testing.assert_allclose(found[f"{family}@{k}"], values, rtol=0, atol=1e-9, err_msg=f"{family}@{k}")


def test_pools_of_its_own_equal_trec_eval() -> None:
    """Each query searches its own half; what is relevant lies in it."""
    scores, grades = random_run(9)
    inside = np.random.default_rng(3).random(scores.shape) < 0.5
    inside |= grades > 0
    relevant = relevant_of(grades)
    pools = [np.flatnonzero(mine) for mine in inside]
    ranked = rank_pools(unit(scores), np.eye(NUM_CANDIDATES, dtype=np.float32), relevant, pools)
    found, low = metrics_by_query(relevant, ranked.rank), np.where(inside, scores, -1.0)
    expected = theirs(low, grades, grades)
    for k in CUTOFFS:
        np.testing.assert_allclose(found[f"ndcg_linear@{k}"], expected[f"ndcg_cut_{k}"], rtol=0, atol=1e-9)
        np.testing.assert_allclose(found[f"recall@{k}"], expected[f"recall_{k}"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("block_rows", [1, 7, 1000])
def test_excluded_candidates_equal_a_run_without_them(block_rows: int) -> None:
    scores, grades = random_run(4)
    out = (np.random.default_rng(5).random(scores.shape) < 0.2) & (grades == 0)
    relevant, excluded = relevant_of(grades), Pairs(*np.nonzero(out))
    axes = np.eye(NUM_CANDIDATES, dtype=np.float32)
    ranked = rank_candidates(unit(scores), axes, relevant, excluded=excluded, block_rows=block_rows, query_rows=17)
    assert not out[np.arange(NUM_QUERIES)[:, None], ranked.rows][ranked.rows >= 0].any()
    found, expected = metrics_by_query(relevant, ranked.rank), theirs(np.where(out, -1.0, scores), grades, grades)
    plain = theirs(scores, grades, grades)
    for k in CUTOFFS:
        np.testing.assert_allclose(found[f"ndcg_linear@{k}"], expected[f"ndcg_cut_{k}"], rtol=0, atol=1e-9)
        assert abs(plain[f"ndcg_cut_{k}"] - expected[f"ndcg_cut_{k}"]).max() > 0.01


def test_grades_up_to_the_largest_have_finite_metrics() -> None:
    """Grades 1023 and 1022: the second gain is half of the first, as with grades 11 and 10 to three digits."""
    ranks = np.array([2, 1])
    found = []
    for grades in ((1023.0, 1022.0), (11.0, 10.0)):
        relevant = Relevant(np.zeros(2, np.int64), np.arange(2), np.array(grades), 1)
        with np.errstate(all="raise", under="ignore"):
            found.append(metrics_by_query(relevant, ranks)["ndcg_exponential@10"][0])
    expected = (1 / 2 + 1 / np.log2(3)) / (1 + 1 / 2 / np.log2(3))
    assert found[0] == pytest.approx(expected, abs=1e-12)
    assert found[1] == pytest.approx(expected, abs=1e-3)


def test_a_rule_that_favours_ties_is_caught() -> None:
    """The same runs with ties for what is relevant differ: most scores are tied."""
    scores, grades = random_run(0)
    found, expected = ours(scores + 1e-3 * (grades > 0), grades, 1000), theirs(scores, grades, grades)
    assert found["ndcg_linear@5"].mean() > expected["ndcg_cut_5"].mean() + 0.1
