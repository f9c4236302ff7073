import math
from pathlib import Path
from typing import Any

import pytest

from jobs.training.runs import METRICS, Checkpoints, Run, read_rows
from jobs.training.specs import TrainSpec
from pipelines.errors import UserError
from pipelines.plan.types import MixturePhase

DATA = {"data": "d1", "sources": {"photos": {"members": {"photos": 40}, "tables": "t1"}}}
OTHER_DATA = {"data": "d1", "sources": {"photos": {"members": {"photos": 39}, "tables": "t1"}}}


def make_run(root: Path, **changes: Any) -> Run:
    fields: dict[str, Any] = {
        "kind": "train",
        "name": "r",
        "run": {"root": str(root)},
        "data": {"root": "data"},
        "model": {"backbone": "some/model"},
    }
    return Run(TrainSpec.model_validate(fields | changes))


def publish(checkpoints: Checkpoints, scratch: Path, step: int, accuracy: float = 0.5) -> None:
    """A checkpoint after `step` steps; those since the one before had this accuracy, and one more has been done."""
    folder = scratch / f"s{step}"
    folder.mkdir()
    (folder / "state.json").write_text(str(step))
    done = [row for row in checkpoints.metrics if row["step"] < step]
    checkpoints.metrics = done + [
        {"step": number, "loss": 1.0, "accuracy": accuracy, "skipped": 0} for number in range(len(done), step + 1)
    ]
    checkpoints.publish(folder, step)


def test_unfinished_run_of_equal_settings_is_continued(tmp_path: Path) -> None:
    assert make_run(tmp_path).begin(DATA)
    publish(Checkpoints(make_run(tmp_path)), tmp_path, 3)
    changed = {"cluster": {"workers": 7}, "checkpoint": {"keep": 1}, "optim": {"zero_stage": 3}}  # not the science
    assert make_run(tmp_path, **changed).begin(DATA)
    assert make_run(tmp_path).step() == 3


@pytest.mark.parametrize(
    ("changes", "data", "told"),
    [
        ({"optim": {"lr": 1e-3}}, DATA, "optim.lr 0.0002 -> 0.001"),
        ({"seed": 5}, DATA, "seed 0 -> 5"),
        ({}, OTHER_DATA, "plan.sources.photos.members.photos 40 -> 39"),
        ({"objective": {"false_negatives": None}}, DATA, "objective.false_negatives"),
    ],
)
def test_run_of_other_settings_is_refused_and_they_are_named(
    tmp_path: Path, changes: dict[str, Any], data: dict[str, Any], told: str
) -> None:
    make_run(tmp_path).begin(DATA)
    with pytest.raises(UserError) as caught:
        make_run(tmp_path, **changes).begin(data)
    assert told in str(caught.value)
    assert "choose another name, or set run.overwrite: true" in str(caught.value)


def test_log_keeps_its_lines_in_order(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.begin(DATA)
    run.log("starts")
    make_run(tmp_path).log("finished")
    assert [line.split("  ", 1)[1] for line in run.store.read("log.txt").decode().splitlines()] == [
        "starts",
        "finished",
    ]


def test_overwrite_begins_anew(tmp_path: Path) -> None:
    make_run(tmp_path).begin(DATA)
    publish(Checkpoints(make_run(tmp_path)), tmp_path, 3)
    changed = make_run(tmp_path, seed=1, run={"root": str(tmp_path), "overwrite": True})
    assert changed.begin(DATA)
    assert changed.step() == 0
    assert changed.store.list() == ["spec.json"]


def test_finished_run_is_left_alone_and_keeps_no_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.begin(DATA)
    checkpoints = Checkpoints(run)
    publish(checkpoints, tmp_path, 2)
    run.finish({"steps": 2}, [{"step": 0, "loss": math.nan}, {"step": 1, "loss": 1.0}])
    assert not make_run(tmp_path).begin(DATA)
    assert run.store.list() == ["done.json", METRICS, "spec.json"]
    lines = run.store.read(METRICS)
    assert lines == b'{"loss": null, "step": 0}\n{"loss": 1.0, "step": 1}\n'
    assert math.isnan(read_rows(lines)[0]["loss"])


def test_latest_checkpoint_brings_its_metrics_and_old_ones_go(tmp_path: Path) -> None:
    run = make_run(tmp_path, checkpoint={"keep": 2})
    run.begin(DATA)
    writer = Checkpoints(run)
    assert writer.latest() is None
    for step in (5, 10, 15):
        publish(writer, tmp_path, step)
    assert {name.split("/")[1] for name in run.store.list("checkpoints")} == {"000010", "000015"}
    reader = Checkpoints(run)
    folder = reader.latest()
    assert folder is not None
    assert (folder / "state.json").read_text() == "15"
    assert [row["step"] for row in reader.metrics] == list(range(15))


def test_the_best_checkpoint_stays(tmp_path: Path) -> None:
    run = make_run(tmp_path, checkpoint={"keep": 1})
    run.begin(DATA)
    for step, accuracy in ((5, 0.5), (10, 0.7), (15, 0.6), (20, 0.65)):
        writer = Checkpoints(run)  # as after a restart
        writer.latest()
        publish(writer, tmp_path, step, accuracy)
    assert {name.split("/")[1] for name in run.store.list("checkpoints")} == {"000010", "000020"}
    best = Checkpoints(run).best()
    assert best is not None
    assert (best / "state.json").read_text() == "10"
    publish(writer, tmp_path, 25, 0.9)
    assert Checkpoints(run).best() is None
    assert {name.split("/")[1] for name in run.store.list("checkpoints")} == {"000025"}


def test_half_written_checkpoint_is_never_the_latest(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.begin(DATA)
    publish(Checkpoints(run), tmp_path, 5)
    run.store.write("checkpoints/000010/parameters.safetensors", b"cut")  # killed before latest.json was written
    folder = Checkpoints(run).latest()
    assert run.step() == 5
    assert folder is not None
    assert (folder / "state.json").read_text() == "5"


def test_changes_of_the_mixture_are_kept_with_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.begin(DATA)
    assert (run.phases(), run.rows()) == ([], [])
    phases = [MixturePhase(3, {"photos": 1.0, "pages": 0.25}), MixturePhase(6, {"photos": 0.5, "pages": 2.0})]
    for phase in phases:
        run.record(phase)
    publish(Checkpoints(make_run(tmp_path)), tmp_path, 3)
    assert make_run(tmp_path).phases() == phases
    assert [row["step"] for row in make_run(tmp_path).rows()] == [0, 1, 2]
