"""A package with a kind of job that prints numbered lines until a file appears, as pip installs it."""

from pathlib import Path

CODE = '''\
"""Kind `ticks`: prints numbered lines until a file is there."""

import sys
import time
from pathlib import Path
from typing import Literal

from jobs.spec.job import JobConfig
from jobs.spec.kinds import Kind, no_gpus


class TicksSpec(JobConfig):
    """Print numbered lines."""

    kind: Literal["ticks"]
    """Must be `ticks`."""
    until: str
    """File that ends the job."""
    status: int = 0
    """Exit status of the job."""


def run(spec):
    number = 0
    while not Path(spec.until).exists() and number < 3000:
        print(f"line {number}", flush=True)
        number += 1
        time.sleep(0.1)
    print(f"ends after {number} lines", flush=True)
    sys.exit(spec.status)


TICKS = Kind(name="ticks", spec=TicksSpec, run="ticking:run", reads={}, makes={}, gpus=no_gpus)
'''


def write_ticking(folder: Path) -> None:
    """Write the package into a folder of `sys.path`."""
    metadata = folder / "ticking-1.0.dist-info"
    metadata.mkdir(parents=True)
    (folder / "ticking.py").write_text(CODE)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: ticking\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[rzen.kinds]\nticks = ticking:TICKS\n")
