"""Exact nearest neighbors against FAISS: time and memory for vectors of width 256, the 100 nearest of each query.

    python -m tests.benchmarks.knn             prints the table: about an hour of two CPUs, 3 GB
    python -m tests.benchmarks.knn --write     and replaces tests/benchmarks/knn.md
    python -m tests.benchmarks.knn --scale 0.1 a tenth of all vectors

Each repeat is a process of its own, rzen and FAISS in turns. Vectors are unit vectors around 1,000 centers. The time is
that of the search, and for inverted lists also that of making them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from rzen.neighbors.exact import Neighbors, nearest
from rzen.neighbors.inverted_lists import InvertedLists, recall
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.turns import answer, say, show, spread

WIDTH, K, REPEATS, NUM_CENTERS, NUM_MEASURED = 256, 100, 5, 1000, 1000
CASES = {
    # name: (queries, vectors)
    "100k x 100k": (100_000, 100_000),
    "10k x 1M": (10_000, 1_000_000),
}
METHODS = ("rzen", "faiss flat", "rzen ivf")


def vectors_of(num: int, seed: int) -> Any:
    """Unit vectors around common centers, `[num, WIDTH]`."""
    centers = np.random.default_rng(0).standard_normal((NUM_CENTERS, WIDTH), np.float32)
    rng = np.random.default_rng(seed)
    rows = centers[rng.integers(0, NUM_CENTERS, num)]
    for start in range(0, num, 1 << 16):
        rows[start : start + (1 << 16)] += rng.standard_normal(rows[start : start + (1 << 16)].shape, np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def measure(method: str, num_queries: int, num_vectors: int) -> dict[str, float]:
    """Search once in this process, and compare the first queries with exact search."""
    queries, vectors = vectors_of(num_queries, 1), vectors_of(num_vectors, 2)
    before_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    begun_s, cpu_s = time.perf_counter(), time.process_time()
    found = _SEARCHES[method](queries, vectors)
    clock_s, cpu_s = time.perf_counter() - begun_s, time.process_time() - cpu_s
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    exact = nearest(queries[:NUM_MEASURED], vectors, K)
    share = recall(Neighbors(found.rows[:NUM_MEASURED], found.scores[:NUM_MEASURED]), exact)
    return {"clock": clock_s, "cpu": cpu_s, "memory": peak_mb - before_mb, "recall": share}


def _exact(queries: Any, vectors: Any) -> Neighbors:
    return nearest(queries, vectors, K)


def _flat(queries: Any, vectors: Any) -> Neighbors:
    import faiss

    index = faiss.IndexFlatIP(WIDTH)
    index.add(vectors)
    scores, rows = index.search(queries, K)
    return Neighbors(rows, scores)


def _inverted_lists(queries: Any, vectors: Any) -> Neighbors:
    lists = InvertedLists.build(vectors, int(4 * len(vectors) ** 0.5), seed=0)
    return lists.nearest(queries, vectors, K, num_probed=32)


_SEARCHES: dict[str, Callable[[Any, Any], Neighbors]] = dict(
    zip(METHODS, (_exact, _flat, _inverted_lists), strict=True)
)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace knn.md next to this file")
    parser.add_argument("--scale", type=float, default=1.0, help="of all numbers of vectors")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--one", nargs=3, metavar=("METHOD", "QUERIES", "VECTORS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        method, num_queries, num_vectors = options.one
        print(json.dumps(measure(method, int(num_queries), int(num_vectors))))
        return
    lines = [
        f"# The {K} nearest of vectors of width {WIDTH}",
        "",
        f"{describe_machine()}, {os.environ.get('OMP_NUM_THREADS', 'all')} threads."
        f" Median of {options.repeats} in turns (smallest to largest)."
        " Memory is in addition to the vectors. `python -m tests.benchmarks.knn --write`",
        "",
        "| queries x vectors | search | time, s | CPU, s | queries/s of CPU | memory, MB | recall |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for name, sizes in CASES.items():
        num_queries, num_vectors = (int(size * options.scale) for size in sizes)
        found: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
        for turn in range(options.repeats):
            for method, rows in found.items():
                rows.append(answer(__spec__.name, "--one", method, str(num_queries), str(num_vectors)))
                say(f"{name} {turn} {method} {rows[-1]}")
        for method, rows in found.items():
            cells = [spread([row[column] for row in rows], ".3g") for column in ("clock", "cpu")]
            cells += [spread([num_queries / row["cpu"] for row in rows], ".0f")]
            cells += [spread([row["memory"] for row in rows], ".0f"), spread([row["recall"] for row in rows], ".3f")]
            lines.append(f"| {num_queries:,} x {num_vectors:,} | {method} | {' | '.join(cells)} |")
    show("\n".join(lines) + "\n", __file__, write=options.write)


if __name__ == "__main__":
    main()
