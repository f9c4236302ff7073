"""Track metrics and held-out scores of a run: files and TensorBoard in its folder, MLflow and W&B if the spec asks.

A thread hands rows over every few seconds, so that no server holds up a step or ends a run. `tracking.txt` lists what a
server did not take until the end.
"""

from __future__ import annotations

import importlib.util
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from threading import Event, Thread
from typing import Any, Protocol

from jobs.runtime.records import leaves
from jobs.spec.run import TrackingConfig
from jobs.training.runs import HELD_OUT, METRICS, TENSORBOARD, UNTRACKED, Run, to_lines
from pipelines.errors import UserError

EVERY_S = 15.0
_LABELS = ("step", "source", "task")
_MLFLOW_PARAMS = 100  # of one request
_MLFLOW_LENGTH = 500  # letters of a value

Rows = Sequence[Mapping[str, Any]]


class _Sink(Protocol):
    def add(self, rows: Rows) -> None:
        """Take rows in the order of their steps, each once."""

    def close(self) -> None:
        """End after the last row."""


def check_tracking(config: TrackingConfig) -> None:
    """Raise `UserError` where a package is missing that the spec needs."""
    for package, wanted in (("mlflow", config.mlflow), ("wandb", config.wandb)):
        if wanted and importlib.util.find_spec(package) is None:
            raise UserError(f"run.tracking.{package}", "is not installed", "pip install 'rzen[tracking]'")


class Tracker:
    """Hands rows to all sinks in a thread: metrics of steps, and held-out scores.

    `before` are the metrics of earlier starts, `scores` theirs. Sinks that keep rows have them.
    """

    def __init__(self, run: Run, before: Rows, scores: Rows = ()) -> None:
        self._run = run
        start = len(before)
        # TensorBoard purges what the earlier start wrote for step `start`, such as its held-out score.
        earlier = [*before, *(row for row in scores if row["step"] < start)]
        self._rows = [*earlier, *(row for row in scores if row["step"] >= start)]
        config = run.spec.run.tracking
        makers: dict[str, Callable[[], _Sink]] = {METRICS: lambda: _Lines(run, earlier)}
        if config.tensorboard:
            makers["TensorBoard"] = lambda: _TensorBoard(run, start)
        if config.mlflow:
            makers["MLflow"] = lambda: _Mlflow(run, config)
        if config.wandb:
            makers["W&B"] = lambda: _Wandb(run, config)
        self._makers = makers
        self._sinks: dict[str, _Sink] = {}
        self._given = dict.fromkeys(makers, len(earlier))
        self._problems: dict[str, str] = {}
        self._ended = Event()
        self._thread = Thread(target=self._work, daemon=True)
        self._thread.start()

    def log(self, row: Mapping[str, Any]) -> None:
        """Take a row, and return at once."""
        self._rows.append(row)

    def close(self) -> None:
        """Hand over the remaining rows, and wait. `tracking.txt` names the sinks that still fail."""
        self._ended.set()
        self._thread.join()
        if self._problems:
            lines = [f"{name}: {problem}\n" for name, problem in self._problems.items()]
            self._run.store.write(UNTRACKED, "".join(lines).encode())

    def _work(self) -> None:
        self._hand_over()  # so that the run appears at its first step
        while not self._ended.wait(EVERY_S):
            self._hand_over()
        self._hand_over()
        for name, sink in self._sinks.items():
            self._attempt(name, sink.close)

    def _hand_over(self) -> None:
        for name in self._makers:
            self._attempt(name, lambda name=name: self._feed(name))

    def _feed(self, name: str) -> None:
        if name not in self._sinks:
            self._sinks[name] = self._makers[name]()
        end = len(self._rows)
        if end > self._given[name]:
            self._sinks[name].add(self._rows[self._given[name] : end])
            self._given[name] = end
        self._problems.pop(name, None)

    def _attempt(self, name: str, work: Any) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001  whatever a server or its client does, training goes on
            missing = len(self._rows) - self._given[name]
            first = str(error).strip().splitlines()[:1]
            self._problems[name] = f"{missing} steps not handed over: {type(error).__name__} {' '.join(first)}"


