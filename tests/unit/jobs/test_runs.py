import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.training.checkpoints import Checkpoints
from jobs.training.runs import LATEST, METRICS, SPEC, Run, parse_rows
from jobs.training.specs import TrainSpec
from pipelines.config import FeedConfig
from pipelines.errors import TakenError, UserError
from pipelines.feed.batch import ResumePoint
from pipelines.feed.feed import RESUME, PlannedFeed
from pipelines.plan.types import MixturePhase
from pipelines.storage.publish import MARK, publish_folder
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


def steps_kept(run: Run) -> list[int]:
    """The steps of the checkpoints that are there."""
    return sorted({int(name.split("/")[1].split("-")[0]) for name in run.store.list("checkpoints")})


def publish(
    checkpoints: Checkpoints, scratch: Path, step: int, accuracy: float = 0.5, held_out: float | None = None
) -> None:
    """A checkpoint after `step` steps; those since the one before had this accuracy, and one more has been done."""
    folder = scratch / f"s{step}"
    folder.mkdir()
    spec = json.loads(checkpoints._store.read(SPEC))
    origin = {"run": spec["id"], "settings_sha256": spec["settings_sha256"]}
    state = CheckpointState(step, step, "plan", {PARAMETERS: "p", MOMENTS: "m"}, **origin)
    (folder / "state.json").write_text(state.to_json())
    done = [row for row in checkpoints.metrics if row["step"] < step]
    checkpoints.metrics = done + [
        {"step": number, "loss": 1.0, "accuracy": accuracy, "skipped": 0} for number in range(len(done), step + 1)
    ]
    if held_out is not None:
        checkpoints.held_out.append({"step": step, "hit": held_out, "seconds": 0.0, "sources": {}})
    checkpoints.publish(folder, step)


def test_unfinished_run_of_equal_settings_is_continued(tmp_path: Path) -> None:
    assert make_run(tmp_path).begin(DATA)
    publish(checkpoints_of(make_run(tmp_path)), tmp_path, 3)
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
        ({}, DATA | {"tables": {"candidates": "t2"}}, "plan.tables None -> {'candidates': 't2'}"),
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


def test_a_table_is_known_by_its_content_and_not_by_its_place(tmp_path: Path) -> None:
    data = DATA | {"tables": {"candidates": "t2"}}
    make_run(tmp_path, data={"root": "data", "candidates": "here", "curation": ["a"]}).begin(data)
    moved = make_run(tmp_path, data={"root": "data", "candidates": "there", "curation": ["b"]})
    assert moved.begin(data)
    with pytest.raises(UserError, match=r"plan\.tables\.candidates 't2' -> 't3'"):
        moved.begin(DATA | {"tables": {"candidates": "t3"}})


