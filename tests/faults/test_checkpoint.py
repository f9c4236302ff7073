"""Checkpoints that are damaged or belong to another run, and runs that cannot go on: told, not trained through."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipelines.errors import TakenError, UserError
from rzen.config import LoraConfig, ObjectiveConfig, OptimConfig
from rzen.inputs.processor import Processor
from rzen.model.checkpoints import file_sha256
from rzen.training import checkpoint
from rzen.training.build import build_learner
from rzen.training.stage import Stage
from rzen.training.worker import build_engine, train_stage
from tests.gloo import run_workers
from tests.integration.test_training import Batch, Folders, batches
from tests.tiny import PROMPT, tiny_checkpoint, tiny_model

pytestmark = pytest.mark.slow
THETA = "objective.theta_T"


def cut_parameters(folder: Path) -> None:
    path = folder / checkpoint.PARAMETERS
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit_of_moments(folder: Path) -> None:
    path = folder / checkpoint.MOMENTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def remove_moments(folder: Path) -> None:
    (folder / checkpoint.MOMENTS).unlink()


def remove_state(folder: Path) -> None:
    (folder / checkpoint.STATE).unlink()


def cut_state(folder: Path) -> None:
    path = folder / checkpoint.STATE
    path.write_text(path.read_text()[:40])


def forget_step(folder: Path) -> None:
    rewrite_state(folder, lambda state: state.pop("step"))


def change_plan(folder: Path) -> None:
    rewrite_state(folder, lambda state: state.update(plan_fingerprint="plan-0"))


def drop_theta(folder: Path) -> None:
    rewrite(folder, checkpoint.PARAMETERS, lambda tensors: tensors.pop(THETA))


def add_a_task(folder: Path) -> None:
    rewrite(folder, checkpoint.MOMENTS, lambda tensors: tensors.update({f"exp_avg:{THETA}": torch.zeros(3)}))


def rewrite_state(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / checkpoint.STATE
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))


def rewrite(folder: Path, file: str, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """A file as another model would have written it: whole, with its own hash."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)
    rewrite_state(folder, lambda state: state["sha256"].update({file: file_sha256(folder / file)}))


FIX = "resume from another checkpoint, or start a run under a new name"
NEW_NAME = "restore data, mixture, batch size, steps and seed, or name a new run"
FAULTS: dict[Callable[[Path], None], tuple[str, str]] = {
    cut_parameters: ("/parameters.safetensors", f"is damaged: other bytes than were written; {FIX}"),
    flip_a_bit_of_moments: ("/moments.safetensors", f"is damaged: other bytes than were written; {FIX}"),
    remove_moments: ("/moments.safetensors", f"does not exist; {FIX}"),
    remove_state: ("/state.json", f"does not exist; {FIX}"),
    cut_state: ("/state.json", "is not JSON"),
    forget_step: ("/state.json", f"has no step; {FIX}"),
    change_plan: ("", f"belongs to plan plan-0, this run has plan plan-1; {NEW_NAME}"),
    drop_theta: (
        "/parameters.safetensors",
        f"is of another model: 1 tensors without a partner, such as {THETA}; {FIX}",
    ),
    add_a_task: (
        "/moments.safetensors",
        f"is of another model: exp_avg:{THETA} has shape 3, not 2; {FIX}",
    ),
}


def stage_of(model_dir: str, **optim: Any) -> Stage:
    model = tiny_model(model_dir).model_copy(update={"lora": LoraConfig(rank=2)})
    return Stage(model, ObjectiveConfig(), OptimConfig(**optim), 3, 0, 2, "plan-1")


@dataclass
class FullDisk(Folders):
    """A store whose disk is full at some attempts, counted from 0."""

    full_at: tuple[int, ...] = ()
    taken_at: int | None = None
    attempts: int = 0
    reports: list[str] = field(default_factory=list)

    def publish(self, folder: Path, step: int) -> None:
        attempt, self.attempts = self.attempts, self.attempts + 1
        if attempt == self.taken_at:
            raise TakenError("runs/r", "holds another run by now")
        if attempt in self.full_at:
            raise UserError("runs/r", "No space left on device", "free some space")
        super().publish(folder, step)

    def report(self, event: str) -> None:
        self.reports.append(event)


def message(action: Callable[[], object]) -> str:
    try:
        action()
    except (UserError, RuntimeError) as error:
        return str(error)
    return "no error"


def no_feed(start: int) -> Iterator[Batch]:
    raise AssertionError(f"asked for step {start}")