class _Lines:
    """Writes the whole `metrics.jsonl` or `held_out.jsonl` each time."""

    def __init__(self, run: Run, before: Rows) -> None:
        self._run = run
        self._lines = {path: to_lines(rows) for path, rows in _by_file(before).items()}

    def add(self, rows: Rows) -> None:
        for path, added in _by_file(rows).items():
            if added:
                lines = self._lines[path] + to_lines(added)
                self._run.store.write(path, lines)
                self._lines[path] = lines

    def close(self) -> None:
        pass


class _TensorBoard:
    """Writes event files below the run. Steps that are repeated after a restart replace the earlier ones."""

    def __init__(self, run: Run, start: int) -> None:
        from tensorboardX import SummaryWriter

        self._run = run
        self._scratch = tempfile.TemporaryDirectory(prefix=f"rzen-tensorboard-{run.spec.name}-")
        self._writer = SummaryWriter(self._scratch.name, purge_step=start, filename_suffix=f".{start:06d}")

    def add(self, rows: Rows) -> None:
        for row in rows:
            for name, value in scalars(row).items():
                self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()
        self._upload()

    def close(self) -> None:
        self._writer.close()  # writes the last of it
        self._upload()
        self._scratch.cleanup()

    def _upload(self) -> None:
        self._run.store.upload_tree(Path(self._scratch.name), TENSORBOARD)


class _Mlflow:
    """Writes one MLflow run for each run, however often it is started."""

    def __init__(self, run: Run, config: TrackingConfig) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(config.mlflow)
        experiment = self._client.get_experiment_by_name(config.project)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(config.project)
        found = self._client.search_runs([experiment_id], filter_string=f"tags.rzen = '{run.id}'")
        if found:
            self._id = found[0].info.run_id
            return
        self._id = self._client.create_run(experiment_id, run_name=run.spec.name, tags={"rzen": run.id}).info.run_id
        from mlflow.entities import Param

        settings = leaves(run.spec.model_dump(mode="json"))
        params = [Param(name, str(value)[:_MLFLOW_LENGTH]) for name, value in settings.items()]
        for start in range(0, len(params), _MLFLOW_PARAMS):
            self._client.log_batch(self._id, params=params[start : start + _MLFLOW_PARAMS])

    def add(self, rows: Rows) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        for row in rows:
            values = scalars(row).items()
            metrics = [Metric(_mlflow_name(name), value, now_ms, row["step"]) for name, value in values]
            self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._id)


class _Wandb:
    """Writes one W&B run for each run. W&B ignores steps that are repeated after a restart."""

    def __init__(self, run: Run, config: TrackingConfig) -> None:
        import wandb

        self._run = wandb.init(
            project=config.project,
            name=run.spec.name,
            id=run.id,
            resume="allow",
            config=run.spec.model_dump(mode="json"),
            settings=wandb.Settings(console="off", silent=True),
        )

    def add(self, rows: Rows) -> None:
        for row in rows:
            self._run.log(scalars(row), step=row["step"])

    def close(self) -> None:
        self._run.finish()


def _is_score(row: Mapping[str, Any]) -> bool:
    return "sources" in row


def _by_file(rows: Rows) -> dict[str, list[Mapping[str, Any]]]:
    return {
        METRICS: [row for row in rows if not _is_score(row)],
        HELD_OUT: [row for row in rows if _is_score(row)],
    }


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """Return `loss/_all`, `loss/SOURCE` and so on for every metric of a row: one chart each in TensorBoard and W&B."""
    if _is_score(row):
        return {"held_out/_all": row["hit"]} | {
            f"held_out/{name}": some["hit"] for name, some in row["sources"].items()
        }
    numbers = {name: float(value) for name, value in row.items() if name not in _LABELS}
    return {f"{name}/{of}": value for name, value in numbers.items() for of in ("_all", row["source"])}


def _mlflow_name(name: str) -> str:
    return re.sub(r"[^\w\-./: ]", "_", name)
