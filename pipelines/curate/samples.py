"""The samples of a split with their features, and what has become of each of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipelines.curate.features import Inputs
from pipelines.curate.hamming import Ints
from pipelines.curate.tables import Bools, MediaTable, TextTable

QUERY, POSITIVE = 0, 1


@dataclass(frozen=True, slots=True)
class Drop:
    """A sample that is left out. `other` names what it resembles, and `value` is what the rule measured.

    `like` is where that is: the number of another sample, or inputs of an evaluation set and the row among them.
    """

    sample: int
    reason: str
    value: float = 0.0
    other: str = ""
    like: int | tuple[Inputs, int] | None = None


@dataclass(frozen=True, slots=True)
class Samples:
    """N samples, source by source. Inputs 2n and 2n + 1 of the tables are query and positive of sample n."""

    sources: tuple[str, ...]
    tasks: tuple[str, ...]
    """Task of each source."""
    starts: Ints
    """`[sources + 1]`, number of the first sample of each source, and of all samples."""
    texts: TextTable
    media: MediaTable

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def source_of(self) -> Ints:
        """Return the place of each sample's source, `[N]`."""
        return np.repeat(np.arange(len(self.sources)), np.diff(self.starts))

    @property
    def slices(self) -> dict[str, slice]:
        """Return source -> its samples."""
        starts = self.starts.tolist()
        return {name: slice(*bounds) for name, bounds in zip(self.sources, pairwise(starts), strict=True)}

    def place(self, sample: int) -> tuple[str, int]:
        """Return the source of a sample, and its index there."""
        source = int(np.searchsorted(self.starts, sample, side="right")) - 1
        return self.sources[source], sample - int(self.starts[source])

    def key(self, sample: int) -> str:
        """Return the key of a sample, empty if it cannot be read."""
        found: str = self.texts.keys[2 * sample].as_py()
        return found

    def name(self, sample: int) -> str:
        """Return what a sample is called in reports: `source/key`."""
        return f"{self.place(sample)[0]}/{self.key(sample)}"

    def duplicate(self, sample: int, of: int, reason: str, value: float = 0.0) -> Drop:
        """Return the drop of a sample that resembles another one."""
        return Drop(sample, reason, value, self.name(of), of)


class Weighted(NamedTuple):
    """Samples of a source with a weight below 1, and the sum of their weights: how many of them an epoch takes."""

    samples: int
    total: float


class FullCluster(NamedTuple):
    """A cluster with too many samples of these sources. Each has the same weight. `examples` are some of them."""

    num_samples: int
    weight: float
    sources: tuple[str, ...]
    examples: tuple[int, ...]


@dataclass(slots=True)
class Verdicts:
    """What has become of N samples so far. Each has the first reason for which it is left out.

    `weight` `[N]` is the share of the epochs that take a sample that is kept. `full_clusters` say why.
    """

    keep: Bools
    weight: npt.NDArray[np.float32]
    drops: list[Drop] = field(default_factory=list)
    full_clusters: list[FullCluster] = field(default_factory=list)

    @classmethod
    def of(cls, num_samples: int) -> Verdicts:
        """Return verdicts that keep all samples."""
        return cls(np.ones(num_samples, np.bool_), np.ones(num_samples, np.float32))

    def add(self, drops: Sequence[Drop]) -> None:
        """Leave samples out. Those that are left out already keep their reason."""
        for drop in sorted(drops, key=lambda drop: drop.sample):
            if self.keep[drop.sample]:
                self.keep[drop.sample] = False
                self.drops.append(drop)

    def weights(self, samples: Samples) -> dict[str, npt.NDArray[np.float32]]:
        """Return source -> the weights of its samples that have one below 1. Sources without any are left out."""
        found = {}
        for source, mine in samples.slices.items():
            weights = self.weight[mine][self.keep[mine] & (self.weight[mine] < 1)]
            if len(weights):
                found[source] = weights
        return found

    def weighted(self, samples: Samples) -> dict[str, Weighted]:
        """Return source -> samples with a weight, and the sum of their weights. Sources without any are left out."""
        return {
            source: Weighted(len(weights), round(float(weights.sum(dtype=np.float64)), 3))
            for source, weights in self.weights(samples).items()
        }

    def counts(self, samples: Samples) -> dict[str, dict[str, int]]:
        """Return reason -> source -> number of samples, by the order of the rules and sources."""
        source_of = samples.source_of
        found = Counter((drop.reason, int(source_of[drop.sample])) for drop in self.drops)
        reasons = dict.fromkeys(drop.reason for drop in self.drops)
        return {
            reason: {name: found[reason, place] for place, name in enumerate(samples.sources) if found[reason, place]}
            for reason in reasons
        }


def positions(mask: Bools) -> npt.NDArray[np.int64]:
    """Return where a mask is true."""
    return np.flatnonzero(mask).astype(np.int64)
