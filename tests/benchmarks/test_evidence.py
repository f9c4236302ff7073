"""The test bed of the evidence: arms that must be the same run are, the truth is the truth, and seeds share no test."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from rzen.evaluation.ablation import paired_interval
from tests.benchmarks import evidence_runs, evidence_training
from tests.benchmarks.evidence_bed import (
    TUNING,
    VARIANTS,
    Bed,
    Cell,
    OracleBatch,
    Run,
    TruthIdentity,
    held_out_variants,
    train,
)
from tests.benchmarks.evidence_cells import (
    CONTRASTS,
    CORPORA,
    EMOJI,
    SEEDS,
    TEMPERATURES,
    Results,
    best_temperatures,
    to_test,
    to_tune,
)
from tests.benchmarks.evidence_comparison import read_tables, verdict
from tests.benchmarks.evidence_report import report
from tests.benchmarks.evidence_runs import Work, do, hits, interval
from tests.benchmarks.evidence_training import MinedCell, SoupCell, mean_of, mine, train_any

ITEMS = 24


@pytest.fixture(scope="module")
def bed() -> Bed:
    torch.manual_seed(0)
    tones = torch.randn(VARIANTS, 16)
    pictures = (torch.randn(ITEMS, 1, 16) + 0.5 * tones).reshape(-1, 16)
    words = torch.eye(ITEMS + VARIANTS)
    rows = [
        torch.cat([words[[e]] + words[ITEMS:], words[[e]]])  # with each tone, and without one
        for e in range(ITEMS)
    ]
    return Bed(pictures, normalize(torch.cat(rows), dim=1), torch.arange(len(pictures)))


def short(cell: Cell) -> Cell:
    return replace(cell, batch=32, steps=40)


def test_ids_change_nothing_where_no_content_repeats(bed: Bed) -> None:
    cell = short(Cell(alpha=9))
    assert train(bed, cell, 0) == train(bed, replace(cell, ids=True), 0) == train(bed, replace(cell, oracle=True), 0)


def test_ids_are_the_truth_where_names_repeat(bed: Bed) -> None:
    cell = short(Cell(direction="classes", alpha=9))
    known = train(bed, replace(cell, ids=True), 0)
    assert known == train(bed, replace(cell, oracle=True), 0)
    assert known.scores != train(bed, cell, 0).scores


def test_the_truth_is_more_than_ids_where_captions_leave_the_tone_out(bed: Bed) -> None:
    cell = short(Cell(untoned=0.5))
    arms = [train(bed, replace(cell, **arm), 0).scores["map"] for arm in ({}, {"ids": True}, {"oracle": True})]
    assert len(set(arms)) == 3
    assert arms[2] > arms[0]


def test_the_oracle_hides_right_answers_only() -> None:
    right = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 1, 1]]).bool()
    vectors = torch.eye(3)
    batch = OracleBatch(vectors, vectors, "emoji", right=right).widened()
    assert isinstance(batch.identity, TruthIdentity)
    assert torch.equal(batch.identity.query_to_targets(torch.tensor([2, 0])), right[[2, 0]])


def test_tuning_asks_for_other_tones_than_testing() -> None:
    tested = {(e, int(t)) for seed in range(12) for e, t in enumerate(held_out_variants(50, seed))}
    tuned = {(e, int(t)) for seed in (TUNING, TUNING + 1) for e, t in enumerate(held_out_variants(50, seed))}
    assert tested
    assert tuned
    assert not tested & tuned


def test_the_interval_is_that_of_students_t_where_only_seeds_differ() -> None:
    by_seed = np.random.default_rng(1).normal(0.1, 0.05, 12)
    mean, low, high = interval(np.repeat(by_seed[:, None], 40, axis=1))
    expected = paired_interval(by_seed.tolist())
    assert mean == pytest.approx(expected[0])
    assert (high - low) == pytest.approx(expected[2] - expected[1], rel=0.2)  # the bootstrap is a little narrower


@pytest.mark.parametrize("name", CORPORA)
def test_all_contrasts_are_of_cells_that_run(name: str) -> None:
    cells = CORPORA[name].core()
    assert CORPORA[name].contrasts()[:3] == list(CONTRASTS[:3])
    for contrast in CORPORA[name].contrasts():
        assert sum(contrast.parts.values()) == 0
    assert len({cell.key() for cell in cells.values()}) == len(cells)


def test_the_keys_of_stored_runs_stay() -> None:
    """Else a repeated command trains all of them again."""
    assert EMOJI.core()["mixed", "ids + rule", 9.0].key() == (
        '{"alpha": 9.0, "batch": 128, "direction": "names", "hardness_from": 0, "ids": true, "learnable": false,'
        ' "normalized": false, "options": {}, "oracle": false, "rule": true, "steps": 400, "temperature": 0.02,'
        ' "tones": 4, "untoned": 0.2}'
    )
    keys = [cell.key() for cell in evidence_training.cells()]
    assert len(set(keys)) == len(keys)


def test_half_a_line_of_a_killed_command_is_done_again(tmp_path: Path) -> None:
    cell = Cell()
    run = {"cell": cell.key(), "seed": 3, "hits": "ff" * 38}
    (tmp_path / "runs.jsonl").write_text(json.dumps(run) + "\n" + json.dumps(run)[:20])
    work = Work(EMOJI.read, tmp_path, train)
    assert list(do(tmp_path, [(cell, 3)], work)) == [(cell.key(), 3)]
    assert hits("ff" * 38, 304).sum() == 304


def with_equal_contents(bed: Bed) -> Bed:
    """Return a bed in which variants 0 and 1 of each item are equal, and item 1 has variant 4 of item 0."""
    row = torch.arange(len(bed.targets))
    row = torch.where(row % VARIANTS == 1, row - 1, row)
    row[VARIANTS + 4] = 4
    _, contents = torch.unique(row, return_inverse=True)
    return Bed(bed.targets[row], bed.queries, contents)


def test_equal_targets_are_one_content(bed: Bed) -> None:
    equal = with_equal_contents(bed)
    assert equal.contents[:10].tolist() == [0, 0, 1, 2, 3, 4, 4, 5, 6, 3]
    assert equal.distinct[:7].tolist() == [0, 2, 3, 4, 5, 7, 8]
    assert equal.has[:2, :8].long().tolist() == [[1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1, 1, 0]]


def test_ids_are_the_truth_where_names_of_variants_repeat(bed: Bed) -> None:
    equal, cell = with_equal_contents(bed), short(Cell())
    known = train(equal, replace(cell, ids=True), 0)
    assert known == train(equal, replace(cell, oracle=True), 0)
    assert known.scores != train(equal, cell, 0).scores


def trained(bed: Bed, cell: Cell) -> Run:
    run = Run(bed, short(cell), 0)
    run.advance(20)
    return run


@pytest.mark.parametrize("drawn", [False, True])
def test_mined_negatives_are_trained_targets_without_the_known_answers(bed: Bed, drawn: bool) -> None:
    run = trained(bed, Cell(untoned=0.5, ids=True))
    mined_TK, is_right_TK = mine(run, 6, None, drawn)
    held = torch.arange(ITEMS) * VARIANTS + torch.from_numpy(run.held)
    assert (mined_TK[held] == -1).all()  # no sample
    assert not torch.isin(mined_TK, held).any()
    for row in (row for row in range(VARIANTS * ITEMS) if row not in held):
        item, is_toned = row // VARIANTS, run.is_toned.reshape(-1)
        known = {row} if is_toned[row] else {5 * item + t for t in range(5) if not is_toned[5 * item + t]}
        assert not known & set(mined_TK[row].tolist())
        right = {row} if is_toned[row] else set(range(5 * item, 5 * item + 5))
        assert is_right_TK[row].tolist() == [content in right for content in mined_TK[row].tolist()]
    assert is_right_TK.any()


def test_mined_negatives_score_higher_than_drawn_ones(bed: Bed) -> None:
    run = trained(bed, Cell(ids=True))
    with torch.no_grad():
        queries, targets = run.towers.queries(bed.queries), run.towers.targets(bed.targets)
    row = torch.arange(VARIANTS * ITEMS)
    scores_TC = queries[6 * (row // VARIANTS) + row % VARIANTS] @ targets.T
    mined, drawn = (mine(run, 4, None, drawn)[0] for drawn in (False, True))
    is_sample = mined[:, 0] >= 0
    assert ((drawn[:, 0] >= 0) == is_sample).all()
    of_mined, of_drawn = (scores_TC[is_sample].gather(1, found[is_sample]) for found in (mined, drawn))
    assert (of_mined.min(dim=1).values >= of_drawn.max(dim=1).values - 1e-6).float().mean() > 0.5
    assert of_mined.mean() > of_drawn.mean() + 0.1


def test_the_rule_leaves_out_candidates_near_the_positive(bed: Bed) -> None:
    run = trained(bed, Cell(ids=True))
    with torch.no_grad():
        queries, targets = run.towers.queries(bed.queries), run.towers.targets(bed.targets)
    mined_TK, _ = mine(run, 4, 0.05)
    left_out = 0
    for row in range(VARIANTS * ITEMS):
        scores = queries[6 * (row // VARIANTS) + row % VARIANTS] @ targets.T
        limit = scores[row] - 0.05 * scores[row].abs()
        assert all(scores[content] <= limit + 1e-6 for content in mined_TK[row] if content >= 0)
        left_out += int(scores.argmax() != row)
    assert left_out  # some queries have other targets above their own


def test_a_soup_is_the_mean_of_its_parents(bed: Bed) -> None:
    first, second = (Run(bed, short(Cell()), seed).towers.state_dict() for seed in (0, 1))
    mean = mean_of([first, second])
    assert torch.allclose(mean["query.0.bias"], (first["query.0.bias"] + second["query.0.bias"]) / 2)
    alone = train_any(bed, SoupCell(ids=True, batch=32, steps=40, temperatures=(0.05,)), 0)
    assert isinstance(alone, evidence_training.SoupOutcome)
    assert alone.hits == alone.parents[0]


def test_parents_differ_in_their_order_and_have_the_same_data(bed: Bed) -> None:
    cell, start = short(Cell(untoned=0.5)), trained(bed, Cell(untoned=0.5))
    runs = [Run(bed, cell, 0, start, order) for order in (0, 1)]
    assert (runs[0].is_toned == runs[1].is_toned).all()
    assert all(torch.equal(*pair) for pair in zip(*(run.towers.parameters() for run in runs), strict=True))
    for run in runs:
        run.advance(3)
    assert not torch.equal(runs[0].towers.query[0].weight, runs[1].towers.query[0].weight)


def test_a_run_with_mined_negatives_is_a_plain_run_before_it_mines(bed: Bed) -> None:
    cell = MinedCell(ids=True, batch=32, steps=40, mined=4)
    mined = train_any(bed, cell, 0)
    assert isinstance(mined, evidence_training.MinedOutcome)
    assert (mined.mined, mined.false) == (4, 0)  # all captions name the tone
    plain = Cell(ids=True, batch=32, steps=40)
    assert mined.scores != train_any(bed, plain, 0).scores


def test_a_verdict_compares_two_intervals() -> None:
    up, down, open_ = "**+2.0 [+1.0, +3.0]**", "**-2.0 [-3.0, -1.0]**", "+0.5 [-1.0, +2.0]"
    assert verdict(up, up) == verdict(down, down) == "carries over"
    assert (verdict(up, down), verdict(up, open_)) == ("reverses", "first only")
    assert (verdict(open_, down), verdict(open_, open_)) == ("here only", "not shown")
    assert verdict(up, "**+1.8 [+0.0, +3.6]**") == "carries over"  # rounded: 0 is outside


def test_the_tables_of_a_report_are_read() -> None:
    report = Path(__file__).with_name("evidence.md").read_text("utf-8")
    found = read_tables(report)
    assert found["published", "rule alone", "hard"] == "**-5.7 [-10.5, -0.7]**"
    assert found["best", "rule alone", "duplicates"] == "-0.4 [-1.6, +0.6]"
    assert ("best", "truth over ids", "hard") not in found
    assert found["published", "0.1 instead of 0.02, alpha 9", "false"] == "**+10.7 [+6.2, +15.2]**"


@pytest.mark.parametrize("name", CORPORA)
def test_a_report_says_what_was_registered(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence_runs, "_DRAWS", 20)
    corpus = CORPORA[name]
    run = {"hits": "ff" * 100, "cpu_s": 1.0, "found": None, "lost": None, "temperature": 0.02}
    run["scores"] = dict.fromkeys(("spec", "map", "ndcg", "classes"), 1.0)
    best = dict.fromkeys(corpus.core(), 0.1)
    tested = {(cell.key(), seed): run for cell, seed in to_test(corpus, best, 2)}
    lines = report(Results(corpus, tested, best, 2), f"evidence_{name}").splitlines()
    assert "| hardness alone |" + " +0.0 [+0.0, +0.0] |" * len(corpus.contents) in lines
    assert f"{len(tested)} runs, {len(tested) / 60:.0f} CPU minutes." in "\n".join(lines)
    written = Path(__file__).with_name("evidence.md" if name == "emoji" else f"evidence_{name}.md").read_text("utf-8")
    assert "\n".join(lines[lines.index("## What is not shown") :]) in written
    for line in lines:
        if line.startswith(("# ", "## ", "**Question", "**Design")):
            assert line in written
        if line.startswith("**Registered"):
            assert line.replace("has 2 of", f"has {SEEDS} of") in written


def test_best_temperatures_are_those_of_most_hits_on_other_seeds() -> None:
    some = {"hits": "f0" + "00" * 37}
    right = {
        (replace(cell, temperature=temperature).key(), seed): {"hits": "ff" * 38}
        if temperature in (0.05, 0.2)
        else some
        for cell in EMOJI.core().values()
        for temperature in TEMPERATURES
        for seed in EMOJI.tuning_seeds
    }
    assert set(best_temperatures(EMOJI, right).values()) == {0.05}  # the lower one of two
    assert {key for key, _ in right} == {cell.key() for cell, _ in to_tune(EMOJI)}
    assert all(seed >= TUNING for _, seed in to_tune(EMOJI))