def worker(_rank: int, _world_size: int, root: Path, model_dir: str) -> dict[str, Any]:
    processor = Processor(model_dir, PROMPT)

    def run(stage: Stage, name: str, feed: Callable[[int], Iterator[Batch]], start_from: Path | None = None) -> None:
        (root / name).mkdir()
        train_stage(
            stage,
            backbone_dir=model_dir,
            init_adapter=None,
            tasks=["a", "b"],
            batches=feed,
            checkpoints=Folders(root / name, start_from),
            output=root / name / "model",
            on_metrics=lambda row: None,
        )

    def endless(start: int) -> Iterator[Batch]:
        return batches(processor, start)

    def run_on(disk: FullDisk) -> FullDisk:
        disk.root.mkdir()
        train_stage(
            replace(stage_of(model_dir), num_steps=7, checkpoint_every_steps=4),
            backbone_dir=model_dir,
            init_adapter=None,
            tasks=["a", "b"],
            batches=endless,
            checkpoints=disk,
            output=disk.root / "model",
            on_metrics=lambda row: time.sleep(0.1),  # so that a failure is known within two steps
        )
        return disk

    disks = {
        "quiet": run_on(FullDisk(root / "quiet")),
        "full": run_on(FullDisk(root / "full", full_at=(0, 2, 3))),
    }
    messages = {
        "taken": message(lambda: run_on(FullDisk(root / "taken", taken_at=0))),
        "diverging": message(
            lambda: run(stage_of(model_dir, lr=1e30, warmup_fraction=0.0, max_skipped_steps=1), "diverging", endless)
        ),
        "ending": message(lambda: run(stage_of(model_dir), "ending", lambda start: islice(endless(start), 1))),
        "skipping": message(lambda: run(stage_of(model_dir), "skipping", lambda start: endless(start + 1))),
    }
    run(stage_of(model_dir), "good", endless)
    run(stage_of(model_dir), "finished", no_feed, root / "good" / "step-000003")

    engine = engine_of(stage_of(model_dir), model_dir)
    before = checkpoint.full_parameters(engine)
    for damage in FAULTS:
        folder = root / damage.__name__
        shutil.copytree(root / "good" / "step-000002", folder)
        damage(folder)
        messages[damage.__name__] = message(lambda at=folder: checkpoint.restore(engine, at, plan_fingerprint="plan-1"))
    after = checkpoint.full_parameters(engine)
    untouched = all(torch.equal(value, after[name]) for name, value in before.items())
    done = checkpoint.restore(engine, root / "good" / "step-000002", plan_fingerprint="plan-1")
    reports = {name: disk.reports for name, disk in disks.items()}
    return {"messages": messages, "untouched": untouched, "done": done, "reports": reports}


def engine_of(stage: Stage, model_dir: str) -> Any:
    return build_engine(build_learner(stage, model_dir, None, ["a", "b"]), stage)[0]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def outcome(root: Path) -> dict[str, Any]:
    return run_workers(worker, 1, root, tiny_checkpoint(root / "tiny"))[0]


@pytest.mark.parametrize("damage", FAULTS, ids=lambda damage: damage.__name__)
def test_a_checkpoint_that_cannot_be_resumed_says_why(
    outcome: dict[str, Any], root: Path, damage: Callable[[Path], None]
) -> None:
    file, problem = FAULTS[damage]
    assert outcome["messages"][damage.__name__].startswith(f"{root}/{damage.__name__}{file}: {problem}")


def test_an_engine_is_untouched_by_a_bad_checkpoint_and_takes_a_good_one(outcome: dict[str, Any]) -> None:
    assert outcome["untouched"]
    assert outcome["done"] == 2


def test_a_diverging_run_stops_before_its_checkpoint(outcome: dict[str, Any], root: Path) -> None:
    found = outcome["messages"]["diverging"]
    assert found == (
        "step 2, source scenes, task a: loss is nan, grad_norm inf, the last of 2 skipped steps; no sample has a finite"
        " vector: the weights have diverged; look at these samples, lower optim.lr or raise optim.warmup_fraction, and"
        " resume"
    )
    assert list((root / "diverging").iterdir()) == []


def test_batches_that_end_or_skip_are_told(outcome: dict[str, Any]) -> None:
    assert outcome["messages"]["ending"] == "the feed brought nothing for step 1"
    assert outcome["messages"]["skipping"] == "the feed brought 1 for step 0"


def test_a_run_lost_after_its_last_checkpoint_only_writes_its_model(outcome: dict[str, Any], root: Path) -> None:
    files = [root / name / "model" / "adapter_model.safetensors" for name in ("good", "finished")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not list((root / "finished").glob("step-*"))


def test_a_checkpoint_that_cannot_be_written_is_tried_again_at_the_next_step_and_reported(
    outcome: dict[str, Any], root: Path
) -> None:
    assert outcome["reports"]["quiet"] == []
    found = {name: sorted(int(path.name[-6:]) for path in (root / name).glob("step-*")) for name in ("quiet", "full")}
    assert found["quiet"] == [4, 7]
    again, last = found["full"]
    assert (again in (5, 6), last) == (True, 7)  # the failure of step 4 may be known when step 5 has begun
    full = "runs/r: No space left on device; free some space"
    assert outcome["reports"]["full"] == [
        f"checkpoint of step 4 not written, trying again after the next step: {full}",
        f"checkpoint of step {again} written",
        f"checkpoint of step 7 not written, trying again after the next step: {full}",
        "checkpoint of step 7 written",
    ]


def test_a_run_with_a_full_disk_ends_with_the_bytes_of_a_quiet_one(outcome: dict[str, Any], root: Path) -> None:
    for name in (checkpoint.PARAMETERS, checkpoint.MOMENTS):
        quiet, full = ((root / run / "step-000007" / name).read_bytes() for run in ("quiet", "full"))
        assert quiet == full


def test_a_run_whose_folder_is_anothers_ends_at_once(outcome: dict[str, Any], root: Path) -> None:
    assert outcome["messages"]["taken"] == "runs/r: holds another run by now"
    assert not [*(root / "taken").iterdir()]
