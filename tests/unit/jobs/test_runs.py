import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.training.checkpoints import Checkpoints
from jobs.training.runs import LATEST, METRICS, Run, parse_rows
from jobs.training.specs import TrainSpec
from pipelines.config import FeedConfig
from pipelines.errors import UserError
from pipelines.feed.batch import ResumePoint
from pipelines.feed.feed import RESUME, PlannedFeed
from pipelines.plan.types import MixturePhase
from pipelines.storage.store import Store
from rzen.training.checkpoint_state import MOMENTS, PARAMETERS, CheckpointState

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


def checkpoints_of(run: Run) -> Checkpoints:
    """As a worker has them that starts now."""
    return Checkpoints(run, run.resume_point())


def step_of(folder: Path) -> int:
    return int(json.loads((folder / "state.json").read_text())["step"])


def publish(checkpoints: Checkpoints, scratch: Path, step: int, accuracy: float = 0.5) -> None:
    """A checkpoint after `step` steps; those since the one before had this accuracy, and one more has been done."""
    folder = scratch / f"s{step}"
    folder.mkdir()
    state = CheckpointState(step, step, "plan", {PARAMETERS: "p", MOMENTS: "m"})
    (folder / "state.json").write_text(state.to_json())
    done = [row for row in checkpoints.metrics if row["step"] < step]
    checkpoints.metrics = done + [
        {"step": number, "loss": 1.0, "accuracy": accuracy, "skipped": 0} for number in range(len(done), step + 1)
    ]
    checkpoints.publish(folder, step)


def test_unfinished_run_of_equal_settings_is_continued(tmp_path: Path) -> None:
    assert make_run(tmp_path).begin(DATA)
    publish(checkpoints_of(make_run(tmp_path)), tmp_path, 3)
    changed = {"cluster": {"workers": 6}, "checkpoint": {"keep": 1}, "optim": {"zero_stage": 3}}  # not the science
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
    publish(checkpoints_of(make_run(tmp_path)), tmp_path, 3)
    changed = make_run(tmp_path, seed=1, run={"root": str(tmp_path), "overwrite": True})
    assert changed.begin(DATA)
    assert changed.step() == 0
    assert changed.store.list() == ["spec.json"]


def test_finished_run_is_left_alone_and_keeps_no_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.begin(DATA)
    checkpoints = checkpoints_of(run)
    publish(checkpoints, tmp_path, 2)
    run.finish({"steps": 2}, [{"step": 0, "loss": math.nan}, {"step": 1, "loss": 1.0}])
    assert not make_run(tmp_path).begin(DATA)
    assert run.store.list() == ["done.json", METRICS, "spec.json"]
    lines = run.store.read(METRICS)
    assert lines == b'{"loss": null, "step": 0}\n{"loss": 1.0, "step": 1}\n'
    assert math.isnan(parse_rows(lines, "metrics.jsonl")[0]["loss"])


def test_latest_checkpoint_brings_its_metrics_and_old_ones_go(tmp_path: Path) -> None:
    run = make_run(tmp_path, checkpoint={"keep": 2})
    run.begin(DATA)
    writer = checkpoints_of(run)
    assert writer.latest() is None
    for step in (5, 10, 15):
        publish(writer, tmp_path, step)
    assert {name.split("/")[1] for name in run.store.list("checkpoints")} == {"000010", "000015"}
    reader = checkpoints_of(run)
    folder = reader.latest()
    assert folder is not None
    assert step_of(folder) == 15
    assert [row["step"] for row in reader.metrics] == list(range(15))


def test_the_best_checkpoint_stays(tmp_path: Path) -> None:
    run = make_run(tmp_path, checkpoint={"keep": 1})
    run.begin(DATA)
    for step, accuracy in ((5, 0.5), (10, 0.7), (15, 0.6), (20, 0.65)):
        writer = checkpoints_of(run)  # as after a restart
        writer.latest()
        publish(writer, tmp_path, step, accuracy)
    assert {name.split("/")[1] for name in run.store.list("checkpoints")} == {"000010", "000020"}
    best = checkpoints_of(run).best()
    assert best is not None
    assert step_of(best) == 10
    publish(writer, tmp_path, 25, 0.9)
    assert checkpoints_of(run).best() is None
    assert {name.split("/")[1] for name in run.store.list("checkpoints")} == {"000025"}


