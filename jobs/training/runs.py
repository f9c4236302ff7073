"""The folder of a training run in the store: its settings, its progress, its results.

    {root}/{name}/
        spec.json            resolved spec, versions, fingerprint of the data: what makes two runs the same
        backbone/            a tiny backbone, where the spec asks for one
        rzen-output.json     marks the folder as that of a run
        lease.json           who trains at present
        checkpoints/000200-1f0c9a3e/    trained parameters, moments, the step, and the metrics so far
        latest.json          run and path of the newest complete checkpoint, written after it
        phases.json          changes of the mixture, where the spec asks for resampling
        model/ or adapter/   the result
        best/                the result of the best checkpoint, where it is not the last
        metrics.jsonl        one row a step, some seconds after it
        held_out.jsonl       scores on held-out samples, where the spec asks for them
        index.html           curves, held-out scores, samples, answers, settings; refreshed while the run trains
        chunk.json           tokens of a chunk, where `cluster.chunk_tokens: auto` has found them
        log.txt              starts, lost workers, changes of the mixture and the end, with their times
        tensorboard/         the metrics as event files
        tracking.txt         what MLflow or W&B did not take
        done.json            samples and epochs of each source that it was trained on; written last
        scores/              scores of the result, one file for each scoring config

The step of a run is in its checkpoints only: whoever resumes reads it from the checkpoint that `latest.json` names.
Each checkpoint also names its run and the hash of the settings. `latest.json` only changes while it is the version that
was read, so that only one of two processes can name the newest checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from jobs.runtime.records import as_json, differences
from jobs.runtime.revision import revision, versions
from jobs.training.kind import TRAIN
from jobs.training.specs import TrainSpec
from pipelines.config import PositiveInt
from pipelines.errors import UserError
from pipelines.feed.batch import ResumePoint
from pipelines.plan.sources import PlanSource
from pipelines.plan.types import MixturePhase
from pipelines.redaction import printable, redact_text, redacted
from pipelines.storage.location import open_store, resolve_endpoint
from pipelines.storage.publish import claim
from pipelines.storage.store import Store
from pipelines.stored_json import parse_json, stored_file
from rzen.training.checkpoint_state import FIX, STATE, parse_state
from rzen.training.held_out_scores import HeldOutRow

SPEC, LATEST, DONE, METRICS, PHASES = "spec.json", "latest.json", "done.json", "metrics.jsonl", "phases.json"
BEST, LOG, HELD_OUT, PAGE, CHUNK = "best", "log.txt", "held_out.jsonl", "index.html", "chunk.json"
KIND = "run"
STARTS, FAILED = "starts at step", "failed permanently"
"""Words in `log.txt` that `rzen runs` goes by."""
_LOGGING = threading.Lock()  # several threads of a driver add lines
TENSORBOARD, UNTRACKED, FAILURE = "tensorboard", "tracking.txt", "failure.txt"
RESULTS = ("adapter", "model", BEST)
_FILES = (DONE, LATEST, METRICS, HELD_OUT, PAGE, PHASES, CHUNK, LOG, UNTRACKED, FAILURE)
_FOLDERS = ("checkpoints", "backbone", TENSORBOARD, "scores", "ray")


CheckpointPath = Annotated[str, Field(pattern=r"^checkpoints/\w[\w.-]*$")]


@stored_file
class RunFile(TypedDict):
    """`spec.json`: what makes two runs the same."""

    id: str
    settings_sha256: str
    spec: dict[str, Any]
    data: dict[str, Any]
    versions: NotRequired[dict[str, str]]
    revision: NotRequired[str]


@stored_file
class BestCheckpoint(TypedDict):
    """The best checkpoint of a run."""

    path: CheckpointPath
    accuracy: float
    held_out: NotRequired[float]


@stored_file
class LatestFile(TypedDict):
    """`latest.json`: the newest checkpoint of a run, and the best."""

    run: str
    path: CheckpointPath
    best: NotRequired[BestCheckpoint]


@stored_file
class SamplesSeen(TypedDict):
    """How much of a source a run was trained on."""

    samples: float
    epochs: float
    skipped: float


@stored_file
class HeldOutSummary(TypedDict):
    """A held-out score without its queries: means by source, after `step` steps."""

    step: int
    hit: float
    seconds: float
    sources: dict[str, float]


@stored_file
class DoneFile(TypedDict):
    """`done.json`: what a finished run was trained on, by source."""

    sources: dict[str, SamplesSeen]
    replaced: int
    held_out: NotRequired[list[HeldOutSummary]]


@stored_file
class ChunkFile(TypedDict):
    """`chunk.json`: what `cluster.chunk_tokens: auto` has found."""

    chunk_tokens: PositiveInt


@stored_file
class MetricsRow(TypedDict):
    """A line of `metrics.jsonl`: numbers by name, null for those that are not finite."""

    step: int
    skipped: NotRequired[float | None]
    loss: NotRequired[float | None]
    accuracy: NotRequired[float | None]


class Run:
    """One training run in its store. Picklable. The driver makes it: its environment may name the S3 endpoint."""

    def __init__(self, spec: TrainSpec) -> None:
        self.spec = spec
        self.endpoint = resolve_endpoint(spec.run.endpoint)
        self.store: Store = open_store(spec.run.root, self.endpoint).child(spec.name)

    @property
    def result(self) -> str:
        """Return the folder of the result, below the run."""
        return "adapter" if self.spec.model.tune == "lora" else "model"

    @property
    def result_url(self) -> str:
        """Return the URL of the trained adapter or model."""
        return self.store.child(self.result).url

    @property
    def settings_sha256(self) -> str:
        """Return the hash of the settings and data that decide the weights."""
        return self._spec()["settings_sha256"]

    @property
    def id(self) -> str:
        """Return the id of the run, for trackers. It changes when the run restarts from scratch."""
        return self._spec()["id"]

    def _spec(self) -> RunFile:
        return read_spec(self.store)

    def begin(self, data: dict[str, Any]) -> bool:
        """Claim the folder for this spec and these `data` (plain JSON values). Return False if the run is finished.

        A run of other settings that may be overwritten loses all but its result, which the new one replaces at its end.
        Raises `UserError` if the folder holds a run of other settings or data, unless it may be overwritten, or files
        of others.
        """
        claim(self.store, KIND)
        if (state := self.state(data)) is not None:
            return state
        identity = self._identity(data)
        facts = {
            "id": uuid.uuid4().hex,
            "settings_sha256": _hash(_science(identity)),
            "versions": versions(),
            "revision": revision(),
        }
        for path in _FILES:
            self.store.delete(path)
        for folder in _FOLDERS:
            self.store.delete_tree(folder)
        # Last, or a killed process would leave these settings with the end of the run before.
        self.store.write(SPEC, as_json(identity | facts))
        return True

    def state(self, data: dict[str, Any]) -> bool | None:
        """Return True for an unfinished run of this spec and these data, False for a finished one, None for none.

        Raises `UserError` if the folder holds a run of other settings or data, unless it may be overwritten.
        """
        if not self.store.exists(SPEC):
            return None
        before = self._spec()
        spec = with_new_settings(before["spec"])
        changes = differences(_science(before | {"spec": spec}), _science(self._identity(data)))
        if not changes:
            return not self.store.exists(DONE)
        if not self.spec.run.overwrite:
            raise UserError(
                self.store.url,
                f"holds a run with other settings: {'; '.join(changes[:5])}",
                "choose another name, or set run.overwrite: true to restart from scratch",
            )
        return None

    def _identity(self, data: dict[str, Any]) -> dict[str, Any]:
        identity: dict[str, Any] = redacted({"spec": self.spec.model_dump(mode="json"), "data": data})
        return identity

    def resume_point(self) -> ResumePoint:
        """Return the newest checkpoint and the step that it was taken after, as it says itself.

        Raises `UserError` where the checkpoint that `latest.json` names is not there.
        """
        missing = ""
        spec = self._spec()
        while self.store.exists(LATEST):
            latest = read_latest(self.store)
            path = latest["path"]
            if latest["run"] != spec["id"]:  # a process of the run that was here before wrote it late
                break
            place = f"{path}/{STATE}"
            try:
                state = parse_state(self.store.read(place), f"{self.store.url}/{place}")
                if (state.run, state.settings_sha256) != (spec["id"], spec["settings_sha256"]):
                    raise UserError(f"{self.store.url}/{place}", "belongs to a run with other settings", FIX)
                return ResumePoint(state.step, path)
            except FileNotFoundError as error:
                # A worker may have published a newer one and deleted this one, or finished the run, in the meantime.
                if self.store.exists(DONE):
                    break
                if path == missing:
                    raise UserError(f"{self.store.url}/{LATEST}", f"names {path}, which is not there", FIX) from error
                missing = path
        return ResumePoint()

    def step(self) -> int:
        """Return the steps that the newest checkpoint has done; 0 if there is none."""
        return self.resume_point().step

    def rows(self, point: ResumePoint) -> list[dict[str, Any]]:
        """Return the metrics of every step before a resume point."""
        return read_rows(self.store, f"{point.checkpoint}/{METRICS}") if point.checkpoint else []

    def phases(self) -> list[MixturePhase]:
        """Return the changes of the mixture so far."""
        return (
            parse_json(self.store.read(PHASES), f"{self.store.url}/{PHASES}", list[MixturePhase])
            if self.store.exists(PHASES)
            else []
        )

    def record(self, phase: MixturePhase) -> None:
        """Add a change of the mixture."""
        self.store.write(PHASES, as_json([asdict(some) for some in (*self.phases(), phase)]))

    def chunk_tokens(self) -> int | None:
        """Return the tokens of a chunk that an earlier start has found. None if there is none."""
        if not self.store.exists(CHUNK):
            return None
        return parse_json(self.store.read(CHUNK), f"{self.store.url}/{CHUNK}", ChunkFile, FIX)["chunk_tokens"]

    def record_chunk(self, chunk_tokens: int) -> None:
        """Keep the tokens of a chunk for later starts."""
        self.store.write(CHUNK, as_json({"chunk_tokens": chunk_tokens}))

    def log(self, event: str) -> None:
        """Add a line to `log.txt`. Only the driver calls it."""
        line = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}  {redact_text(printable(event))}\n".encode()
        with _LOGGING:
            before = self.store.read(LOG) if self.store.exists(LOG) else b""
            self.store.write(LOG, before + line)

    def finish(
        self, summary: dict[str, Any], metrics: list[dict[str, Any]], held_out: Sequence[HeldOutRow] = ()
    ) -> None:
        """Record the end of the run, and delete its checkpoints. The result must be published before."""
        self.store.write(METRICS, to_lines(metrics))
        if held_out:
            self.store.write(HELD_OUT, to_lines(held_out))
            summary = summary | {"held_out": [summarize_scores(row) for row in held_out]}
        self.store.write(DONE, as_json(summary))
        self.store.delete_tree("checkpoints")
        self.store.delete(LATEST)


def samples_seen(rows: Iterable[Mapping[str, Any]], sources: Iterable[PlanSource]) -> dict[str, dict[str, float]]:
    """Return what a run was trained on, by source: samples, epochs, and samples of steps that were skipped.

    It is counted from the rows of the steps, because resampling and skipped steps change what the plan foresaw.
    """
    by_name = {source.name: source for source in sources}
    seen = {name: {"samples": 0.0, "epochs": 0.0, "skipped": 0.0} for name in by_name}
    for row in rows:
        for name in str(row["source"]).split("+"):  # one for each block
            seen[name]["skipped" if row["skipped"] else "samples"] += by_name[name].batch
    for name, counts in seen.items():
        counts["epochs"] = round(counts["samples"] / by_name[name].num_samples, 4)
    return seen


def with_new_settings(stored: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a stored spec, with the defaults of those that an earlier version of rzen did not have."""
    try:
        return TrainSpec.model_validate_json(json.dumps(stored)).model_dump(mode="json")
    except ValueError:
        return stored


