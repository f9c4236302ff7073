"""Job of kind `pipeline`: runs jobs one after the other, each of them once.

A job is repeated when its resolved settings, any job before it, or the raw files that it reads have changed. It is also
repeated when its output is gone.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from typing import Any

from typing_extensions import TypedDict

from jobs.runtime.cluster import ray_cluster
from jobs.runtime.dispatch import named_specs, raw_input, run_spec
from jobs.runtime.inputs import check_inputs
from jobs.runtime.lease import Lease, hold_output
from jobs.runtime.progress import duration, say
from jobs.runtime.records import as_json
from jobs.spec.job import JobConfig
from jobs.spec.load import Document, check, read_document, substitute
from jobs.workflows.specs import PipelineSpec
from pipelines.errors import UserError
from pipelines.storage.location import exists, open_store
from pipelines.storage.publish import LEASE, MARK
from pipelines.storage.store import Store
from pipelines.storage.urls import is_local
from pipelines.stored_json import parse_json, stored_file


def resolve_jobs(spec: PipelineSpec, document: Document) -> dict[str, tuple[JobConfig, Document]]:
    """Return the checked spec of every job, and its document. `document` is that of `spec`."""
    jobs: dict[str, tuple[JobConfig, Document]] = {}
    for name, job in spec.jobs.items():
        around = ("jobs", name)
        if _record(name) in (MARK, LEASE):
            raise UserError(document.place(around), f"{name} is the name of another file in `state`", "rename the job")
        changes = substitute(job.set, spec.vars, document.place((*around, "set")))
        changed = read_document(job.spec, document.folder_of((*around, "spec"))).overlaid(
            changes, document.place_under(*around, "set"), document.folder_under(*around, "set")
        )
        resolved = check(changed)
        if isinstance(resolved, PipelineSpec):
            raise UserError(document.place(around), f"{name} is a pipeline itself", "name a job of another kind")
        named_specs(resolved, changed)
        jobs[name] = (resolved, changed)
    return jobs


def named(spec: PipelineSpec, document: Document) -> list[JobConfig]:
    """Return the specs of the jobs, and of those that they name."""
    jobs = resolve_jobs(spec, document).values()
    return [one for job, source in jobs for one in (job, *named_specs(job, source))]


_Jobs = Mapping[str, tuple[JobConfig, Document]]


def run(spec: PipelineSpec, document: Document) -> dict[str, Any]:
    """Run the jobs that are not done, all with one connection to Ray."""
    jobs = resolve_jobs(spec, document)
    state = open_store(str(substitute(spec.state, spec.vars, "state")), spec.endpoint)
    if not is_local(state.url):
        state.ensure_bucket()  # whether a job was done is looked up in it
    num_done, key = _done_before(jobs, state, spec.endpoint)
    for job, _ in [*jobs.values()][num_done : num_done + 1]:
        check_inputs(job)  # before Ray starts, and before `state` is made
    started_s = time.monotonic()
    with hold_output(state, "pipeline", "runs a pipeline") as lease, ray_cluster():
        outputs = _run_jobs(jobs, num_done, key, state, spec.endpoint, lease)
    say(f"{spec.name} complete in {duration(time.monotonic() - started_s)}", "bold")
    return {"outputs": outputs}


def _run_jobs(jobs: _Jobs, num_done: int, key: str, state: Store, endpoint: str | None, lease: Lease) -> list[str]:
    """Run the jobs that are not done, one after the other. Return the outputs of the last one that was run.

    The first `num_done` are done. `key` is that of the last of them.
    """
    outputs: list[str] = []
    for number, (name, (job, source)) in enumerate(jobs.items(), start=1):
        title = f"[{number}/{len(jobs)}] {name} ({job.kind})"
        is_done = number <= num_done
        if not is_done:
            key = _key(job, source, key)
            is_done = _is_done(state, name, key, endpoint)
        if is_done:
            say(f"{title}: done before", "dim")
            continue
        say(title, "bold")
        begun_s = time.monotonic()
        state.delete(_record(name))
        result = run_spec(job, source)
        outputs = result["outputs"]
        elapsed_s = round(time.monotonic() - begun_s, 1)
        record = {"key": key, "elapsed_s": elapsed_s, "result": result}
        lease.check()
        state.write(_record(name), as_json(record))
        say(f"  done in {duration(elapsed_s)}", "dim")
    return outputs


def _done_before(jobs: _Jobs, state: Store, endpoint: str | None) -> tuple[int, str]:
    """Return how many jobs from the first one on were done before, and the key of the last of them."""
    key = ""
    for number, (name, (job, source)) in enumerate(jobs.items()):
        key_of_job = _key(job, source, key)
        if not _is_done(state, name, key_of_job, endpoint):
            return number, key
        key = key_of_job
    return len(jobs), key


@stored_file
class _Result(TypedDict):
    outputs: list[str]


@stored_file
class RecordFile(TypedDict):
    """Record of a finished job."""

    key: str
    result: _Result


def _record(name: str) -> str:
    return f"{name}.json"


def _key(job: JobConfig, document: Document, before: str) -> str:
    """Return what identifies a job's work: its settings, all jobs before it, and the raw files that it reads."""
    specs = [job, *named_specs(job, document)]
    content: list[Any] = [before, *(spec.model_dump(mode="json", exclude={"submit"}) for spec in specs)]
    if (raw := raw_input(job)) is not None:
        content.append(raw)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _is_done(state: Store, name: str, key: str, endpoint: str | None) -> bool:
    """Return whether the job was done with the same key and its outputs still exist."""
    if not state.exists(_record(name)):
        return False
    place = f"{state.url}/{_record(name)}"
    record = parse_json(state.read(_record(name)), place, RecordFile, "delete the file to run the job again")
    return record["key"] == key and all(exists(url, endpoint) for url in record["result"]["outputs"])
