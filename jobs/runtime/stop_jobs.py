"""Stops the submitted jobs of a Ray cluster and waits for their ends: `python -m jobs.runtime.stop_jobs 80`.

The head's pod runs it before it is deleted (`preStop` in infra/kuberay/base/raycluster.yaml). A Ray head that ends
kills the drivers of its jobs. A driver that is stopped has time for a last checkpoint, and gives back its leases.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time

from pipelines.errors import UserError

_POLL_S = 0.5
_log = logging.getLogger(__name__)


def stop_jobs(address: str, patience_s: float) -> list[str]:
    """Stop all jobs, and wait for them, up to `patience_s`. Return the ids of those that have not ended.

    Raise `UserError` if no job server answers.
    """
    from jobs.runtime.job_server import Access, JobServer, Unreachable

    deadline_s = time.monotonic() + patience_s
    client = JobServer(Access(address)).client
    try:
        jobs = client.list_jobs()
    except Unreachable as error:
        raise UserError(address, f"no job server answers ({error})", "check the dashboard of the head") from error
    left = [job.submission_id for job in jobs if job.submission_id and not job.status.is_terminal()]
    for job in left:
        _log.info("stopping %s", job)
        client.stop_job(job)
    while left and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)
        left = [job for job in left if not client.get_job_status(job).is_terminal()]
    return left


def main() -> None:
    """Stop the jobs of this machine's head. Log the jobs that have not ended in time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seconds", type=float, help="how long to wait for their ends")
    parser.add_argument("--address", default="http://127.0.0.1:8265", help="job server (%(default)s)")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        left = stop_jobs(options.address, options.seconds)
    except UserError as error:
        sys.exit(f"error: {error}")
    if left:
        _log.warning("not at their ends after %.0f s: %s", options.seconds, ", ".join(left))


if __name__ == "__main__":
    main()
