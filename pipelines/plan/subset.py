"""Which samples of a source are used: all of them, or random runs of adjacent ones up to the limit."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipelines.config import MixtureConfig
from pipelines.plan.types import SUBSET_STREAM, Int64Array


@dataclass(frozen=True, slots=True, eq=False)
class SourceSubset:
    """The used samples of a source, numbered from 0."""

    size: int
    run_length: int
    runs: Int64Array | None  # ascending; None: the first `size` samples

    @classmethod
    def choose(cls, num_samples: int, mixture: MixtureConfig, seed: int, name: str) -> SourceSubset:
        """Choose up to `max_samples_per_source` samples; another `seed` chooses other runs."""
        size = min(num_samples, mixture.max_samples_per_source)
        length = min(mixture.run_length, size)
        wanted = -(-size // max(length, 1))  # runs, rounded up: the last one is used in part
        if size == num_samples or wanted > num_samples // length:  # all, or all but a part of a run
            return cls(size, length, None)
        rng = np.random.default_rng([seed, SUBSET_STREAM, seed_of_name(name)])
        return cls(size, length, np.sort(rng.choice(num_samples // length, wanted, replace=False)))

    def samples(self, numbers: Int64Array) -> Int64Array:
        """Return the indices in the source of the samples with these numbers."""
        if self.runs is None:
            return numbers
        return self.runs[numbers // self.run_length] * self.run_length + numbers % self.run_length

    def numbers(self, samples: Int64Array) -> tuple[Int64Array, npt.NDArray[np.bool_]]:
        """Return the number of each sample, and whether it is used. The number of an unused sample has no meaning."""
        if self.runs is None:
            return samples, samples < self.size
        run, within = samples // self.run_length, samples % self.run_length
        at = np.minimum(np.searchsorted(self.runs, run), len(self.runs) - 1)
        numbers = at * self.run_length + within
        return numbers, (self.runs[at] == run) & (numbers < self.size)


def seed_of_name(name: str) -> int:
    """Return a seed that depends on the name of a source only, so that other sources do not change its order."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