def test_half_written_checkpoint_is_never_the_latest(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.begin(DATA)
    publish(checkpoints_of(run), tmp_path, 5)
    run.store.write("checkpoints/000010/parameters.safetensors", b"cut")  # killed before latest.json was written
    folder = checkpoints_of(run).latest()
    assert run.step() == 5
    assert folder is not None
    assert step_of(folder) == 5


def test_changes_of_the_mixture_are_kept_with_the_run(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.begin(DATA)
    assert (run.phases(), run.rows(run.resume_point())) == ([], [])
    phases = [MixturePhase(3, {"photos": 1.0, "pages": 0.25}), MixturePhase(6, {"photos": 0.5, "pages": 2.0})]
    for phase in phases:
        run.record(phase)
    publish(checkpoints_of(make_run(tmp_path)), tmp_path, 3)
    assert make_run(tmp_path).phases() == phases
    assert [row["step"] for row in make_run(tmp_path).rows(run.resume_point())] == [0, 1, 2]


class TwoSteps:
    """What a feed asks of a plan before it makes batches."""

    num_steps = 40
    sources = (SimpleNamespace(batch=4),)

    def check_world_size(self, world_size: int) -> None:
        assert world_size == 2


def feed_of(run: Run) -> PlannedFeed:
    return PlannedFeed(TwoSteps(), None, run.resume_point, FeedConfig())  # type: ignore[arg-type]


def test_feed_and_learner_resume_from_one_checkpoint_though_another_appears(tmp_path: Path) -> None:
    """A worker that was believed dead may publish a last checkpoint while the next group of workers starts."""
    run = make_run(tmp_path, checkpoint={"keep": 3})
    run.begin(DATA)
    late = checkpoints_of(run)
    publish(late, tmp_path, 5)

    feed = feed_of(run)
    ranks = [shards[RESUME] for shards in feed.configure([RESUME], 2)]
    assert ranks == [ResumePoint(5, "checkpoints/000005")] * 2
    publish(late, tmp_path, 10)
    learner = Checkpoints(run, ranks[0]).latest()
    assert learner is not None
    first_of_feed = feed._spans(2)[0][0]
    assert (step_of(learner), first_of_feed) == (5, 5)
    # The planted fault: whoever reads again gets another step.
    again = checkpoints_of(run).latest()
    assert again is not None
    assert (step_of(again), feed_of(run)._spans(2)[0][0]) == (10, 10)


def test_the_step_is_that_of_the_checkpoint_and_not_of_what_names_it(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.begin(DATA)
    publish(checkpoints_of(run), tmp_path, 5)
    latest = json.loads(run.store.read(LATEST))
    assert "step" not in latest
    run.store.write(LATEST, json.dumps(latest | {"step": 99}).encode())  # as older versions did
    assert run.resume_point() == ResumePoint(5, "checkpoints/000005")


def test_a_named_checkpoint_that_is_not_there_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.begin(DATA)
    publish(checkpoints_of(run), tmp_path, 5)
    run.store.delete_tree("checkpoints/000005")
    with pytest.raises(UserError, match=r"latest.json: names checkpoints/000005, which is not there; resume from anot"):
        run.resume_point()


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, checkpoint={"keep": 1})
    run.begin(DATA)
    writer = checkpoints_of(run)
    publish(writer, tmp_path, 5)
    kind: Any = type(run.store)
    read = kind.read

    def slow(store: Store, path: str) -> bytes:
        if path == "checkpoints/000005/state.json":
            publish(writer, tmp_path, 10)
        return bytes(read(store, path))

    monkeypatch.setattr(kind, "read", slow)
    assert run.resume_point() == ResumePoint(10, "checkpoints/000010")
