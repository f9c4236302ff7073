"""How fast the feed is, against a bare loop of the same decoding, and against the feeds of others.

    python -m tests.benchmarks.feed --write --streaming FOLDER     about 15 minutes on two cores; writes feed.md
    python -m tests.benchmarks.feed --tables disk --kinds images --repeats 1       a glance

Tables: `disk` and `s3` compare the ways of `contenders.py` and `ray_contenders.py`, `stages` has the CPU of each step
of our feed, and `scale` is `feed_scale.py`.

The ways take turns (bare, reader, ray, ..., bare, reader, ...), so that a slow minute hits all of them, and ratios are
to the bare loop of the same turn. A turn starts a feed, lets it run for `warm_s` after its first batch, measures for
`measured_s`, and ends it. The processes that start the feeds stay, and so does the Ray of the ways that need one. The
first turn is the cold one: no process of it has imported anything. CPU seconds are those of the whole machine, with the
S3 server where there is one. Nothing else should run on the machine. Files are in the page cache.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from jobs.runtime.local_s3 import CREDENTIALS, s3_server
from tests.benchmarks import feed_scale, files
from tests.benchmarks.contenders import WORKERS, Result, Run
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.turns import ROOT, Host, say, show, spread

NUM_SAMPLES = {"images": 2048, "pages": 512, "clips": 256}
FEED = {"images": 128, "pages": 32, "clips": 32}  # samples of a task: some tenths of a second each
VERSIONS = ("ray", "torch", "webdataset", "pillow", "pymupdf", "av", "numpy")
WAYS = {
    "bare": "bare loop",
    "reader": "our feed without Ray",
    "ray": "our feed with Ray",
    "webdataset": "webdataset, DataLoader",
    "streaming": "MosaicML Streaming, DataLoader",
    "raydata": "Ray Data, read_webdataset",
}
S3_WAYS = ("reader", "ray", "webdataset", "raydata")
ON_RAY = ("ray", "raydata", "stages")
TABLES = ("disk", "s3", "stages", "scale")
_PLACES = ("--data", "--streaming")

Results = dict[tuple[str, str], list[Result]]  # (kind of samples, way) -> one for each turn


def arguments() -> argparse.Namespace:
    """From the command line."""
    parser = argparse.ArgumentParser(
        "python -m tests.benchmarks.feed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=[*TABLES], help="to measure (all)")
    parser.add_argument("--kinds", nargs="+", choices=files.KINDS, default=[*files.KINDS], help="of samples (all)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS], help="to feed (all); bare always runs")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each way (5)")
    parser.add_argument("--warm-s", type=float, default=3.0, help="seconds from the first batch on, not measured (3)")
    parser.add_argument("--measured-s", type=float, default=4.0, help="seconds that are measured after them (4)")
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
    parser.add_argument("--store-mb", type=int, default=2000, help="size of Ray's object store (2000)")
    parser.add_argument("--write", action="store_true", help="replace feed.md next to this file")
    parser.add_argument("--host", metavar="MB", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Makes the files, measures, prints."""
    chosen = arguments()
    if chosen.host is not None:
        Host.serve(_answer, _host_context(chosen.host))
        return
    begun_s = time.monotonic()
    weights = {}
    for kind in chosen.kinds if set(chosen.tables) - {"scale"} else ():
        weights[kind] = files.make(chosen.data / kind, kind, num_samples(kind), chosen.seed)
        say(f"{num_samples(kind)} {kind} of {weights[kind]}")
    versions = {"Python": platform.python_version()} | {name: version(name) for name in VERSIONS}
    sections = []
    if "disk" in chosen.tables:
        sections += ["", "## On disk", "", *_disk(chosen, versions)]
    if "s3" in chosen.tables:
        sections += ["", "## From S3", "", *_s3(chosen)]
    if "stages" in chosen.tables:
        sections += ["", "## By stage", "", *_stages(chosen)]
    if "scale" in chosen.tables:
        sections += ["", "## Many ranks", "", *feed_scale.section()]
    took = f"Measured in {(time.monotonic() - begun_s) / 60:.0f} minutes."
    show("\n".join([*_head(chosen, weights, versions), took, *sections]) + "\n", __file__, write=chosen.write)


