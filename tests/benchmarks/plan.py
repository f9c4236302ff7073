"""What a billion samples in a million shards cost one process: start, memory, and the next batch of one rank.

    python -m tests.benchmarks.plan            prints the table: five minutes, 3 GB
    python -m tests.benchmarks.plan --write    and replaces tests/benchmarks/plan.md

Each repeat is a process of its own, which reads the manifest, builds the plan and walks through it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from pipelines.config import MixtureConfig
from pipelines.plan.build import build_plan
from pipelines.plan.plan import Plan
from pipelines.plan.types import SourceTable
from pipelines.shards.manifest import Manifest, ShardInfo, SourceInfo, publish_manifest, read_manifest
from pipelines.storage.location import open_store
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.turns import answer, show, spread

RANKS, BATCH, REPEATS, STEPS, SHARDS = 4096, 32768, 5, 2000, 1_000_000
CASES = {
    # name: (sources, samples of each, of these in duplicates, samples used of each)
    "100 sources of 10 million, 1% duplicates": (100, 10_000_000, 100_000, 10_000_000),
    "100 sources of 10 million, 100,000 of each used": (100, 10_000_000, 100_000, 100_000),
    "one source of a billion": (1, 1_000_000_000, 0, 1_000_000_000),
}
COLUMNS = {"manifest": "s", "plan": "s", "first pass over all sources": "s", "next batch": "ms", "peak memory": "MB"}


def publish(folder: str, sources: int, size: int) -> None:
    """A manifest as ingest writes it, without its shards."""
    infos = {}
    for source in (f"s{number:03d}" for number in range(sources)):
        shards = []
        for number in range(SHARDS // sources):
            sha256 = hashlib.sha256(f"{source} {number}".encode()).hexdigest()
            path = f"train/{source}/{source}-{number:06d}.tar"
            shards.append(ShardInfo(path, size * sources // SHARDS, 300_000_000, sha256, sha256[::-1]))
        infos[source] = SourceInfo("task", size, tuple(shards), duplicates_sha256=sha256)
    publish_manifest(open_store(folder), Manifest("train", infos))


def measure(folder: str, sources: int, size: int, duplicates: int, used: int) -> dict[str, float]:
    """One repeat, in this process: the numbers of `COLUMNS`."""
    begun_s = time.perf_counter()
    manifest = read_manifest(open_store(folder), "train")
    manifest_s = time.perf_counter() - begun_s
    rng = np.random.default_rng(0)
    tables = {}
    for name, source in manifest.sources.items():
        samples = np.unique(rng.integers(0, size, duplicates))
        tables[name] = SourceTable(source.num_samples, samples, rng.integers(0, duplicates // 3 + 1, len(samples)))
    begun_s = time.perf_counter()
    plan = build_plan(tables, MixtureConfig(max_samples_per_source=used), global_batch=BATCH, steps=100_000)
    plan.fingerprint()
    plan_s = time.perf_counter() - begun_s
    _, sweep_s = _walk(plan, 0, 10 * sources)  # every process makes the order of each source's epoch once
    each_s, _ = _walk(plan, 10 * sources, 10 * sources + STEPS)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return dict(zip(COLUMNS, (manifest_s, plan_s, sweep_s, 1e3 * each_s, peak_mb), strict=True))


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
    parser.add_argument("--write", action="store_true", help="replace plan.md next to this file")
    parser.add_argument("--case", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        name, folder = options.case
        print(json.dumps(measure(folder, *CASES[name])))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory() as root:
        for name, (sources, size, *_) in CASES.items():
            publish(str(Path(root, name)), sources, size)
        for _ in range(REPEATS):  # interleaved, as the machine is shared
            for name, rows in found.items():
                rows.append(answer(__spec__.name, "--case", name, str(Path(root, name))))
    lines = [
        f"# The plan: {SHARDS:,} shards, one of {RANKS:,} ranks, global batches of {BATCH:,}",
        "",
        f"{describe_machine()}. Median of {REPEATS} (smallest to largest). `python -m tests.benchmarks.plan --write`",
        "",
        f"| | {' | '.join(f'{name}, {unit}' for name, unit in COLUMNS.items())} |",
        f"|---|{'---:|' * len(COLUMNS)}",
    ]
    for name, rows in found.items():
        cells = [spread([row[column] for row in rows], ".3g") for column in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    table = "\n".join(lines) + "\n"
    show(table, __file__, write=options.write)


if __name__ == "__main__":
    main()