def test_a_run_of_an_earlier_version_without_some_settings_is_continued(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.begin(DATA)
    stored = json.loads(run.store.read(SPEC))
    for group, setting in (("objective", "tasks"), ("objective", "in_batch"), ("data", "negatives_draw")):
        del stored["spec"][group][setting]
    del stored["spec"]["model"]["lora"]["scope"]
    run.store.write(SPEC, json.dumps(stored).encode())
    assert make_run(tmp_path).begin(DATA)
    with pytest.raises(UserError, match=r"objective.in_batch True -> False"):
        make_run(tmp_path, objective={"in_batch": False}, data={"root": "data", "negatives_per_sample": 1}).begin(DATA)


@pytest.mark.parametrize(
    ("objective", "place"),
    [({"distillation": {}}, "objective"), ({"tasks": {"t": {"distillation": {}}}}, "objective.tasks.t")],
)
def test_distillation_needs_candidates(objective: dict[str, Any], place: str, tmp_path: Path) -> None:
    for data in ({"candidates": "table"}, {"negatives_per_sample": 2}):
        with pytest.raises(ValueError, match=rf"{place}\.distillation learns .* set data\.candidates and"):
            make_run(tmp_path, objective=objective, data={"root": "data"} | data)
    make_run(tmp_path, objective=objective, data={"root": "data", "candidates": "table", "negatives_per_sample": 2})


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
    assert changed.store.list() == [MARK, "spec.json"]


def test_finished_run_is_left_alone_and_keeps_no_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.begin(DATA)
    checkpoints = checkpoints_of(run)
    publish(checkpoints, tmp_path, 2)
    run.finish({"steps": 2}, [{"step": 0, "loss": math.nan}, {"step": 1, "loss": 1.0}])
    assert not make_run(tmp_path).begin(DATA)
    assert run.store.list() == ["done.json", METRICS, MARK, "spec.json"]
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
    assert steps_kept(run) == [10, 15]
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
    assert steps_kept(run) == [10, 20]
    best = checkpoints_of(run).best()
    assert best is not None
    assert step_of(best) == 10
    publish(writer, tmp_path, 25, 0.9)
    assert checkpoints_of(run).best() is None
    assert steps_kept(run) == [25]


def test_the_best_checkpoint_has_the_highest_held_out_score(tmp_path: Path) -> None:
    """Accuracy in the batches says the opposite. A checkpoint between two scores is not the best."""
    run = make_run(tmp_path, checkpoint={"keep": 1})
    run.begin(DATA)
    for step, accuracy, held_out in ((5, 0.5, None), (10, 0.6, 0.3), (15, 0.7, 0.2), (18, 0.99, None), (20, 0.9, 0.1)):
        writer = checkpoints_of(run)
        writer.latest()
        publish(writer, tmp_path, step, accuracy, held_out)
    assert steps_kept(run) == [10, 20]
    reader = checkpoints_of(run)
    reader.latest()
    assert [(row["step"], row["hit"]) for row in reader.held_out] == [(10, 0.3), (15, 0.2), (20, 0.1)]


def test_half_written_checkpoint_is_never_the_latest(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.begin(DATA)
    publish(checkpoints_of(run), tmp_path, 5)
    run.store.write("checkpoints/000010-0a/parameters.safetensors", b"cut")  # killed before latest.json was written
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
    assert ranks == [ResumePoint(5, json.loads(run.store.read(LATEST))["path"])] * 2
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
    assert run.resume_point() == ResumePoint(5, latest["path"])


def test_a_named_checkpoint_that_is_not_there_is_told(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.begin(DATA)
    publish(checkpoints_of(run), tmp_path, 5)
    run.store.delete_tree(run.resume_point().checkpoint)
    match = r"latest.json: names checkpoints/000005-\w{8}, which is not there; resume from another"
    with pytest.raises(UserError, match=match):
        run.resume_point()


def test_a_checkpoint_that_is_replaced_while_it_is_read_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, checkpoint={"keep": 1})
    run.begin(DATA)
    writer = checkpoints_of(run)
    publish(writer, tmp_path, 5)
    state_of_5 = f"{run.resume_point().checkpoint}/state.json"
    kind: Any = type(run.store)
    read = kind.read

    def slow(store: Store, path: str) -> bytes:
        if path == state_of_5:
            monkeypatch.setattr(kind, "read", read)
            publish(writer, tmp_path, 10)
        return bytes(read(store, path))

    monkeypatch.setattr(kind, "read", slow)
    assert run.resume_point().step == 10


def test_a_run_that_was_replaced_is_told_and_changes_nothing(tmp_path: Path) -> None:
    """Its driver is gone, and one of its workers lives on."""
    first = make_run(tmp_path)
    first.begin(DATA)
    late = checkpoints_of(first)
    publish(late, tmp_path, 5)
    second = make_run(tmp_path, seed=1, run={"root": str(tmp_path), "overwrite": True})
    second.begin(DATA)
    with pytest.raises(TakenError, match="holds another run by now"):
        publish(late, tmp_path, 10)
    assert second.step() == 0
    publish(checkpoints_of(second), tmp_path, 15)
    assert second.step() == 15
    assert not (steps_kept(second) == [10, 15] and second.resume_point().step == 10)


def test_a_pointer_that_another_run_wrote_late_is_not_followed(tmp_path: Path) -> None:
    first = make_run(tmp_path)
    first.begin(DATA)
    publish(checkpoints_of(first), tmp_path, 5)
    late = first.store.read(LATEST)
    second = make_run(tmp_path, seed=1, run={"root": str(tmp_path), "overwrite": True})
    second.begin(DATA)
    second.store.write(LATEST, late)
    assert second.step() == 0
    publish(checkpoints_of(second), tmp_path, 15)
    assert second.step() == 15


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.begin(DATA)
    publish(checkpoints_of(run), tmp_path, 5)
    place = f"{run.resume_point().checkpoint}/state.json"
    state = json.loads(run.store.read(place))
    run.store.write(place, json.dumps(state | {"settings_sha256": "other"}).encode())
    with pytest.raises(UserError, match=r"state.json: belongs to a run with other settings"):
        run.resume_point()


def test_the_newest_checkpoint_never_goes_back(tmp_path: Path) -> None:
    """A worker that was believed dead writes an older one."""
    run = make_run(tmp_path)
    run.begin(DATA)
    late, present = checkpoints_of(run), checkpoints_of(run)
    publish(present, tmp_path, 10)
    publish(late, tmp_path, 5)
    assert run.step() == 10
    publish(late, tmp_path, 15)
    assert run.step() == 15


def test_two_processes_write_checkpoints_of_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    run.begin(DATA)
    one, other = checkpoints_of(run), checkpoints_of(run)
    kind: Any = type(run.store)
    upload_tree = kind.upload_tree

    def overtaken(store: Store, folder: Path, path: str) -> None:
        monkeypatch.setattr(kind, "upload_tree", upload_tree)
        upload_tree(store, folder, path)
        publish(other, tmp_path / "other", 5)

    (tmp_path / "other").mkdir()
    monkeypatch.setattr(kind, "upload_tree", overtaken)
    publish(one, tmp_path, 5)
    folder = checkpoints_of(run).latest()
    assert folder is not None
    assert step_of(folder) == 5


def test_an_overwritten_run_keeps_its_result_and_files_of_others(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.begin(DATA)
    model = tmp_path / "model"
    model.mkdir()
    (model / "adapter.bin").write_bytes(b"old")
    publish_folder(model, run.store.child(run.result))
    run.store.write("notes.txt", b"mine")
    run.finish({"steps": 2}, [])
    changed = make_run(tmp_path, seed=1, run={"root": str(tmp_path), "overwrite": True})
    assert changed.begin(DATA)
    assert changed.store.read("notes.txt") == b"mine"
    assert changed.store.read(f"{run.result}/adapter.bin") == b"old"


def test_a_folder_of_others_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r/thesis.docx").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"r: holds files that rzen did not write: thesis.docx"):
        make_run(tmp_path, run={"root": str(tmp_path), "overwrite": True}).begin(DATA)
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["thesis.docx"]
