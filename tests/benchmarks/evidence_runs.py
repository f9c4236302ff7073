"""Runs of the evidence, kept one a line, and the intervals of their differences.

A repeated command does what is missing, and gives the same numbers.
"""

from __future__ import annotations

import json
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
from tests.benchmarks.turns import say

RUNS = "runs.jsonl"
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
    path = out / RUNS
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]  # a killed command leaves half a line
    runs = {(run["cell"], run["seed"]): run for run in whole}
    missing = [(cell, seed) for cell, seed in wanted if (cell.key(), seed) not in runs]
    say(f"{len(wanted)} runs, {len(missing)} to do")
    if missing and only_read:
        raise SystemExit(f"{path}: {len(missing)} of {len(wanted)} runs are missing; leave out --report to do them")
    if missing:
        _bed(work.read, work.folder)  # fetched before several processes ask for it
        out.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(run) + "\n" for run in whole))
        with path.open("a") as file:
            for count, run in enumerate(_runs(work, missing, processes), 1):
                runs[run["cell"], run["seed"]] = run
                file.write(json.dumps(run) + "\n")
                file.flush()
                if count % 50 == 0:
                    say(f"{count} of {len(missing)}")
    return runs


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


def points(found: Found | None) -> str:
    """Return a difference in points with its interval, bold where 0 is outside. None is empty."""
    if found is None:
        return ""
    mean, low, high = (100 * value for value in found)
    text = f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def percent(value: float | None) -> str:
    """Return a share in percent. None is empty."""
    return "" if value is None else f"{100 * value:.1f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table in Markdown."""
    return [
        f"| {' | '.join(head)} |",
        f"|---|{'---:|' * (len(head) - 1)}",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]