def num_samples(kind: str) -> int:
    """Whole batches for each worker, and equally many in each shard."""
    unit = math.lcm(WORKERS * Run.samples_per_worker, files.NUM_SHARDS)
    return max(1, round(NUM_SAMPLES[kind] / unit)) * unit


def _disk(chosen: argparse.Namespace, versions: dict[str, str]) -> list[str]:
    ways = ["bare", *(way for way in WAYS if way in chosen.ways and way != "bare")]
    results: Results = {}
    for kind in chosen.kinds:
        with _hosts(chosen) as measure:
            present = list(ways)
            if "streaming" in ways:
                # Its shards are written before anything is measured.
                found = measure(_run(chosen, "convert", kind))["version"]
                present = [way for way in ways if way != "streaming" or found]
                versions |= {"mosaicml-streaming": found} if found else {}
            runs = {(kind, way): _run(chosen, way, kind) for way in present}
            results |= _turns(measure, runs, chosen.repeats)
    return table(results, chosen.kinds, ways)


def _s3(chosen: argparse.Namespace) -> list[str]:
    ways = ["bare", *(way for way in S3_WAYS if way in chosen.ways)]
    kind = chosen.kinds[0]
    with s3_server() as endpoint, _hosts(chosen, **CREDENTIALS) as measure:
        runs = {(kind, way): _run(chosen, way, kind) for way in ways}
        remote = replace(_run(chosen, "upload", kind), endpoint=endpoint)
        url = measure(remote)["url"]
        runs |= {
            (kind, way): replace(run, root=url, endpoint=endpoint) for (_, way), run in runs.items() if way != "bare"
        }
        return table(_turns(measure, runs, chosen.repeats), [kind], ways)


def _stages(chosen: argparse.Namespace) -> list[str]:
    found: dict[str, list[dict[str, float]]] = {}
    for kind in chosen.kinds:
        with _hosts(chosen) as measure:
            found[kind] = [measure(_run(chosen, "stages", kind)) for _ in range(chosen.repeats)]
    names = list(next(iter(found.values()))[0])
    lines = [
        "CPU milliseconds a sample in one process, with the encoder of a tiny model of the paper's patch size.",
        "",
        f"| samples | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
    ]
    for kind, turns in found.items():
        lines.append(f"| {kind} | {' | '.join(spread([turn[name] for turn in turns], '.2f') for name in names)} |")
    return lines


def _turns(measure: Any, runs: dict[tuple[str, str], Run], repeats: int) -> Results:
    """Every way in turn, `repeats` times. Stops where a run fails."""
    results: Results = {place: [] for place in runs}
    for turn in range(repeats):
        for place, run in runs.items():
            found = Result(**measure(run))
            results[place].append(found)
            say(
                f"turn {turn + 1} {' '.join(place)}: {found.per_s:.1f} samples/s for {found.wall_s:.1f} s,"
                f" {found.per_cpu_s:.1f} a CPU second, first batch after {found.first_batch_s:.1f} s"
            )
    return results


