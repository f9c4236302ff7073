"""`rzen submit`: a spec to a Ray cluster's job server, its log to this terminal."""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs.progress import say
from pipelines.errors import UserError

# Not sent along: history, environments and results.
EXCLUDES = [".git", ".venv", "runs", "**/__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache"]


def submit(spec: str, overrides: Sequence[str], address: str | None, working_dir: str, *, wait: bool) -> int:
    """Submits `python -m jobs.run SPEC ...`; exit status 0 if the job succeeded (or was accepted, without `wait`).

    Raises `UserError` if no cluster answers or the spec is not in the working directory.
    """
    from ray.job_submission import JobStatus, JobSubmissionClient

    folder = Path(working_dir).resolve()
    path = Path(spec).resolve()
    if not path.is_relative_to(folder):
        raise UserError(spec, f"is not inside {folder}", "name another --working-dir")
    server = address or os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265"
    try:
        client = JobSubmissionClient(server)
    except (ConnectionError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise UserError(server, f"no Ray cluster answers ({first})", "start one, or name its --address") from error
    command = ["python", "-m", "jobs.run", str(path.relative_to(folder))]
    command += [word for text in overrides for word in ("--set", text)]
    job = client.submit_job(
        entrypoint=shlex.join(command), runtime_env={"working_dir": str(folder), "excludes": EXCLUDES}
    )
    say(f"submitted {job} to {server}")
    if not wait:
        return 0
    asyncio.run(_follow(client, job))
    status = client.get_job_status(job)
    say(f"{job} {status.value.lower()}")
    return 0 if status == JobStatus.SUCCEEDED else 1


async def _follow(client: object, job: str) -> None:
    async for text in client.tail_job_logs(job):  # type: ignore[attr-defined]
        sys.stdout.write(text)
        sys.stdout.flush()
