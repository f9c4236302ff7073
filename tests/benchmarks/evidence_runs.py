"""Runs of the evidence, kept one a line, and the intervals of their differences.

A repeated command does what is missing, and gives the same numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.benchmarks.evidence_bed import Bed, Cell, Outcome
from tests.benchmarks.runs import RunFile
from tests.benchmarks.turns import say

_DRAWS = 4000

Read = Callable[[Path], Bed]
Train = Callable[[Bed, Cell, int], Outcome]
Runs = dict[tuple[str, int], dict[str, Any]]
"""Key of the cell and seed -> the run."""
Found = tuple[float, float, float]
"""A mean and its 95% interval."""


@dataclass(frozen=True)
class Work:
    """How runs are made: the reader of the data, the folder of the packages, and the training."""

    read: Read
    folder: Path
    train: Train


@lru_cache(maxsize=1)
def _bed(read: Read, folder: Path) -> Bed:
    torch.set_num_threads(1)
    return read(folder)


def _run(work: Work, cell: Cell, seed: int) -> dict[str, Any]:
    bed = _bed(work.read, work.folder)
    begun_s = time.process_time()
    outcome = asdict(work.train(bed, cell, seed))
    outcome["hits"] = _packed(outcome["hits"])
    if "parents" in outcome:
        outcome["parents"] = list(map(_packed, outcome["parents"]))
    return {"cell": cell.key(), "seed": seed, "cpu_s": round(time.process_time() - begun_s, 2), **outcome}


def _packed(hits: Sequence[bool]) -> str:
    return np.packbits(hits).tobytes().hex()


def do(
    out: Path,
    wanted: Sequence[tuple[Cell, int]],
    work: Work,
    *,
    processes: int = 1,
    only_read: bool = False,
) -> Runs:
    """Do what is missing. Return all runs by cell and seed. Exits if a run is missing, and `only_read`."""
    file = RunFile(out / "runs.jsonl")
    missing = file.missing({(cell.key(), seed): (cell, seed) for cell, seed in wanted}, only_read=only_read)
    if missing:
        _bed(work.read, work.folder)  # fetched before several processes ask for it
        for count, run in enumerate(_runs(work, missing, processes), 1):
            file.add(run)
            if count % 50 == 0:
                say(f"{count} of {len(missing)}")
    return file.runs


def _runs(work: Work, missing: Sequence[tuple[Cell, int]], processes: int) -> Iterator[dict[str, Any]]:
    """Yield runs as they end. One process is this one, so that nothing is left behind where it is killed."""
    if processes == 1:
        yield from (_run(work, cell, seed) for cell, seed in missing)
        return
    with ProcessPoolExecutor(processes) as pool:
        waiting: list[Future[dict[str, Any]]] = [pool.submit(_run, work, cell, seed) for cell, seed in missing]
        yield from (future.result() for future in as_completed(waiting))


def hits(packed: str, num_items: int) -> np.ndarray[Any, Any]:
    """Return `[E]`, 1 where the test's first answer was right, from the hits of a run as they are kept."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(packed), np.uint8))
    return bits[:num_items].astype(float)


def interval(values_SQ: np.ndarray[Any, Any]) -> Found:
    """Return the mean of differences by seed and query, and its 95% interval, drawing seeds and queries again."""
    rng = np.random.default_rng(0)
    num_seeds, num_queries = values_SQ.shape
    seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), _DRAWS) / num_seeds
    queries = rng.multinomial(num_queries, np.full(num_queries, 1 / num_queries), _DRAWS) / num_queries
    means = ((seeds @ values_SQ) * queries).sum(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(values_SQ.mean()), float(low), float(high)