def table(results: Results, kinds: Sequence[str], ways: Sequence[str]) -> list[str]:
    """Markdown: ratios first. A way without results is not installed."""
    lines = [
        "| samples | way | of bare, by the clock | of bare, by CPU | samples/s | samples/CPU s | first batch, s: cold"
        " | warm | its CPU, s: cold | warm |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for kind in kinds:
        bare = results[kind, "bare"]
        for way in ways:
            runs = results.get((kind, way))
            if runs is None:
                lines.append(f"| {kind} | {WAYS[way]} | not installed | | | | | | | |")
                continue
            cells = [
                spread([run.per_s / base.per_s for run, base in zip(runs, bare, strict=True)], ".2f"),
                spread([run.per_cpu_s / base.per_cpu_s for run, base in zip(runs, bare, strict=True)], ".2f"),
                spread([run.per_s for run in runs], ".0f"),
                spread([run.per_cpu_s for run in runs], ".0f"),
                f"{runs[0].first_batch_s:.1f}",
                _median([run.first_batch_s for run in runs[1:]]),
                f"{runs[0].first_batch_cpu_s:.1f}",
                _median([run.first_batch_cpu_s for run in runs[1:]]),
            ]
            lines.append(f"| {kind} | {WAYS[way]} | {' | '.join(cells)} |")
    return lines


def _median(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f}" if values else ""


def _head(chosen: argparse.Namespace, weights: dict[str, str], versions: dict[str, str]) -> list[str]:
    sizes = "; ".join(f"{num_samples(kind)} {kind} of {weight}" for kind, weight in weights.items())
    return [
        "# How fast the feed is",
        "",
        f"Medians of {chosen.repeats} turns, smallest and largest in brackets; `feed.py` describes the measurement.",
        "",
        f"* {describe_machine()}: `{_command()}`",
        f"* {', '.join(f'{name} {number}' for name, number in versions.items())}",
        f"* files, smallest - median - largest: {sizes}",
        f"* a turn: {chosen.warm_s:g} s after the first batch, then {chosen.measured_s:g} s measured",
        "",
    ]


def _command() -> str:
    """What reproduces the table; where the files were does not matter."""
    words = [f"<{before[2:]}>" if before in _PLACES else word for before, word in pairwise(sys.argv)]
    return " ".join(["python -m tests.benchmarks.feed", *words])


def _run(chosen: argparse.Namespace, way: str, kind: str) -> Run:
    return Run(
        way,
        str((chosen.data / kind).absolute()),
        kind,
        warm_s=chosen.warm_s,
        measured_s=chosen.measured_s,
        feed={"samples_per_task": FEED[kind]} | chosen.feed,
        streaming=chosen.streaming,
    )


@contextmanager
def _hosts(chosen: argparse.Namespace, **environment: str) -> Iterator[Any]:
    """Yield a function that measures a run in a process of its own kind: one with Ray, one for all other ways.

    Processes have one thread each, and no token of another Ray on the machine. They start when they are first needed.
    """
    variables = environment | {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    hosts: dict[bool, Host] = {}
    with ExitStack() as stack:

        def measure(run: Run) -> dict[str, Any]:
            on_ray = run.way in ON_RAY
            if on_ray not in hosts:
                size = str(chosen.store_mb if on_ray else 0)
                hosts[on_ray] = stack.enter_context(Host("tests.benchmarks.feed", "--host", size, **variables))
            found: dict[str, Any] = hosts[on_ray].ask(asdict(run))
            return found

        yield measure


@contextmanager
def _host_context(store_mb: int) -> Iterator[None]:
    if store_mb == 0:
        yield
        return
    from jobs.runtime.cluster import set_environment

    set_environment()  # as a job does
    from tests.benchmarks.ray_contenders import own_ray

    with own_ray(store_mb << 20):
        yield


def _answer(given: dict[str, Any]) -> dict[str, Any]:
    from tests.benchmarks.contenders import CONTENDERS, convert, upload

    run = Run(**given)
    if run.way == "convert":
        return {"version": convert(run)}
    if run.way == "upload":
        return {"url": upload(run)}
    if run.way not in ON_RAY:
        return asdict(CONTENDERS[run.way](run))
    from tests.benchmarks import ray_contenders

    if run.way == "stages":
        return ray_contenders.run_stages(run)
    return asdict({"ray": ray_contenders.run_ray, "raydata": ray_contenders.run_raydata}[run.way](run))


if __name__ == "__main__":
    main()
