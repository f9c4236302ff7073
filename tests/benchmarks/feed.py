"""How fast the feed is, against a bare loop of the same decoding, webdataset and MosaicML Streaming.

    python -m tests.benchmarks.feed --write                          about 20 minutes on two cores; writes feed.md
    python -m tests.benchmarks.feed --kinds images --repeats 1       a glance

Each run is a process of its own that decodes one epoch of files in the page cache. The ways take turns (bare, reader,
ray, webdataset, streaming, bare, reader, ...), so that a slow minute hits all of them, and ratios are to the bare loop
of the same turn. The clock runs from a quarter of the samples delivered to three quarters; the time to the first batch
is reported separately. CPU seconds are those of the whole machine in that time. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.benchmarks import files
from tests.benchmarks.contenders import CONTENDERS, WORKERS, Result, Run, convert
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.turns import ROOT, answer, say, show, spread

NUM_SAMPLES = {"images": 19200, "pages": 3072, "clips": 1728}
FEED = {"images": 128, "pages": 64, "clips": 32}  # samples of a task: some tenths of a second each
VERSIONS = ("ray", "torch", "webdataset", "pillow", "pymupdf", "av", "numpy")
WAYS = {
    "bare": "bare loop",
    "reader": "our feed without Ray",
    "ray": "our feed with Ray",
    "webdataset": "webdataset, DataLoader",
    "streaming": "MosaicML Streaming, DataLoader",
}

_PLACES = ("--data", "--streaming")

Results = dict[tuple[str, str], list[Result]]  # (kind of samples, way) -> one for each turn


def arguments() -> argparse.Namespace:
    """From the command line."""
    parser = argparse.ArgumentParser(
        "python -m tests.benchmarks.feed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", choices=files.KINDS, default=[*files.KINDS], help="of samples (all)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS], help="to feed (all); bare always runs")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each way (5)")
    parser.add_argument("--size", type=float, default=1.0, help="samples of a run, relative to ten seconds' (1.0)")
    parser.add_argument("--seed", type=int, default=0, help="of the files (0)")
    parser.add_argument(
        "--data", type=Path, default=ROOT / "runs/benchmark-feed", help="folder of the files, made at the first run"
    )
    parser.add_argument(
        "--streaming",
        metavar="FOLDER",
        help="where MosaicML Streaming is: it wants other versions than this project, so that nothing installs it."
        " pip install --no-deps --target FOLDER mosaicml-streaming brotli zstd python-snappy cramjam catalogue xxhash",
    )
    parser.add_argument(
        "--feed", type=json.loads, default={}, help='settings of the feed with Ray, {"prefetch_tasks": 2}'
    )
    parser.add_argument("--write", action="store_true", help="replace feed.md next to this file")
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Makes the files, measures, prints."""
    chosen = arguments()
    if chosen.run is not None:
        print(json.dumps(_answer(Run(**chosen.run))))
        return
    weights = {}
    for kind in chosen.kinds:
        weights[kind] = files.make(chosen.data / kind, kind, num_samples(kind, chosen.size), chosen.seed)
        say(f"{num_samples(kind, chosen.size)} {kind} of {weights[kind]}")
    ways = ["bare", *(way for way in WAYS if way in chosen.ways and way != "bare")]
    streaming = _converted(chosen) if "streaming" in ways else None
    results = measure(chosen, [way for way in ways if way != "streaming" or streaming])
    versions = {"Python": platform.python_version()} | {name: version(name) for name in VERSIONS}
    if streaming:
        versions["mosaicml-streaming"] = streaming
    report = "\n".join([*_head(chosen, weights, versions), "", *table(results, chosen.kinds, ways)]) + "\n"
    show(report, __file__, write=chosen.write)


def num_samples(kind: str, size: float) -> int:
    """Whole batches for each worker, and equally many in each shard."""
    unit = math.lcm(WORKERS * Run.samples_per_worker, files.NUM_SHARDS)
    return max(1, round(NUM_SAMPLES[kind] * size / unit)) * unit


def measure(chosen: argparse.Namespace, ways: Sequence[str]) -> Results:
    """Every way in turn, `repeats` times. Stops where a run fails."""
    results: Results = {(kind, way): [] for kind in chosen.kinds for way in ways}
    for turn in range(chosen.repeats):
        for kind, way in results:
            result = Result(**_spawned(_run(chosen, way, kind)))
            results[kind, way].append(result)
            say(
                f"turn {turn + 1} {kind} {way}: {result.per_s:.1f} samples/s for {result.wall_s:.1f} s,"
                f" {result.per_cpu_s:.1f} a CPU second, first batch after {result.first_batch_s:.1f} s"
            )
    return results


def table(results: Results, kinds: Sequence[str], ways: Sequence[str]) -> list[str]:
    """Markdown: ratios first. A way without results is not installed."""
    lines = [
        "| samples | way | of bare, by the clock | of bare, by CPU | samples/s | samples/CPU s | first batch, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in kinds:
        bare = results[kind, "bare"]
        for way in ways:
            runs = results.get((kind, way))
            if runs is None:
                lines.append(f"| {kind} | {WAYS[way]} | not installed | | | | |")
                continue
            cells = [
                spread([run.per_s / base.per_s for run, base in zip(runs, bare, strict=True)], ".2f"),
                spread([run.per_cpu_s / base.per_cpu_s for run, base in zip(runs, bare, strict=True)], ".2f"),
                spread([run.per_s for run in runs], ".0f"),
                spread([run.per_cpu_s for run in runs], ".0f"),
                spread([run.first_batch_s for run in runs], ".1f"),
            ]
            lines.append(f"| {kind} | {WAYS[way]} | {' | '.join(cells)} |")
    return lines


def _head(chosen: argparse.Namespace, weights: dict[str, str], versions: dict[str, str]) -> list[str]:
    sizes = "; ".join(f"{num_samples(kind, chosen.size)} {kind} of {weight}" for kind, weight in weights.items())
    return [
        "# How fast the feed is",
        "",
        f"Medians of {chosen.repeats} turns, smallest and largest in brackets; `feed.py` describes the measurement.",
        "",
        f"* {describe_machine()}: `{_command()}`",
        f"* {', '.join(f'{name} {number}' for name, number in versions.items())}",
        f"* files, smallest - median - largest: {sizes}",
    ]


def _command() -> str:
    """What reproduces the table; where the files were does not matter."""
    words = [f"<{before[2:]}>" if before in _PLACES else word for before, word in pairwise(sys.argv)]
    return " ".join(["python -m tests.benchmarks.feed", *words])


def _run(chosen: argparse.Namespace, way: str, kind: str) -> Run:
    feed = {"samples_per_task": FEED[kind]} | chosen.feed
    return Run(way, str((chosen.data / kind).absolute()), kind, feed=feed, streaming=chosen.streaming)


def _converted(chosen: argparse.Namespace) -> str | None:
    """The version of MosaicML Streaming, if it is there; the files then are in its format too."""
    versions: list[str | None] = [_spawned(_run(chosen, "convert", kind))["version"] for kind in chosen.kinds]
    return versions[0]


def _spawned(run: Run) -> dict[str, Any]:
    """The answer of a run in a process of its own. One thread each, and no token of another Ray on the machine."""
    words = ("--run", json.dumps(asdict(run)))
    found: dict[str, Any] = answer("tests.benchmarks.feed", *words, OMP_NUM_THREADS="1", RAY_AUTH_MODE="disabled")
    return found


def _answer(run: Run) -> dict[str, Any]:
    if run.way == "convert":
        return {"version": convert(run)}
    return asdict(CONTENDERS[run.way](run))


if __name__ == "__main__":
    main()
