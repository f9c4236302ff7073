"""Which held-out samples a run is scored on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.training.held_out import HeldOutSamples, choose_samples
from jobs.training.specs import TrainSpec
from pipelines.feed.reader import Reader
from pipelines.plan.build import build_plan
from pipelines.storage.location import open_store
from tests.data import ColourEncoder, publish

SOURCES = {"red": ("a", 24), "blue": ("b", 24)}


def spec_of(tmp_path: Path, **changes: Any) -> TrainSpec:
    fields: dict[str, Any] = {
        "kind": "train",
        "name": "r",
        "run": {"root": str(tmp_path / "runs")},
        "data": {"root": str(tmp_path / "data")},
        "model": {"backbone": "some/model"},
        "global_batch": 4,
        "eval": {"samples": 5},
    }
    return TrainSpec.model_validate(fields | changes)


def chosen(spec: TrainSpec) -> HeldOutSamples | None:
    plan = build_plan(Reader(spec.data).tables(), spec.data.mixture, global_batch=4, steps=3, epochs=1, seed=0)
    return choose_samples(spec, plan)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    store = open_store(str(tmp_path / "data"))
    publish(store, SOURCES)
    publish(store, {"red": ("a", 12), "green": ("c", 9), "blue": ("b", 3)}, {"red": {4}}, split="held_out")
    return tmp_path


def test_samples_are_spread_over_the_sources_that_are_trained_on(data: Path) -> None:
    samples = chosen(spec_of(data))
    assert samples is not None
    assert samples.rows == {"red": (0, 2, 4, 7, 9), "blue": (0, 1, 2)}
    assert samples.every_steps == 200  # those of checkpoints
    assert str(samples) == "8 held-out samples of 2 sources, every 200 steps"
    red = {"root": str(data / "data"), "mixture": {"weights": {"red": 1}}}
    only_red = chosen(spec_of(data, data=red, eval={"every_steps": 7, "samples": 100}))
    assert only_red is not None
    assert (list(only_red.rows), len(only_red.rows["red"]), only_red.every_steps) == (["red"], 12, 7)


def test_workers_share_the_samples_and_bad_ones_are_left_out(data: Path) -> None:
    samples = chosen(spec_of(data))
    assert samples is not None
    encoder = ColourEncoder(refused={7})
    shares = [samples.read(encoder, rank, 2) for rank in range(2)]
    assert [sorted([*(shares[0][name].rows), *(shares[1][name].rows)]) for name in ("red", "blue")] == [
        [0, 2, 9],  # 4 cannot be decoded, 7 cannot be encoded
        [0, 1, 2],
    ]
    alone = samples.read(encoder, 0, 1)
    pairs: Any = alone["red"].samples
    assert (list(alone["red"].rows), len(pairs)) == ([0, 2, 9], 3)
    many = samples.read(encoder, 3, 4)
    assert (many["blue"].rows, many["blue"].samples) == ((), None)


@pytest.mark.parametrize("changes", [{"eval": None}, {"data": {"split": "held_out"}}, {}])
def test_without_a_held_out_split_there_are_no_scores(tmp_path: Path, changes: dict[str, Any]) -> None:
    store = open_store(str(tmp_path / "data"))
    publish(store, SOURCES)
    if changes:
        publish(store, SOURCES, split="held_out")
    if "data" in changes:
        changes = {"data": {"root": str(tmp_path / "data"), **changes["data"]}}
    assert chosen(spec_of(tmp_path, **changes)) is None


def test_scores_are_no_part_of_what_makes_two_runs_different() -> None:
    from jobs.training.kind import TRAIN

    assert "eval" not in TRAIN.science(spec_of(Path("x")).model_dump(mode="json"))
