"""Which samples of a source are used: all of them, or random runs of adjacent ones up to the limit."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipelines.config import MixtureConfig
from pipelines.plan.types import SUBSET_STREAM, Int64Array, SourceTable


@dataclass(frozen=True, slots=True, eq=False)
class SourceSubset:
    """The used samples of a source, numbered from 0. Dropped samples are left out before any are chosen."""

    size: int
    run_length: int
    runs: Int64Array | None  # ascending; None: the first `size` samples
    dropped: Int64Array

    @classmethod
    def choose(cls, table: SourceTable, mixture: MixtureConfig, seed: int, name: str) -> SourceSubset:
        """Choose up to `max_samples_per_source` samples; another `seed` chooses other runs."""
        size = min(table.num_kept, mixture.max_samples_per_source)
        length = min(mixture.run_length, size)
        wanted = -(-size // max(length, 1))  # runs, rounded up: the last one is used in part
        if size == table.num_kept or wanted > table.num_kept // length:  # all, or all but a part of a run
            return cls(size, length, None, table.dropped)
        rng = np.random.default_rng([seed, SUBSET_STREAM, seed_of_name(name)])
        runs = np.sort(rng.choice(table.num_kept // length, wanted, replace=False))
        return cls(size, length, runs, table.dropped)

    def samples(self, numbers: Int64Array) -> Int64Array:
        """Return the indices in the source of the samples with these numbers."""
        kept = numbers
        if self.runs is not None:
            kept = self.runs[numbers // self.run_length] * self.run_length + numbers % self.run_length
        if not len(self.dropped):
            return kept
        # The nth kept sample comes after all dropped ones that have at most n kept samples before them.
        return kept + np.searchsorted(self.dropped - np.arange(len(self.dropped)), kept, side="right")

    def numbers(self, samples: Int64Array) -> tuple[Int64Array, npt.NDArray[np.bool_]]:
        """Return the number of each sample, and whether it is used. The number of an unused sample has no meaning."""
        before = np.searchsorted(self.dropped, samples)
        is_kept = np.searchsorted(self.dropped, samples, side="right") == before
        kept = samples - before
        if self.runs is None:
            return kept, is_kept & (kept < self.size)
        run, within = kept // self.run_length, kept % self.run_length
        at = np.minimum(np.searchsorted(self.runs, run), len(self.runs) - 1)
        numbers = at * self.run_length + within
        return numbers, is_kept & (self.runs[at] == run) & (numbers < self.size)


def seed_of_name(name: str) -> int:
    """Return a seed that depends on the name of a source only, so that other sources do not change its order."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
