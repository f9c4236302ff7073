"""What clusters cost: the order of one epoch of a source whose samples are all in clusters.

    python -m tests.benchmarks.packing            prints the table: a minute, 1 GB
    python -m tests.benchmarks.packing --write    and replaces tests/benchmarks/packing.md

Each process of the data loader makes the order once for each source and epoch. Equal targets are those of as many draws
from nine tenths as many targets, so that two thirds of the samples share one.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from pipelines.config import MixtureConfig
from pipelines.plan.sources import PlanSource
from pipelines.plan.types import SourceTable
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.turns import show, spread

REPEATS = 5
CASES = [(100_000, 4, 768), (100_000, 32, 768), (1_000_000, 4, 768), (1_000_000, 32, 768), (1_000_000, 4, 32768)]
"""Samples, samples of a cluster, samples of a batch."""


def source_of(num_samples: int, cluster: int, batch: int, *, with_duplicates: bool) -> PlanSource:
    """A source whose clusters are random sets of samples."""
    rng = np.random.default_rng(0)
    every = np.arange(num_samples)
    duplicates = every if with_duplicates else every[:0]
    targets = rng.integers(0, num_samples * 9 // 10, len(duplicates))
    clusters = rng.permutation(every // cluster)
    table = SourceTable(num_samples, duplicates, targets, clustered=every, clusters=clusters)
    return PlanSource("a", {"a": table}, batch, 1, MixtureConfig(max_samples_per_source=num_samples), 0)


def measure(source: PlanSource) -> list[float]:
    """Seconds of the orders of some epochs."""
    found = []
    for epoch in range(REPEATS):
        begun_s = time.perf_counter()
        source.draw_epoch(0, epoch)
        found.append(time.perf_counter() - begun_s)
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace packing.md next to this file")
    options = parser.parse_args()
    lines = [
        "# Packing of clusters: the order of one epoch of a source",
        "",
        f"{describe_machine()}. Median of {REPEATS} epochs (smallest to largest).",
        "`python -m tests.benchmarks.packing --write`",
        "",
        "| samples | cluster | batch | no duplicates, s | two thirds share a target, s |",
        "|---:|---:|---:|---:|---:|",
    ]
    for case in CASES:
        cells = [spread(measure(source_of(*case, with_duplicates=some)), ".3g") for some in (False, True)]
        lines.append(f"| {' | '.join(f'{number:,}' for number in case)} | {' | '.join(cells)} |")
    show("\n".join(lines) + "\n", __file__, write=options.write)


if __name__ == "__main__":
    main()
