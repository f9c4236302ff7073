"""Submits a spec to the job server of a Ray cluster, once, and follows the job to its end."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import shlex
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field
from ray.dashboard.modules.job.pydantic_models import JobDetails

from jobs.runtime.follow import exit_status, follow, report_detached, say_outcome, was_lost
from jobs.runtime.job_server import PATIENCE_S, JobServer, Patience, Refused, UnknownJob, Unreachable
from jobs.runtime.package import Package, pack
from jobs.runtime.progress import console, is_quiet, say
from jobs.runtime.revision import REVISION, revision
from jobs.spec.job import JobConfig
from jobs.spec.load import is_shipped
from pipelines.config import Config
from pipelines.errors import UserError
from pipelines.redaction import redacted
from rzen.packages import ROOT

# By default Ray kills a job three seconds after it was stopped. That is too soon for a last checkpoint.
ENVIRONMENT = {"RAY_JOB_STOP_WAIT_TIME_S": "60"}
SPEC, SETTINGS = "rzen", "rzen_settings"
"""Metadata of a job: the path of its spec, and a digest of each of its settings."""
_NAME = "job_name"  # what Ray's dashboard shows
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_NAMED = "the specs that it names"


class RayOptions(Config):
    """Options of `ray job submit` that its hook passes on. They win over `submit` in the spec."""

    runtime_env: dict[str, Any] = Field(default_factory=dict)
    """Runtime environment. Its `env_vars` are added to those of the spec, its `excludes` to `submit.excludes`."""
    metadata: dict[str, str] = Field(default_factory=dict)
    """Metadata of the job."""
    headers: dict[str, str] | None = None
    """Headers of each request."""
    verify: bool | str = True
    """Whether to check the certificate of the job server, or the certificates to trust."""
    entrypoint_num_cpus: float | None = None
    """CPUs that the job's own process reserves."""
    entrypoint_num_gpus: float | None = None
    """GPUs that the job's own process reserves."""
    entrypoint_memory: int | None = None
    """Bytes that the job's own process reserves."""
    entrypoint_resources: dict[str, float] | None = None
    """Custom resources that the job's own process reserves."""
    entrypoint_label_selector: dict[str, str] | None = None
    """Labels of the nodes that the job's own process may run on."""


@dataclass(frozen=True)
class Submission:
    """What to submit."""

    path: str
    """File of the spec."""
    overrides: Sequence[str]
    spec: JobConfig
    named: Sequence[JobConfig]
    """Specs that it names."""
    files: Sequence[Path]
    """Files that it was read from."""
    working_dir: str
    id: str | None = None
    """Name of the job on the cluster. A job of this name that is there is followed instead of starting another."""
    options: RayOptions = field(default_factory=RayOptions)


def submit(server: JobServer, submission: Submission, *, wait: bool) -> int:
    """Submit `python -m rzen run SPEC ...`. Return its exit status, or 0 without `wait`.

    A job whose process was lost is submitted again, as often as `submit.retries` says. Raise `UserError` if the job
    cannot be packed or sent, or if another job has its name.
    """
    return _Submitter(server, submission).run(wait)


