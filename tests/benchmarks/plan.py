"""What a plan costs at the scale of a billion samples: start, memory, and the next batch of one rank.

    python -m tests.benchmarks.plan            prints the table: two minutes, 3 GB
    python -m tests.benchmarks.plan --write    and replaces tests/benchmarks/plan.md

Each repeat is a process of its own, whose peak memory it reports.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from pipelines.config import MixtureConfig
from pipelines.plan import Plan, SourceTable, build_plan
from tests.benchmarks.machine import describe_machine

RANKS, BATCH, REPEATS, STEPS = 4096, 32768, 5, 2000
CASES = {
    # name: (sources, samples of each, of these in copies, samples used of each)
    "100 sources of 10 million, 1% copies": (100, 10_000_000, 100_000, 10_000_000),
    "100 sources of 10 million, 100,000 of each used": (100, 10_000_000, 100_000, 100_000),
    "one source of a billion": (1, 1_000_000_000, 0, 1_000_000_000),
}
COLUMNS = {"start": "s", "memory": "MB", "pass over all sources": "s", "next batch": "ms"}


def measure(sources: int, size: int, copies: int, used: int) -> dict[str, float]:
    """One repeat, in this process: the numbers of `COLUMNS`."""
    rng = np.random.default_rng(0)
    tables = {}
    for number in range(sources):
        samples = np.unique(rng.integers(0, size, copies))
        tables[f"s{number:03d}"] = SourceTable(size, samples, rng.integers(0, copies // 3 + 1, len(samples)))
    begun_s = time.perf_counter()
    plan = build_plan(tables, MixtureConfig(max_samples_per_source=used), global_batch=BATCH, steps=100_000)
    plan.fingerprint()
    start_s = time.perf_counter() - begun_s
    _, sweep_s = _walk(plan, 0, 10 * sources)  # every process makes the order of each source's epoch once
    each_s, _ = _walk(plan, 10 * sources, 10 * sources + STEPS)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return dict(zip(COLUMNS, (start_s, peak_mb, sweep_s, 1e3 * each_s), strict=True))


def _walk(plan: Plan, first: int, stop: int) -> tuple[float, float]:
    """Seconds a step, and in all, of one rank's shares of these steps."""
    begun_s = time.perf_counter()
    for step in range(first, stop):
        plan.batch(step, step % RANKS, RANKS)
    total_s = time.perf_counter() - begun_s
    return total_s / (stop - first), total_s


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace plan.md beside this file")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(*CASES[options.case])))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CASES}
    for _ in range(REPEATS):  # interleaved, as the machine is shared
        for name, rows in found.items():
            command = [sys.executable, "-m", __spec__.name, "--case", name]
            rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    lines = [
        f"# The plan: one of {RANKS} ranks, global batches of {BATCH}",
        "",
        f"{describe_machine()}. Median of {REPEATS} (smallest to largest). `python -m tests.benchmarks.plan --write`",
        "",
        f"| | {' | '.join(f'{name}, {unit}' for name, unit in COLUMNS.items())} |",
        f"|---|{'---:|' * len(COLUMNS)}",
    ]
    for name, rows in found.items():
        cells = [_cell([row[column] for row in rows]) for column in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    table = "\n".join(lines) + "\n"
    print(table)
    if options.write:
        Path(__file__).with_suffix(".md").write_text(table, encoding="utf-8")


def _cell(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


if __name__ == "__main__":
    main()
