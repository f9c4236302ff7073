"""Submits a spec to the job server of a Ray cluster and prints the log of the job."""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.runtime.progress import say
from jobs.spec.job import SubmitConfig
from pipelines.errors import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

# Not sent to the cluster: history, environments and results.
EXCLUDES = [".git", ".venv", "runs", "**/__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"]
# By default Ray kills a job three seconds after it was stopped. That is too soon for a last checkpoint.
ENVIRONMENT = {"RAY_JOB_STOP_WAIT_TIME_S": "60"}
DEFAULT_ADDRESS = "http://127.0.0.1:8265"


def submit(
    spec: str,
    overrides: Sequence[str],
    address: str | None,
    working_dir: str,
    config: SubmitConfig,
    *,
    wait: bool,
) -> int:
    """Submit `python -m rzen run SPEC ...`. Return its exit status, or 0 without `wait`.

    A job whose process was lost is submitted again, as often as `config` says. Raise `UserError` if no cluster answers
    or the spec is not in the working directory.
    """
    from ray.job_submission import JobStatus

    folder = Path(working_dir).resolve()
    path = Path(spec).resolve()
    if not path.is_relative_to(folder):
        raise UserError(spec, f"is not inside {folder}", "name another --working-dir")
    server = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    client = _client(server)
    command = ["python", "-m", "rzen", "run", str(path.relative_to(folder))]
    command += [word for text in overrides for word in ("--set", text)]
    for attempt in range(config.retries + 1):
        job = client.submit_job(
            entrypoint=shlex.join(command),
            runtime_env={"working_dir": str(folder), "excludes": EXCLUDES, "env_vars": ENVIRONMENT | config.env},
            entrypoint_num_cpus=config.cpus or None,
            entrypoint_memory=config.memory_bytes or None,
            metadata={"rzen": str(path.relative_to(folder))},
        )
        say(f"submitted {job} to {server}")
        say(f"  dashboard  {client.get_address()}/#/jobs/{job}", "dim")
        say(f"  follow     ray job logs --follow {job}", "dim")
        say(f"  stop       ray job stop {job}       the same command then resumes from the last checkpoint", "dim")
        if not wait:
            return 0
        try:
            asyncio.run(_follow(client, job))
        except KeyboardInterrupt:
            say(f"\n{job} continues; stop it with: ray job stop {job}", "yellow")
            return 130
        details = client.get_job_info(job)
        status = _exit_status(details)
        say(f"{job} {details.status.value.lower()}{f', exit status {status}' if status else ''}")
        if details.status != JobStatus.FAILED or details.driver_exit_code is not None or attempt == config.retries:
            return status
        say(f"  its process was lost ({details.message}); attempt {attempt + 2} of {config.retries + 1}", "yellow")
    raise AssertionError("the last attempt returns")


def _client(server: str) -> JobSubmissionClient:
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(server)
    except AuthenticationError as error:
        first = str(error).strip().splitlines()[0]
        fix = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the token of the cluster"
        raise UserError(server, f"asks for a token ({first})", fix) from error
    except (ConnectionError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(server, f"no Ray cluster answers ({first})", "start one, or name its --address") from error


def _exit_status(details: JobDetails) -> int:
    """Return 0 for a job that succeeded, else its exit status, or 1 if it has none."""
    from ray.job_submission import JobStatus

    if details.status == JobStatus.SUCCEEDED:
        return 0
    code = details.driver_exit_code
    return int(code) if code and 0 < code < 256 else 1


async def _follow(client: JobSubmissionClient, job: str) -> None:
    async for text in client.tail_job_logs(job):
        sys.stdout.write(text)
        sys.stdout.flush()
