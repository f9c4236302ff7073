"""A package with its own kind of job, as pip installs it: a module, and the line of metadata that names the kind."""

from pathlib import Path

CODE = '''\
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


def write_plug_in(folder: Path) -> None:
    """Write the package into a folder of `sys.path`."""
    metadata = folder / "counting-1.0.dist-info"
    metadata.mkdir(parents=True)
    (folder / "counting.py").write_text(CODE)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: counting\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[rzen.kinds]\ncount = counting:COUNT\n")
