"""Checkpoints of a run in its store: load the one to resume from, publish new ones, keep the last few and the best."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from jobs.runtime.records import as_json
from jobs.training.runs import LATEST, METRICS, BestCheckpoint, LatestFile, Run, parse_rows, read_latest, to_lines
from pipelines.feed.batch import ResumePoint


class Checkpoints:
    """Checkpoints of a run, as the trainer asks for them: complete ones only, the last few and the best.

    `point` is where this start resumes. Only that checkpoint is loaded, even if a newer one appears. The best one has
    the highest mean accuracy in the batches since the one before it.

    `metrics` are the rows of all steps before `point`, then of the steps since. `published_s` is the time of the newest
    checkpoint that was published here. At first it is the time of the start.
    """

    def __init__(self, run: Run, point: ResumePoint) -> None:
        self._store = run.store
        self._point = point
        self._published_step = point.step
        self._config = run.spec.checkpoint
        self.metrics: list[dict[str, Any]] = []
        self.published_s = time.time()

    def latest(self) -> Path | None:
        """Return a local copy of the checkpoint to resume from, which the process keeps until it ends."""
        if not self._point.checkpoint:
            return None
        folder = self._download(self._point.checkpoint)
        self.metrics = parse_rows(
            (folder / METRICS).read_bytes(), f"{self._store.url}/{self._point.checkpoint}/{METRICS}"
        )
        return folder

    def best(self) -> Path | None:
        """Return a local copy of the best checkpoint, unless it is the newest."""
        latest = self._latest()
        best = latest.get("best", latest)
        return None if best["path"] == latest["path"] else self._download(best["path"])

    def publish(self, folder: Path, step: int) -> None:
        """Upload a checkpoint with the metrics so far, name it the latest, and delete those that need not be kept."""
        path = f"checkpoints/{step:06d}"
        rows = [row for row in list(self.metrics) if row["step"] < step]  # training may have gone on
        (folder / METRICS).write_bytes(to_lines(rows))
        self._store.delete_tree(path)
        self._store.upload_tree(folder, path)
        latest: LatestFile = {"path": path}
        kept = {path}
        if self._config.keep_best:
            before = self._latest() if self._store.exists(LATEST) else latest
            this: BestCheckpoint = {"path": path, "accuracy": _accuracy(rows, self._published_step)}
            latest["best"] = max(this, before.get("best", this), key=lambda some: some["accuracy"])
            kept.add(latest["best"]["path"])
        self._store.write(LATEST, as_json(latest))
        self._published_step = step
        self.published_s = time.time()
        shutil.rmtree(folder, ignore_errors=True)
        names = sorted({"/".join(name.split("/")[:2]) for name in self._store.list("checkpoints")})
        for name in names[: -self._config.keep]:
            if name not in kept:
                self._store.delete_tree(name)

    def _latest(self) -> LatestFile:
        return read_latest(self._store)

    def _download(self, path: str) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="rzen-checkpoint-"))
        self._store.download_tree(path, folder)
        return folder


def _accuracy(rows: list[dict[str, Any]], start: int) -> float:
    """Return the mean over the steps from `start` on that were not skipped; 0 if there are none."""
    values = [row["accuracy"] for row in rows if row["step"] >= start and not row["skipped"]]
    return sum(values) / len(values) if values else 0.0
