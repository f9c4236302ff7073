"""Samples with a weight below 1: which of them an epoch takes.

A weight is the probability that an epoch takes the sample. Every epoch takes the same number of them, the sum of the
weights rounded down. So all epochs have equally many batches. This is systematic sampling: samples in a random order
fill stretches of a line, each as long as its weight. Those at the places u, u + 1, u + 2, ... are taken.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from pipelines.plan.subset import seed_of_name
from pipelines.plan.types import NO_SAMPLES, WEIGHT_STREAM, SourceTable


def table_of_epoch(table: SourceTable, name: str, seed: int, epoch: int) -> SourceTable:
    """Return the table without the samples that an epoch does not take: they are dropped. No sample has a weight."""
    if not len(table.weighted):
        return table
    rng = np.random.default_rng([seed, WEIGHT_STREAM, seed_of_name(name), epoch])
    left_out = table.weighted[~draw(table.weights, table.num_drawn, rng)]
    dropped = np.union1d(table.dropped, left_out)
    return replace(table, dropped=dropped, weighted=NO_SAMPLES, weights=np.zeros(0))


def draw(weights: npt.NDArray[np.float64], count: int, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Return which samples are taken, exactly `count`. Each is with its weight times `count` / sum of the weights.

    `count` is at most the sum, so that no sample could be taken twice.
    """
    taken = np.zeros(len(weights), np.bool_)
    order = rng.permutation(len(weights))
    ends = np.cumsum(weights[order])
    ends *= count / ends[-1]
    ends[-1] = count  # without rounding, so that the count is exact
    passed = np.floor(ends + rng.random())
    taken[order] = np.diff(passed, prepend=0.0) > 0
    return taken
