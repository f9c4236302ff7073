"""Jobs that are killed as soon as they have done something."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ray

from tests.paths import ROOT


def run_until_a_part_is_stored(spec: Path, folder: Path, pattern: str) -> None:
    """Run a spec on the connected Ray, and kill the job with SIGKILL when `folder` has a file of this pattern."""
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    job = subprocess.Popen([sys.executable, "-m", "jobs.run", str(spec)], cwd=ROOT, env=environment)
    try:
        while not list(folder.glob(pattern)) and job.poll() is None:
            time.sleep(0.005)
    finally:
        job.send_signal(signal.SIGKILL)
        job.wait()
    time.sleep(3)  # its actors end with it, some time later
