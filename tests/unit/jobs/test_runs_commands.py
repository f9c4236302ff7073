"""`rzen runs`, `rzen logs` and `rzen stop`, on folders of runs and a stand-in of Ray's job server."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import main
from jobs.runtime.lease import hold_lease
from jobs.training.listing import runs_below
from jobs.training.runs import FAILED, METRICS, STARTS, Run, to_lines
from jobs.training.specs import TrainSpec
from pipelines.storage.location import open_store
from tests.job_server import StandIn, stand_in


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_JOB_HEADERS"):
        monkeypatch.delenv(name, raising=False)
    with stand_in() as server:
        yield server


def make_run(root: str, name: str, events: tuple[str, ...], losses: tuple[float, ...] = ()) -> Run:
    settings: dict[str, Any] = {
        "kind": "train",
        "name": name,
        "data": {"root": "data"},
        "model": {"backbone": "some/model"},
    }
    run = Run(TrainSpec.model_validate(settings | {"run": {"root": root}}))
    run.store.ensure_bucket()
    run.begin({})
    for event in events:
        run.log(event)
    if losses:
        run.store.write(METRICS, to_lines({"step": step, "loss": loss} for step, loss in enumerate(losses)))
    return run


START = f"{STARTS} 0 of 20, 1 workers"


@pytest.mark.parametrize("place", ["local", "s3"])
def test_runs_are_listed_with_their_states(
    place: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    root = str(tmp_path / "deep")
    if place == "s3":
        monkeypatch.setenv("AWS_ENDPOINT_URL", request.getfixturevalue("s3_endpoint"))
        root = "s3://runs-commands/deep"
    make_run(root, "a-new", ())
    finished = make_run(root, "finished", (START, "finished"), (3.0, 2.0))
    scores: list[Any] = [{"step": 2 * n, "hit": hit, "seconds": 1.0, "sources": {}} for n, hit in enumerate((0.5, 0.4))]
    finished.finish({"sources": {}, "replaced": 0}, [{"step": 0, "loss": 3.0}, {"step": 1, "loss": 2.0}], scores)
    make_run(root, "broken", (START, f"{FAILED}: data: is gone"), (3.0,))
    make_run(f"{root}/sweep", "interrupted", (START,), (3.0, float("nan")))
    with hold_lease(make_run(root, "running", (START,), (3.0,) * 5000 + (1.25,)).store, 60, "trains"):
        assert main(["runs", root, "--json"]) == 0
        listed = json.loads(capsys.readouterr().out)
        assert main(["runs", root]) == 0
        table = capsys.readouterr().out.splitlines()
    assert {(run["name"], run["state"], run["step"], run["steps"], run["loss"]) for run in listed} == {
        ("a-new", "new", 0, None, None),
        ("finished", "finished", 2, 20, 2.0),
        ("broken", "failed", 1, 20, 3.0),
        ("interrupted", "interrupted", 2, 20, None),
        ("running", "running", 5001, 20, 1.25),
    }
    assert [run["folder"] for run in listed if run["name"] == "interrupted"] == [f"{root}/sweep/interrupted"]
    assert len(table) == 6
    (line,) = [line for line in table if line.startswith("finished")]
    assert line.split()[:6] == ["finished", "finished", "2/20", "2.0000", "40.0%", "50.0%"]
    (unscored,) = [run for run in listed if run["name"] == "broken"]
    assert (unscored["held_out"], unscored["best_held_out"]) == (None, None)


def test_a_folder_without_runs_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "spec.json").write_text("{}")  # of another program
    assert main(["runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: no runs\n"
    assert main(["runs", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert list(runs_below(open_store(str(tmp_path / "absent")))) == []
    assert main(["runs", str(tmp_path / "absent")]) == 1
    assert "absent: does not exist; name the folder of `run.root`" in capsys.readouterr().err


def test_the_log_of_a_run_is_printed_by_folder_and_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run("runs", "one", (START, f"{FAILED}: no"))
    for name in ("one", "runs/one", str(tmp_path / "runs/one")):
        assert main(["logs", name]) == 0
        out = capsys.readouterr().out
        assert [line.split("  ", 1)[1] for line in out.splitlines()] == [START, f"{FAILED}: no"]
    assert main(["logs", "one", "-f"]) == 1  # it has not finished


def test_the_log_of_a_run_at_work_is_followed_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(str(tmp_path), "one", (START,))
    monkeypatch.setattr("jobs.commands.runs._POLL_S", 0.05)
    began = threading.Event()

    def work() -> None:
        with hold_lease(run.store, 60, "trains"):
            began.set()
            time.sleep(0.3)
            run.finish({"sources": {}, "replaced": 0}, [])
            run.log("finished")

    worker = threading.Thread(target=work)
    worker.start()
    began.wait()
    assert main(["logs", run.store.url, "-f"]) == 0
    worker.join()
    assert [line.split("  ", 1)[1] for line in capsys.readouterr().out.splitlines()] == [START, "finished"]


def test_the_log_of_a_submitted_job_is_printed_or_followed(
    server: StandIn, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.runtime.follow._PAUSES_S", (0.05,))
    server.add("j", ["one\n", "one\ntwo\n"])
    assert main(["logs", "j", "--address", server.url]) == 0
    assert capsys.readouterr().out == "one\n"
    server.ends_with = {"status": "FAILED", "driver_exit_code": 3}
    assert main(["logs", "j", "-f", "--address", server.url]) == 3
    assert "one\ntwo\n" in capsys.readouterr().out
    assert main(["logs", "k", "--address", server.url]) == 1
    assert f"k: is not a job on {server.url}; name one of j" in capsys.readouterr().err
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    assert main(["logs", "stage"]) == 1
    assert "stage: is not a run in runs/, and RAY_ADDRESS=http://127.0.0.1:1: no Ray" in capsys.readouterr().err
    assert main(["logs", "no/run"]) == 1
    assert "no/run: is not the folder of a run; `rzen runs FOLDER` lists" in capsys.readouterr().err


def test_a_submitted_job_is_stopped_once(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    server.add("j", ["one\n"])
    assert main(["stop", "j", "--address", server.url]) == 0
    assert server.jobs["j"]["status"] == "STOPPED"
    assert capsys.readouterr().out == "j stopped\n"
    assert main(["stop", "j", "--address", server.url]) == 0
    assert "j has ended before: stopped" in capsys.readouterr().out
    assert main(["stop", "k", "--address", server.url]) == 1
    assert f"k: is not a job on {server.url}; name one of j" in capsys.readouterr().err


def test_stop_says_how_a_run_of_this_machine_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(str(tmp_path), "one", (START,))
    assert main(["stop", run.store.url]) == 1
    assert "is a run that nobody trains at present; there is nothing to stop" in capsys.readouterr().err
    with hold_lease(run.store, 60, "trains"):
        assert main(["stop", run.store.url]) == 1
    err = capsys.readouterr().err
    assert "press Ctrl-C there or give `kill " in err
    assert "is a run of process" in err
