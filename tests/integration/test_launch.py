"""Runs side by side: the queue, and what becomes of the others when one fails. Training itself is left out."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import jobs.runtime.lease
import jobs.training.launch
from jobs.runtime.lease import LEASE
from jobs.training.fit import Prepared
from jobs.training.launch import launch
from jobs.training.runs import DONE, Run
from jobs.training.specs import TrainSpec
from pipelines.errors import UserError
from pipelines.storage.location import open_store
from tests.data import publish

pytestmark = pytest.mark.ray


def specs(tmp_path: Path, names: str, **cluster: Any) -> list[TrainSpec]:
    publish(open_store(str(tmp_path / "data")), {"red": ("a", 24)})
    fields: dict[str, Any] = {
        "kind": "train",
        "run": {"root": str(tmp_path / "runs")},
        "data": {"root": str(tmp_path / "data")},
        "feed": {"cpus_per_task": 0.5},
        "model": {"backbone": {"vocabulary": 400}, "dtype": "float32"},
        "global_batch": 4,
        "steps": 3,
        "cluster": {"cpus_per_worker": 1.0} | cluster,
    }
    return [TrainSpec.model_validate(fields | {"name": name}) for name in names.split()]


class Fits:
    """In place of `fit`: ends runs in the order of their names' numbers, and fails those that begin with `bad`."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.at_once: list[int] = []
        self._running = 0
        self._lock = threading.Lock()

    def __call__(self, prepared: Prepared, board: Any, tell: Any, abandoned: threading.Event) -> None:
        name = prepared.run.spec.name
        with self._lock:
            self._running += 1
            self.started.append(name)
            self.at_once.append(self._running)
        time.sleep(0.2)
        with self._lock:
            self._running -= 1
        if name.startswith("bad"):
            raise UserError(name, "is lost", "give it up")
        prepared.run.store.write(DONE, b"{}")


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch, ray_cluster: None) -> Fits:
    fits = Fits()
    monkeypatch.setattr(jobs.training.launch, "fit", fits)
    return fits


def test_runs_wait_in_their_order_for_room(tmp_path: Path, fits: Fits) -> None:
    """Four CPUs hold three runs of one CPU beside half a CPU for the feed."""
    assert launch(specs(tmp_path, "r1 r2 r3 r4 r5"), max_parallel=5) == {}
    assert fits.started == ["r1", "r2", "r3", "r4", "r5"]
    assert max(fits.at_once) == 3


def test_no_more_run_at_once_than_are_wanted(tmp_path: Path, fits: Fits) -> None:
    launch(specs(tmp_path, "r1 r2 r3 r4"), max_parallel=2)
    assert max(fits.at_once) == 2


def test_on_a_cluster_that_can_grow_runs_do_not_wait_for_room(tmp_path: Path, fits: Fits) -> None:
    launch(specs(tmp_path, "r1 r2 r3 r4 r5", autoscaling=True), max_parallel=5)
    assert max(fits.at_once) == 5


def test_the_others_go_on_when_enough_can_be_left(tmp_path: Path, fits: Fits) -> None:
    runs = specs(tmp_path, "r1 bad2 r3 r4")
    failures = launch(runs, max_parallel=1, min_survivors=3)
    assert {name: str(error) for name, error in failures.items()} == {"bad2": "bad2: is lost; give it up"}
    assert fits.started == ["r1", "bad2", "r3", "r4"]

    known = {"bad2": Run(runs[1]).id}
    assert launch(runs, max_parallel=1, min_survivors=3, failed_before=known) == {}
    assert len(fits.started) == 4  # nothing is done twice, and what has failed is not tried again
    assert list(launch(runs, max_parallel=1, min_survivors=3)) == ["bad2"]  # unless one asks for it


def test_the_job_ends_as_soon_as_too_few_can_be_left(tmp_path: Path, fits: Fits) -> None:
    with pytest.raises(UserError, match="bad1: failed permanently: bad1: is lost; so did bad2; give it up; the same"):
        launch(specs(tmp_path, "bad1 bad2 r3 r4"), max_parallel=1, min_survivors=3)
    assert fits.started == ["bad1", "bad2"]


def test_survivors_that_have_failed_before_are_missed_at_once(tmp_path: Path, fits: Fits) -> None:
    runs = specs(tmp_path, "bad1 r2")
    launch(runs, max_parallel=1, min_survivors=1)
    with pytest.raises(
        UserError,
        match="bad1: failed permanently in an earlier launch: at least 2 runs must succeed; set retry_failed: true",
    ):
        launch(runs, max_parallel=1, min_survivors=2, failed_before={"bad1": Run(runs[0]).id})


def test_a_run_that_begins_anew_is_tried_again(tmp_path: Path, fits: Fits) -> None:
    (run,) = specs(tmp_path, "bad1")
    with pytest.raises(UserError, match=r"^bad1: is lost"):
        launch([run], max_parallel=1)
    known = {"bad1": Run(run).id}
    anew = run.model_copy(update={"steps": 2, "run": run.run.model_copy(update={"overwrite": True})})
    with pytest.raises(UserError, match=r"^bad1: is lost"):
        launch([anew], max_parallel=1, failed_before=known)
    assert fits.started == ["bad1", "bad1"]


def test_an_error_that_is_nobodys_mistake_is_not_taken_for_a_lost_run(
    tmp_path: Path, fits: Fits, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(jobs.training.launch, "fit", broken)
    with pytest.raises(ZeroDivisionError):
        launch(specs(tmp_path, "r1 r2"), max_parallel=2, min_survivors=1)


def test_a_run_whose_lease_another_process_has_taken_is_abandoned(
    tmp_path: Path, fits: Fits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two RayJobs that train one run, one goes on (ray#35006, kuberay#5211)."""
    monkeypatch.setattr(jobs.runtime.lease, "LEASE_S", 3.0)
    ended: list[bool] = []

    def robbed(prepared: Prepared, board: Any, tell: Any, abandoned: threading.Event) -> None:
        store = prepared.run.store
        content = json.loads(store.read(LEASE)) | {"holder": "another", "machine": "another"}
        store.write(LEASE, json.dumps(content).encode())
        ended.append(abandoned.wait(30))

    monkeypatch.setattr(jobs.training.launch, "fit", robbed)
    with pytest.raises(UserError, match=r"runs/r1/lease\.json: was taken by another process"):
        launch(specs(tmp_path, "r1"), max_parallel=1)
    deadline_s = time.monotonic() + 30
    while not ended:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    assert ended == [True]
