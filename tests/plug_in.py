"""Packages with their own kind of job, as pip installs them: a module, and the line of metadata that names the kind."""

from pathlib import Path

COUNT = '''\
"""Kind `count`: counts the lines of a file."""

import json
from pathlib import Path
from typing import Literal

from jobs.spec.job import JobConfig
from jobs.spec.kinds import Kind, no_gpus


class CountSpec(JobConfig):
    """Count the lines of a file."""

    kind: Literal["count"]
    """Must be `count`."""
    file: str
    """Text file to read."""
    out: str
    """JSON file to write."""


def run(spec):
    out = Path(spec.out)
    number = len(Path(spec.file).read_text().splitlines())
    runs = json.loads(out.read_text())["runs"] + 1 if out.exists() else 1
    out.write_text(json.dumps({"lines": number, "runs": runs}))
    return {"outputs": [spec.out], "lines": number}


def fingerprint(spec):
    return Path(spec.file).read_text()


COUNT = Kind(
    name="count",
    spec=CountSpec,
    run="counting:run",
    reads={"file": "text file"},
    makes={"out": "number of lines"},
    fingerprint="counting:fingerprint",
    gpus=no_gpus,
)
'''


TICKS = '''\
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


def write_plug_in(folder: Path, code: str = COUNT, module: str = "counting", kind: str = "count") -> None:
    """Write a package with one kind of job into a folder of `sys.path`."""
    metadata = folder / f"{module}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (folder / f"{module}.py").write_text(code)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[rzen.kinds]\n{kind} = {module}:{kind.upper()}\n")
