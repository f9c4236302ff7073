"""Kinds of index over synthetic vectors: recall, bytes, build time, memory and time of a query.

    python -m tests.benchmarks.index --write     # 1,000,000 x 256, about 15 minutes on 2 quiet cores, 6 GB of disk

The vectors lie around centers, 50 around each, with noise as large as a center. Each index is built in a process of
its own and searched in another one, whose memory is that of a server.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import pickle
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.storage.store import LocalStore
from rzen.index.bench import find_truth, num_bytes, score, timed_build
from rzen.index.build import open_index
from rzen.index.kinds import INDEX_KINDS, LOCAL_KINDS, IndexKind
from rzen.index.parts import Parts
from tests.benchmarks.machine import describe_machine

PER_PART, PER_CENTER = 10_000, 50
COLUMNS = ("index", "recall@10", "index, MB", "build, s", "p50, ms", "p95, ms", "memory of the searching process, MB")


def write_parts(folder: Path, count: int, width: int) -> Parts:
    """Write `count` unit vectors as the parts of a corpus."""
    store = LocalStore(folder)
    num_centers = max(1, count // PER_CENTER)
    centers = np.random.default_rng(0).standard_normal((num_centers, width), dtype=np.float32)
    paths = []
    for first in range(0, count, PER_PART):
        rng = np.random.default_rng(1 + first)
        rows = range(first, min(first + PER_PART, count))
        vectors = centers[rng.integers(0, num_centers, len(rows))]
        vectors += rng.standard_normal(vectors.shape, dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        names = [str(row) for row in rows]
        content: dict[str, Any] = {"split": ["train"] * len(rows), "source": ["s"] * len(rows), "index": rows}
        content |= {"modality": ["image"] * len(rows), "title": names, "origin": names, "target_sha256": names}
        content["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), width)
        sink = io.BytesIO()
        pq.write_table(pa.table(content), sink)
        paths.append(f"parts/{first:09}.parquet")
        store.write(paths[-1], sink.getvalue())
    return Parts(store, paths)


def _truth(folder: Path, paths: list[str], num_queries: int) -> None:
    truth = find_truth(Parts(LocalStore(folder), paths), num_queries, 10)
    (folder / "truth.pickle").write_bytes(pickle.dumps(truth))


def _build(folder: Path, paths: list[str], kind: IndexKind) -> None:
    entry, build_s = timed_build(kind, Parts(LocalStore(folder), paths), LocalStore(folder / kind))
    (folder / f"{kind}.json").write_text(json.dumps([entry, build_s]))


def _search(folder: Path, paths: list[str], kind: IndexKind) -> None:
    entry, build_s = json.loads((folder / f"{kind}.json").read_text())
    index = open_index(entry, Parts(LocalStore(folder), paths), root=LocalStore(folder / kind))
    recall, times_ms = score(index, pickle.loads((folder / "truth.pickle").read_bytes()))
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    memory_mb = int(status["RssAnon"].split()[0]) / 1e3
    size_mb = num_bytes(LocalStore(folder / kind)) / 1e6
    row = [recall, size_mb, build_s, *np.percentile(times_ms, [50, 95]).tolist(), memory_mb]
    (folder / f"{kind}.json").write_text(json.dumps(row))


def _in_child(function: Any, *arguments: Any) -> None:
    child = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    child.start()
    child.join()
    assert child.exitcode == 0, (function, arguments)


def measure(count: int, width: int, num_queries: int, kinds: list[IndexKind]) -> dict[IndexKind, list[float]]:
    """Return the figures of each kind, in the order of `COLUMNS` without the first."""
    found: dict[IndexKind, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="rzen-index-") as scratch:
        folder = Path(scratch)
        paths = write_parts(folder, count, width).paths
        _in_child(_truth, folder, paths, num_queries)
        for kind in kinds:
            _in_child(_build, folder, paths, kind)
            _in_child(_search, folder, paths, kind)
            found[kind] = json.loads((folder / f"{kind}.json").read_text())
            print(kind, [round(value, 3) for value in found[kind]], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--kinds", nargs="+", default=LOCAL_KINDS, choices=INDEX_KINDS)
    parser.add_argument("--write", action="store_true", help="write index.md")
    arguments = parser.parse_args()
    found = measure(arguments.count, arguments.width, arguments.queries, arguments.kinds)
    lines = [f"| {' | '.join(COLUMNS)} |", f"|---|{'---:|' * (len(COLUMNS) - 1)}"]
    for kind, (recall, size_mb, build_s, p50_ms, p95_ms, memory_mb) in found.items():
        cells = [f"{recall:.3f}", f"{size_mb:,.0f}", f"{build_s:.1f}", f"{p50_ms:.1f}", f"{p95_ms:.1f}"]
        lines.append(f"| `{kind}` | {' | '.join(cells)} | {memory_mb:,.0f} |")
    title = f"# Indices: {arguments.count:,} synthetic vectors of width {arguments.width}"
    text = f"{describe_machine()}. {arguments.queries} queries, one at a time."
    report = "\n".join([title, "", text, "`python -m tests.benchmarks.index --write`", "", *lines, ""])
    if arguments.write:
        Path(__file__).with_suffix(".md").write_text(report)
    print(report)


if __name__ == "__main__":
    main()
