"""The order of one epoch of a source: placed samples in their batches, and permuted runs of the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.plan.placement import ConstrainedSamples
from pipelines.plan.subset import seed_of_name
from pipelines.plan.types import EPOCH_STREAM, Int64Array


@dataclass(frozen=True, slots=True, eq=False)
class Epoch:
    """One epoch of a source. A batch is a slice of the free samples, in permuted runs, and then its placed samples."""

    batch: int
    placed: Int64Array  # numbers of the placed samples, in order of their batch
    first: Int64Array  # of the placed samples of each batch, and their count
    gaps: Int64Array  # free samples before each constrained one
    num_free: int
    shift: int
    run_length: int
    runs: npt.NDArray[np.unsignedinteger[Any]]  # permutation of the whole runs of free samples

    @classmethod
    def draw(
        cls,
        constrained: ConstrainedSamples,
        num_samples: int,
        batch: int,
        run_length: int,
        seed: int,
        name: str,
        epoch: int,
    ) -> Epoch:
        """Draw the order, a pure function of the arguments."""
        rng = np.random.default_rng([seed, EPOCH_STREAM, seed_of_name(name), epoch])
        num_batches = num_samples // batch
        batch_S = constrained.place(num_batches, batch, rng)
        used = np.flatnonzero(batch_S >= 0)
        order = used[np.argsort(batch_S[used], kind="stable")]
        first = np.concatenate([[0], np.cumsum(np.bincount(batch_S[used], minlength=num_batches))])
        num_free = num_samples - len(constrained.numbers)
        runs = np.arange(num_free // run_length, dtype=np.uint32)  # half the memory of int64
        rng.shuffle(runs)
        return cls(
            batch=batch,
            placed=constrained.numbers[order],
            first=first,
            gaps=constrained.numbers - np.arange(len(constrained.numbers)),
            num_free=num_free,
            shift=int(rng.integers(max(1, num_free))),  # the cuts between runs differ between epochs
            run_length=run_length,
            runs=runs,
        )

    def numbers(self, position: int, start: int, stop: int) -> Int64Array:
        """Return the numbers of samples `start` to `stop` of the batch at `position`."""
        first, last = (int(number) for number in self.first[position : position + 2])
        num_free = self.batch - (last - first)
        # Free samples are counted through the epoch: `position * batch` rows come before, `first` of them placed.
        free = np.arange(min(start, num_free), min(stop, num_free)) + position * self.batch - first
        placed = self.placed[first + max(0, start - num_free) : first + max(0, stop - num_free)]
        return np.concatenate([self._free_numbers(free), placed])

    def _free_numbers(self, at: Int64Array) -> Int64Array:
        """Return the numbers of the free samples at these places of the epoch."""
        run, within = at // self.run_length, at % self.run_length
        if len(self.runs):  # samples behind the last whole run keep their place
            run = np.where(run < len(self.runs), self.runs[np.minimum(run, len(self.runs) - 1)], run)
        nth = (run * self.run_length + within + self.shift) % max(1, self.num_free)
        # The nth free sample comes after all constrained ones that have at most n free samples before them.
        return nth + np.searchsorted(self.gaps, nth, side="right")
