"""Checkpoints of a run in its store: load the one to resume from, publish new ones, keep the last few and the best."""

from __future__ import annotations

import shutil
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs.runtime.records import as_json
from jobs.training.runs import (
    HELD_OUT,
    LATEST,
    METRICS,
    BestCheckpoint,
    LatestFile,
    Run,
    parse_held_out,
    parse_latest,
    parse_rows,
    read_latest,
    read_spec,
    to_lines,
)
from pipelines.errors import TakenError
from pipelines.feed.batch import ResumePoint
from rzen.training.checkpoint_state import STATE, parse_state
from rzen.training.held_out_scores import HeldOutRow


class Checkpoints:
    """Checkpoints of a run, as the trainer asks for them: complete ones only, the last few and the best.

    `point` is where this start resumes. Only that checkpoint is loaded, even if a newer one appears. The best one has
    the highest held-out score. Where no checkpoint has one, it has the highest mean accuracy in the batches since the
    one before it. `report` is called with what the user should know.

    `metrics` are the rows of all steps before `point`, then of the steps since, and `held_out` the scores.
    `published_s` is the time of the newest checkpoint that was published here. At first it is the time of the start.
    """

    def __init__(self, run: Run, point: ResumePoint, report: Callable[[str], None] = print) -> None:
        self._store = run.store
        self._id = run.id
        self._point = point
        self._published_step = point.step
        self._config = run.spec.checkpoint
        self.report = report
        self.metrics: list[dict[str, Any]] = []
        self.held_out: list[HeldOutRow] = []
        self.published_s = time.time()

    def latest(self) -> Path | None:
        """Return a local copy of the checkpoint to resume from, which the process keeps until it ends."""
        if not self._point.checkpoint:
            return None
        folder = self._download(self._point.checkpoint)
        self.metrics = parse_rows(
            (folder / METRICS).read_bytes(), f"{self._store.url}/{self._point.checkpoint}/{METRICS}"
        )
        if (folder / HELD_OUT).exists():
            place = f"{self._store.url}/{self._point.checkpoint}/{HELD_OUT}"
            self.held_out = parse_held_out((folder / HELD_OUT).read_bytes(), place)
        return folder

    def best(self) -> Path | None:
        """Return a local copy of the best checkpoint, unless it is the newest."""
        latest = read_latest(self._store)
        best = latest.get("best", latest)
        return None if best["path"] == latest["path"] else self._download(best["path"])

    def publish(self, folder: Path, step: int) -> None:
        """Upload a checkpoint with the metrics so far, name it the latest, and delete those that need not be kept.

        Raises `TakenError` if the folder belongs to another run by now. A checkpoint that is older than the latest one
        changes nothing: another process of the same run wrote that.
        """
        path = f"checkpoints/{step:06d}-{uuid.uuid4().hex[:8]}"  # no other process writes there
        rows = [row for row in list(self.metrics) if row["step"] < step]  # training may have gone on
        (folder / METRICS).write_bytes(to_lines(rows))
        scores = [row for row in list(self.held_out) if row["step"] <= step]
        (folder / HELD_OUT).write_bytes(to_lines(scores))
        self._store.upload_tree(folder, path)
        this: BestCheckpoint = {"path": path, "accuracy": _accuracy(rows, self._published_step)}
        if scores and scores[-1]["step"] == step:
            this["held_out"] = scores[-1]["hit"]
        kept = self._name_latest(this, step)
        self._published_step = step
        self.published_s = time.time()
        shutil.rmtree(folder, ignore_errors=True)
        names = sorted({"/".join(name.split("/")[:2]) for name in self._store.list("checkpoints")})
        for name in names[: -self._config.keep]:
            if name not in kept:
                self._store.delete_tree(name)

    def _name_latest(self, this: BestCheckpoint, step: int) -> set[str]:
        """Make a checkpoint the latest, if it is. Return the paths that must be kept."""
        while True:
            before, tag = self._latest()
            self._check_owner()
            if before is not None and before["run"] != self._id:
                before = None  # of a run that this one replaced
            if before is not None and self._step(before["path"]) >= step:
                return {before["path"], *([before["best"]["path"]] if "best" in before else [])}
            latest: LatestFile = {"run": self._id, "path": this["path"]}
            kept = {this["path"]}
            if self._config.keep_best:
                best_before = before.get("best", this) if before is not None else this
                latest["best"] = max(this, best_before, key=_quality)
                kept.add(latest["best"]["path"])
            if self._store.write_if(LATEST, as_json(latest), tag):
                return kept

    def _check_owner(self) -> None:
        if read_spec(self._store)["id"] != self._id:
            raise TakenError(self._store.url, "holds another run by now", "give one of the two another name")

    def _latest(self) -> tuple[LatestFile | None, str | None]:
        try:
            data, tag = self._store.read_tagged(LATEST)
        except FileNotFoundError:
            return None, None
        return parse_latest(data, self._store), tag

    def _step(self, path: str) -> int:
        """Return the step of a checkpoint, -1 if it has gone."""
        try:
            return parse_state(self._store.read(f"{path}/{STATE}"), f"{self._store.url}/{path}").step
        except FileNotFoundError:
            return -1

    def _download(self, path: str) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="rzen-checkpoint-"))
        self._store.download_tree(path, folder)
        return folder


def _quality(checkpoint: BestCheckpoint) -> tuple[float, float]:
    """Return what the best checkpoint has most of. One without a held-out score is behind all that have one."""
    return checkpoint.get("held_out", -1.0), checkpoint["accuracy"]


def _accuracy(rows: list[dict[str, Any]], start: int) -> float:
    """Return the mean over the steps from `start` on that were not skipped; 0 if there are none."""
    values = [row["accuracy"] for row in rows if row["step"] >= start and not row["skipped"]]
    return sum(values) / len(values) if values else 0.0