def read_spec(store: Store) -> RunFile:
    """Return the `spec.json` of a run. Raises `UserError` for a damaged one."""
    return parse_json(store.read(SPEC), f"{store.url}/{SPEC}", RunFile, "restore it, or train under a new name")


def read_done(store: Store) -> DoneFile:
    """Return the `done.json` of a run. Raises `UserError` for a damaged one."""
    return parse_json(store.read(DONE), f"{store.url}/{DONE}", DoneFile)


def read_latest(store: Store) -> LatestFile:
    """Return the `latest.json` of a run. Raises `UserError` for a damaged one."""
    return parse_latest(store.read(LATEST), store)


def parse_latest(data: bytes, store: Store) -> LatestFile:
    """Return the content of a `latest.json` that was read from `store`. Raises `UserError` for a damaged one."""
    return parse_json(data, f"{store.url}/{LATEST}", LatestFile, FIX)


def _science(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides the weights: the settings, and the data by their fingerprints."""
    return {"plan": identity["data"]} | TRAIN.science(identity["spec"])


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_rows(store: Store, path: str) -> list[dict[str, Any]]:
    """Return the rows of a `metrics.jsonl`. Raises `UserError` for a damaged one."""
    return parse_rows(store.read(path), f"{store.url}/{path}")


def parse_rows(lines: bytes, place: str) -> list[dict[str, Any]]:
    """Parse rows of metrics. JSON has no infinite numbers and no NaN: null there becomes NaN here."""
    rows = [
        parse_json(line, f"{place}:{number}", MetricsRow, FIX)
        for number, line in enumerate(lines.splitlines(), start=1)
    ]
    return [{name: math.nan if value is None else value for name, value in row.items()} for row in rows]


def read_held_out(store: Store) -> list[HeldOutRow]:
    """Return the held-out scores of a run, none where it has no such file. Raises `UserError` for a damaged one."""
    try:
        return parse_held_out(store.read(HELD_OUT), f"{store.url}/{HELD_OUT}")
    except FileNotFoundError:
        return []


def parse_held_out(lines: bytes, place: str) -> list[HeldOutRow]:
    """Parse the rows of a `held_out.jsonl`."""
    return [
        parse_json(line, f"{place}:{number}", HeldOutRow, FIX)
        for number, line in enumerate(lines.splitlines(), start=1)
    ]


def summarize_scores(row: HeldOutRow) -> HeldOutSummary:
    """Return a row of `held_out.jsonl` without its queries."""
    hits = {name: some["hit"] for name, some in row["sources"].items()}
    return {"step": row["step"], "hit": row["hit"], "seconds": row["seconds"], "sources": hits}


def to_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Return the content of `metrics.jsonl` or `held_out.jsonl` for these rows."""
    finite = (
        {name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in row.items()}
        for row in rows
    )
    return "".join(json.dumps(row, sort_keys=True) + "\n" for row in finite).encode()
