"""What a plan takes and gives: tables of the sources, changes of the mixture, and global batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Row = tuple[str, int]
"""Source, and index of the sample in it."""
Int64Array = npt.NDArray[np.int64]

# Each kind of random choice has its own stream of the seed, so that a change of one does not move the others. The
# numbers are part of every plan: other numbers give other batches.
LANE_STREAM, EPOCH_STREAM, RESERVE_STREAM, SUBSET_STREAM, SOURCE_STREAM, CANDIDATE_STREAM, WEIGHT_STREAM = range(7)
INSTRUCTION_STREAM = 7

NO_SAMPLES: Int64Array = np.zeros(0, np.int64)
_ROUNDING = 1e-6  # of a sum of weights: ten tenths are one sample


@dataclass(frozen=True, slots=True, eq=False)
class SourceTable:
    """What a plan has to know about a source. Sample i is the i-th in stored order.

    `duplicates` `[D]` are the samples, ascending, whose target or query other samples may have too. `targets` and
    `queries` `[D]` are equal for equal targets and queries, also between sources. `queries` is empty if they are
    unknown. `clustered` `[K]` are the samples, ascending, that have to share a batch with others, such as clips of one
    video. `clusters` `[K]` are equal, and at least 0, for those of one cluster. `dropped` are the samples, ascending,
    that no batch takes. `weighted` `[P]` are kept samples, ascending, that an epoch takes with the probability in
    `weights` `[P]`, above 0 and below 1. An epoch takes at most one of those with equal `alternatives` `[P]`, at least
    0. Others have -1. The array is empty if there are none.
    """

    num_samples: int
    duplicates: Int64Array = field(default_factory=lambda: NO_SAMPLES)
    targets: npt.NDArray[np.integer[Any]] = field(default_factory=lambda: NO_SAMPLES)
    queries: npt.NDArray[np.integer[Any]] = field(default_factory=lambda: NO_SAMPLES)
    clustered: Int64Array = field(default_factory=lambda: NO_SAMPLES)
    clusters: Int64Array = field(default_factory=lambda: NO_SAMPLES)
    dropped: Int64Array = field(default_factory=lambda: NO_SAMPLES)
    weighted: Int64Array = field(default_factory=lambda: NO_SAMPLES)
    weights: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    alternatives: Int64Array = field(default_factory=lambda: NO_SAMPLES)

    @property
    def num_drawn(self) -> int:
        """Return how many of the samples with a weight an epoch takes: the sum of the weights, rounded down."""
        return int(self.weights.sum() + _ROUNDING)

    @property
    def num_kept(self) -> int:
        """Return the number of samples of an epoch: all without the dropped ones and those that it does not take."""
        return self.num_samples - len(self.dropped) - len(self.weighted) + self.num_drawn


@dataclass(frozen=True, slots=True)
class MixturePhase:
    """New shares from `first_step` on. `weights` is member source -> relative share of the steps."""

    first_step: int
    weights: dict[str, float]


@dataclass(frozen=True, slots=True)
class Block:
    """Samples of one source that are contrasted with each other, in the order in which they are scored."""

    source: str
    epoch: int
    rows: tuple[Row, ...]


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """One optimizer step, or one rank's share of it: one block, or several of one size if the mixture sets `blocks`."""

    step: int
    blocks: tuple[Block, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        """Return the rows of all blocks, in order."""
        return tuple(row for block in self.blocks for row in block.rows)