class _Submitter:
    def __init__(self, server: JobServer, submission: Submission) -> None:
        self._server, self._submission, self._config = server, submission, submission.spec.submit
        self._folder = Path(submission.working_dir).resolve()
        if not self._folder.is_dir():
            raise UserError(submission.working_dir, "is not a folder", "name another --working-dir")
        self._needed = _needed(submission.files, self._folder)
        self._spec = Path(submission.path).resolve()
        if not self._spec.is_relative_to(self._folder):
            raise UserError(submission.path, f"is not inside {self._folder}", "name another --working-dir")
        if submission.id is not None and not _ID.fullmatch(submission.id):
            rule = "must be letters, digits, `_`, `.` and `-`, 100 at most"
            raise UserError(f"--submission-id {submission.id}", rule, "choose another")
        self._id = submission.id or f"raysubmit_{secrets.token_hex(8)}"
        spec = self._spec.relative_to(self._folder).as_posix()
        self._metadata = {SPEC: spec, SETTINGS: json.dumps(_digests(submission.spec, submission.named))}
        self._entrypoint = ["python", "-m", "rzen", "run", spec]
        self._entrypoint += [word for text in submission.overrides for word in ("--set", text)]

    def run(self, wait: bool) -> int:
        """Find or send the job and follow it, again if its process is lost. Return its exit status."""
        retries = self._config.retries
        attempt, details = self._present() if self._submission.id else (0, None)
        while True:
            job = self._name(attempt)
            if details is None:
                details = self._send(job)
            self._report(job, details)
            if not wait:
                if is_quiet():
                    console.print(job)
                return 0
            try:
                ended = follow(self._server, job)
            except KeyboardInterrupt:
                report_detached(self._server, job)
                return 130
            except UnknownJob as error:  # a new head, without the memory of the old one
                problem = "is no longer known: the head of the cluster was replaced"
                if attempt == retries:
                    raise UserError(job, problem, "submit it again: it resumes from its last checkpoint") from error
                say(f"{job} {problem}", "yellow")
            else:
                say_outcome(job, ended)
                if attempt == retries or not was_lost(ended):
                    return exit_status(ended)
            attempt, details = attempt + 1, None
            say(f"  attempt {attempt + 1} of {retries + 1}", "yellow")

    def _name(self, attempt: int) -> str:
        return f"{self._id}-{attempt + 1}" if attempt else self._id

    def _present(self) -> tuple[int, JobDetails | None]:
        """Return the last attempt that the cluster knows, and its state. 0 and None if there is none."""
        found: tuple[int, JobDetails | None] = (0, None)
        for attempt in range(self._config.retries + 1):
            details = self._find(self._name(attempt))
            if details is None:
                break
            found = attempt, details
        return found

    def _find(self, job: str) -> JobDetails | None:
        """Return the state of a job of this submission. Raise `UserError` if it is another job."""
        try:
            details = self._server.details(job)
        except UnknownJob:
            return None
        fix = f"choose another --submission-id, or follow it with: rzen attach {job}{self._server.option}"
        theirs = details.metadata or {}
        if theirs.get(SPEC) != self._metadata[SPEC]:
            raise UserError(job, f"is another job on {self._server.address}: {details.entrypoint}", fix)
        mine, other = json.loads(self._metadata[SETTINGS]), json.loads(theirs.get(SETTINGS, "{}"))
        if changed := sorted(key for key in mine.keys() | other.keys() if mine.get(key) != other.get(key)):
            raise UserError(job, f"was submitted with other settings of {', '.join(changed)}", fix)
        return details

    def _send(self, job: str) -> JobDetails | None:
        """Send the job. Return its state if it was there already.

        A request whose answer was lost may have arrived. The name of the job shows it, so that none is started twice.
        """
        package = pack(self._folder, self._excludes(), self._needed)
        patience = Patience(self._server, job, PATIENCE_S)
        with tempfile.TemporaryDirectory(prefix="rzen-") as folder:
            packed = Path(folder, "package.zip")
            package.write(packed)
            say(f"  package    {_listed(package)}", "dim")
            is_repeated = False
            while True:
                try:
                    if is_repeated and (details := self._find(job)):
                        return details
                    self._server.client.submit_job(**self._request(job, packed))
                    return None
                except Unreachable as error:
                    time.sleep(patience.next_delay_s(error))
                except Refused as error:
                    if is_repeated or "already exists" not in error.problem:
                        raise
                except (TypeError, ValueError) as error:
                    raise UserError("runtime_env", str(error).splitlines()[0], "change --runtime-env") from error
                is_repeated = True

    def _request(self, job: str, package: Path) -> dict[str, Any]:
        config, options = self._config, self._submission.options
        theirs = {key: value for key, value in options.runtime_env.items() if key not in ("excludes", "working_dir")}
        variables = ENVIRONMENT | self._revision() | config.env | (theirs.get("env_vars") or {})
        return {
            "entrypoint": shlex.join(self._entrypoint),
            "submission_id": job,
            "runtime_env": theirs | {"working_dir": str(package), "env_vars": variables},
            "metadata": {_NAME: self._title()} | options.metadata | self._metadata,
            "entrypoint_num_cpus": _first(options.entrypoint_num_cpus, config.cpus or None),
            "entrypoint_num_gpus": options.entrypoint_num_gpus,
            "entrypoint_memory": _first(options.entrypoint_memory, config.memory_bytes or None),
            "entrypoint_resources": options.entrypoint_resources,
            "entrypoint_label_selector": options.entrypoint_label_selector,
        }

    def _revision(self) -> dict[str, str]:
        """Return the revision of the code as a variable, if the code is sent: the package has no git history."""
        return {REVISION: revision()} if Path(ROOT).resolve() == self._folder else {}

    def _title(self) -> str:
        """Return kind and name of the job for people."""
        spec = self._submission.spec
        return f"{spec.kind} {getattr(spec, 'name', self._spec.stem)}"

    def _excludes(self) -> list[str]:
        return [*self._config.excludes, *(self._submission.options.runtime_env.get("excludes") or [])]

    def _report(self, job: str, details: JobDetails | None) -> None:
        server = self._server
        if details is None:
            say(f"submitted {job} to {server.address}")
        else:
            say(f"{job} is on {server.address} already: {details.status.value.lower()}")
        say(f"  dashboard  {server.address}/#/jobs/{job}", "dim")
        say(f"  follow     rzen attach {job}{server.option}", "dim")
        again = "the same command" if self._submission.id is None else "another --submission-id"
        say(f"  stop       rzen stop {job}{server.option}       {again} then resumes from the last checkpoint", "dim")


def _needed(files: Sequence[Path], folder: Path) -> list[Path]:
    """Return the files of a spec that the job reads in its working directory. They travel even if git ignores them."""
    needed = []
    for file in files:
        if file.resolve().is_relative_to(folder):
            needed.append(file.resolve())
        elif not is_shipped(file):
            raise UserError(str(file), f"is not inside {folder}, the folder that is sent", "name another --working-dir")
    return needed


def _digests(spec: JobConfig, named: Sequence[JobConfig]) -> dict[str, str]:
    """Return a digest of each setting of a spec, without those of its submission and without secrets."""
    content: dict[str, Any] = spec.model_dump(mode="json", exclude={"submit"})
    if named:
        content[_NAMED] = [some.model_dump(mode="json", exclude={"submit"}) for some in named]
    return {key: _digest(redacted(value)) for key, value in content.items()}


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _listed(package: Package) -> str:
    return f"{len(package.sizes):,} files, {package.num_bytes / 1e6:.1f} MB"
