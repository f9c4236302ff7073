"""Batches for the samples that cannot go anywhere: equal targets and equal queries apart, clusters together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.plan.dealing import deal
from pipelines.plan.packing import pack
from pipelines.plan.subset import SourceSubset
from pipelines.plan.types import NO_SAMPLES, Int64Array, SourceTable

_Numbered = tuple[list[Int64Array], list[npt.NDArray[Any]]]
"""Samples, and a key of each, in parts."""


@dataclass(frozen=True, slots=True, eq=False)
class ConstrainedSamples:
    """The S samples with a target, a query or a cluster in common with others.

    `numbers` `[S]` is ascending. `target`, `query` and `cluster` `[S]` are dense ids, -1 for none.
    """

    numbers: Int64Array
    target: Int64Array
    query: Int64Array
    cluster: Int64Array

    @classmethod
    def find(
        cls, tables: Sequence[SourceTable], subsets: Sequence[SourceSubset], starts: Int64Array
    ) -> ConstrainedSamples:
        """Find them in the used samples of all members; member m numbers its samples from `starts[m]` on."""
        by_target: _Numbered = [NO_SAMPLES], [NO_SAMPLES.astype(np.uint64)]
        by_query: _Numbered = [NO_SAMPLES], [NO_SAMPLES.astype(np.uint64)]
        by_cluster: _Numbered = [NO_SAMPLES], [NO_SAMPLES]
        num_clusters = 0
        for table, subset, start in zip(tables, subsets, starts, strict=False):
            numbers, used = subset.numbers(table.duplicates)
            for (of_column, keys), column in ((by_target, table.targets), (by_query, table.queries)):
                if len(column):  # the queries of a source may be unknown
                    of_column.append(numbers[used] + start)
                    keys.append(column[used].astype(np.uint64))
            numbers, used = subset.numbers(table.clustered)
            by_cluster[0].append(numbers[used] + start)
            by_cluster[1].append(table.clusters[used] + num_clusters)
            num_clusters += int(table.clusters.max(initial=-1)) + 1
        # A target, query or cluster of which only one sample is used constrains nothing.
        shared = [_keep_shared(*map(np.concatenate, parts)) for parts in (by_target, by_query, by_cluster)]
        numbers = np.unique(np.concatenate([samples for samples, _ in shared]))
        ids = np.full((len(shared), len(numbers)), -1, np.int64)
        for ids_S, (samples, dense) in zip(ids, shared, strict=True):
            ids_S[np.searchsorted(numbers, samples)] = dense
        return cls(numbers, *ids)

    def place(self, num_batches: int, batch: int, rng: np.random.Generator) -> Int64Array:
        """Return the batch of each sample `[S]`, or -1 where all batches are full and the epoch leaves it out."""
        if (self.cluster >= 0).any():
            return pack(self.target, self.query, self.cluster, num_batches, batch, rng)
        return deal(self.target, self.query, num_batches, batch, rng)

    def notes(self, num_batches: int, batch: int, *, draws_positives: bool = False) -> list[str]:
        """Describe what no order of an epoch can meet.

        With `draws_positives`, equal numbers in `query` are those of queries that are linked by their positives.
        """
        lines = []
        sizes = np.bincount(self.target[self.target >= 0])
        if crowded := int((sizes > num_batches).sum()):
            lines.append(
                f"{crowded} targets have more duplicates (up to {sizes.max()}) than an epoch has batches"
                f" ({num_batches}): some batches hold duplicates, which are not scored against each other"
            )
        sizes = np.bincount(self.query[self.query >= 0])
        crowded = int((sizes > num_batches).sum())
        if crowded and draws_positives:
            lines.append(
                f"{crowded} sets of queries are linked by common positives and larger (up to {sizes.max()}) than an"
                f" epoch has batches ({num_batches}): there, the target of a query may be another positive of a query"
                " of its batch, and counts as a negative of it"
            )
        elif crowded:
            lines.append(
                f"{crowded} queries come in more samples (up to {sizes.max()}) than an epoch has batches"
                f" ({num_batches}): some batches hold a query twice, whose targets are no negatives of it"
            )
        sizes = np.bincount(self.cluster[self.cluster >= 0])
        if large := int((sizes > batch).sum()):
            lines.append(f"{large} clusters are larger than a batch ({batch}) and are divided")
        return lines


def _keep_shared(numbers: Int64Array, keys: npt.NDArray[Any]) -> tuple[Int64Array, Int64Array]:
    """Keep the numbers whose key occurs more than once. Return them ascending, with dense ids of their keys."""
    _, ids, counts = np.unique(keys, return_inverse=True, return_counts=True)
    several = counts[ids] > 1
    _, dense = np.unique(ids[several], return_inverse=True)
    order = np.argsort(numbers[several], kind="stable")
    return numbers[several][order], dense[order]
