"""Memory of the process of `rzen curate` with the features of many samples.

    python -m tests.benchmarks.curate_memory            prints the table: 3 minutes, 4 GB of TMPDIR
    python -m tests.benchmarks.curate_memory --write    and replaces tests/benchmarks/curate_memory.md

Each number of samples has a process of its own. Query and target of a sample have a picture and 40 words each.
Anonymous memory is that which no file backs: the system cannot take it back.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import numpy as np

from pipelines.curate.exact import find_exact
from pipelines.curate.samples import Samples, Verdicts
from pipelines.curate.settings import ExactRule
from pipelines.curate.tables import MediaTable, TextTable
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.turns import show
from tests.curation import anonymous_mb, random_features

COUNTS = (10_000, 100_000, 1_000_000)
_PER_FILE = 10_000


def measure(num_samples: int) -> dict[str, float]:
    """Load features and apply the rule `exact`. Return what this process needed."""
    texts, media = random_features(_PER_FILE, 0)
    before = anonymous_mb()
    start_s = time.perf_counter()
    repeats = 2 * num_samples // _PER_FILE
    table = TextTable.of([texts] * repeats)
    pictures = MediaTable.of([media] * repeats)
    loaded, seconds = anonymous_mb() - before, time.perf_counter() - start_s
    in_files = sum(one.nbytes for one in (table.min_hash, table.ngrams, table.texts, pictures.grids)) / 1e6
    samples = Samples(("a",), ("a",), np.array([0, num_samples]), table, pictures)
    drops = find_exact(samples, Verdicts.of(num_samples).keep, ExactRule(), "all")
    assert len(drops) == num_samples - _PER_FILE // 2
    return {"samples": num_samples, "loaded": loaded, "seconds": seconds, "in_files": in_files}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace curate_memory.md next to this file")
    parser.add_argument("--one", type=int, help="only this number of samples, in this process, as JSON")
    options = parser.parse_args()
    if options.one:
        sys.stdout.write(json.dumps(measure(options.one)))
        return
    rows = []
    for count in COUNTS:
        command = [sys.executable, "-m", "tests.benchmarks.curate_memory", "--one", str(count)]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        rows.append(
            f"| {found['samples']:,} | {found['in_files']:,.0f} | {found['loaded']:,.0f} | {found['seconds']:.1f} |"
        )
    table = [
        "# Memory of curation",
        "",
        f"{describe_machine()}. `python -m tests.benchmarks.curate_memory --write`",
        "",
        "| samples | large columns, MB of files | anonymous memory of all features, MB | seconds to load |",
        "|---:|---:|---:|---:|",
        *rows,
    ]
    show("\n".join(table) + "\n", __file__, write=options.write)


if __name__ == "__main__":
    main()
