"""Rows reach every tracker once, also after a restart; one that fails is told and ends nothing."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from jobs.training import tracking
from jobs.training.runs import METRICS, Run, read_held_out, read_rows
from jobs.training.tracking import TENSORBOARD, UNTRACKED, Tracker, check_tracking, scalars
from pipelines.errors import UserError
from tests.unit.jobs.test_runs import DATA, make_run

ROWS: list[dict[str, Any]] = [
    {"step": step, "source": ("pages", "photos")[step % 2], "task": "a", "loss": 2.0 - step, "skipped": 0}
    for step in range(5)
]


def score(step: int) -> dict[str, Any]:
    found = {"hit": step / 10, "candidates": 9, "queries": [], "ranks": [], "found": []}
    return {"step": step, "hit": step / 5, "seconds": 0.1, "sources": {"photos": found}}


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "EVERY_S", 0.05)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # what its small package has
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))


def begun(tmp_path: Path, **config: Any) -> Run:
    run = make_run(tmp_path / "runs", run={"root": str(tmp_path / "runs"), "tracking": config})
    assert run.begin(DATA)
    return run


def until(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_rows_are_there_while_the_run_goes_on_and_once_after_a_restart(tmp_path: Path) -> None:
    run = begun(tmp_path)
    tracker = Tracker(run, [])
    for row in ROWS[:3]:
        tracker.log(row)
    until(lambda: run.store.exists(METRICS) and len(read_rows(run.store, METRICS)) == 3)
    tracker.close()
    again = Tracker(run, ROWS[:2])  # the checkpoint had two steps: the third is repeated
    for row in ROWS[2:]:
        again.log(row)
    again.close()
    assert read_rows(run.store, METRICS) == ROWS
    assert not run.store.exists(UNTRACKED)
    events = tensorboard_events(tmp_path / "runs" / "r" / TENSORBOARD)
    assert events["loss/_all"] == {step: 2.0 - step for step in range(5)}
    assert events["loss/photos"] == {1: 1.0, 3: -1.0}


def test_held_out_scores_are_kept_with_the_step_that_they_were_taken_after(tmp_path: Path) -> None:
    run = begun(tmp_path)
    tracker = Tracker(run, [])
    for row in (score(0), *ROWS[:2], score(2), *ROWS[2:4], score(4)):
        tracker.log(row)
    tracker.close()
    again = Tracker(run, ROWS[:2], [score(0), score(2)])  # resumes after two steps
    for row in (*ROWS[2:4], score(4)):
        again.log(row)
    again.close()
    assert read_held_out(run.store) == [score(0), score(2), score(4)]
    assert read_rows(run.store, METRICS) == ROWS[:4]
    events = tensorboard_events(tmp_path / "runs" / "r" / TENSORBOARD)
    assert events["held_out/_all"] == pytest.approx({0: 0.0, 2: 0.4, 4: 0.8})
    assert events["held_out/photos"] == pytest.approx({0: 0.0, 2: 0.2, 4: 0.4})
    # TensorBoard drops what it has from step 2 on when the run resumes: the score is there once more.
    (_, second) = sorted((tmp_path / "runs" / "r" / TENSORBOARD).glob("events*"))
    assert set(tensorboard_events(second.parent, second.name)["held_out/_all"]) == {2, 4}


def tensorboard_events(folder: Path, names: str = "events*") -> dict[str, dict[int, float]]:
    """Tag -> step -> value, in the order of the files. A record: length, checksum, event, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, dict[int, float]] = {}
    for path in sorted(folder.glob(names)):
        content = path.read_bytes()
        at = 0
        while at < len(content):
            size = int.from_bytes(content[at : at + 8], "little")
            event = Event.FromString(content[at + 12 : at + 12 + size])
            at += size + 16
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_mlflow_has_one_run_with_settings_however_often_it_is_started(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"file:{tmp_path}/mlflow"
    run = begun(tmp_path, mlflow=uri, project="factory", tensorboard=False)
    for before, rows in (([], ROWS[:3]), (ROWS[:3], [*ROWS[3:], {**ROWS[0], "step": 5, "loss": math.nan}])):
        tracker = Tracker(run, before)
        for row in rows:
            tracker.log(row)
        tracker.close()
    client = MlflowClient(uri)
    (found,) = client.search_runs([client.get_experiment_by_name("factory").experiment_id])
    history = client.get_metric_history(found.info.run_id, "loss/_all")
    assert [(metric.step, metric.value) for metric in history[:5]] == [(step, 2.0 - step) for step in range(5)]
    assert math.isnan(history[5].value)
    assert found.data.params["optim.lr"] == "0.0002"
    assert found.info.status == "FINISHED"
    assert not run.store.exists(UNTRACKED)


def test_wandb_takes_every_row(tmp_path: Path) -> None:
    run = begun(tmp_path, wandb=True, tensorboard=False)
    tracker = Tracker(run, [])
    for row in ROWS:
        tracker.log(row)
    tracker.close()
    assert not run.store.exists(UNTRACKED)
    (logged,) = (tmp_path / "wandb").glob(f"offline-run-*-{run.id}/run-{run.id}.wandb")
    until(lambda: logged.read_bytes().count(b"loss/photos") >= 2)  # a process of W&B writes it
    assert b"global_batch" in logged.read_bytes()


def test_a_tracker_that_fails_is_told_and_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "mlflow").write_text("no folder")
    run = begun(tmp_path, mlflow=f"file:{tmp_path}/mlflow")
    tracker = Tracker(run, [])
    for row in ROWS:
        tracker.log(row)
    tracker.close()
    assert run.store.read(UNTRACKED).decode().startswith("MLflow: 5 steps not handed over: ")
    assert [json.loads(line)["step"] for line in run.store.read(METRICS).splitlines()] == [0, 1, 2, 3, 4]


def test_a_package_that_is_missing_is_told_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_run(Path("x"), run={"root": "x", "tracking": {"wandb": True}}).spec.run.tracking
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"run.tracking.wandb: is not installed; pip install 'rzen\[tracking\]'"):
        check_tracking(config)


def test_numbers_are_told_by_source_too() -> None:
    row = {"step": 3, "source": "pages", "task": "a", "loss": 1.5, "skipped": 0}
    assert scalars(row) == {"loss/_all": 1.5, "loss/pages": 1.5, "skipped/_all": 0.0, "skipped/pages": 0.0}
