"""The test bed of the evidence: arms that must be the same run are, the truth is the truth, and seeds share no test."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from rzen.evaluation.ablation import paired_interval
from tests.benchmarks import evidence
from tests.benchmarks.evidence_bed import TONES, TUNING, Bed, Cell, OracleBatch, TruthIdentity, held_out_tones, train

EMOJI = 24


@pytest.fixture(scope="module")
def bed() -> Bed:
    torch.manual_seed(0)
    tones = torch.randn(TONES, 16)
    pictures = (torch.randn(EMOJI, 1, 16) + 0.5 * tones).reshape(-1, 16)
    words = torch.eye(EMOJI + TONES)
    rows = [
        torch.cat([words[[e]] + words[EMOJI:], words[[e]]])  # with each tone, and without one
        for e in range(EMOJI)
    ]
    return Bed(pictures, normalize(torch.cat(rows), dim=1))


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
    tested = {(e, int(t)) for seed in range(12) for e, t in enumerate(held_out_tones(50, seed))}
    tuned = {(e, int(t)) for seed in (TUNING, TUNING + 1) for e, t in enumerate(held_out_tones(50, seed))}
    assert tested
    assert tuned
    assert not tested & tuned


def test_the_interval_is_that_of_students_t_where_only_seeds_differ() -> None:
    by_seed = np.random.default_rng(1).normal(0.1, 0.05, 12)
    mean, low, high = evidence.interval(np.repeat(by_seed[:, None], 40, axis=1))
    expected = paired_interval(by_seed.tolist())
    assert mean == pytest.approx(expected[0])
    assert (high - low) == pytest.approx(expected[2] - expected[1], rel=0.2)  # the bootstrap is a little narrower


def test_all_contrasts_are_of_cells_that_run() -> None:
    cells = evidence.core()
    for contrast in evidence.CONTRASTS:
        assert sum(contrast.parts.values()) == 0
        assert any(all((bed, *part) in cells for part in contrast.parts) for bed in evidence.BEDS)
    assert len({cell.key() for cell in cells.values()}) == len(cells)


def test_half_a_line_of_a_killed_command_is_done_again(tmp_path: Path) -> None:
    cell = Cell()
    run = {"cell": cell.key(), "seed": 3, "hits": "ff" * 38}
    (tmp_path / "runs.jsonl").write_text(json.dumps(run) + "\n" + json.dumps(run)[:20])
    assert list(evidence.do(tmp_path, [(cell, 3)])) == [(cell.key(), 3)]
    assert evidence._hits(run).sum() == 304
