"""Batches for the samples that cannot go anywhere: equal targets apart, clusters together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.plan.subset import SourceSubset
from pipelines.plan.types import NO_SAMPLES, Int64Array, SourceTable


@dataclass(frozen=True, slots=True, eq=False)
class ConstrainedSamples:
    """The S samples with a target or a cluster in common with others.

    `numbers` `[S]` is ascending. `target` and `cluster` `[S]` are dense ids, -1 for none.
    """

    numbers: Int64Array
    target: Int64Array
    cluster: Int64Array

    @classmethod
    def find(
        cls, tables: Sequence[SourceTable], subsets: Sequence[SourceSubset], starts: Int64Array
    ) -> ConstrainedSamples:
        """Find them in the used samples of all members; member m numbers its samples from `starts[m]` on."""
        duplicates, targets, clustered, clusters = (
            [NO_SAMPLES],
            [NO_SAMPLES.astype(np.uint64)],
            [NO_SAMPLES],
            [NO_SAMPLES],
        )
        num_clusters = 0
        for table, subset, start in zip(tables, subsets, starts, strict=False):
            numbers, used = subset.numbers(table.duplicates)
            duplicates.append(numbers[used] + start)
            targets.append(table.targets[used].astype(np.uint64))
            # Clusters are spans of samples. A subset may use a part of one, and only the used samples stay together.
            first, stop = table.clusters.T
            samples = np.concatenate([NO_SAMPLES, *map(np.arange, first, stop)])
            numbers, used = subset.numbers(samples)
            clustered.append(numbers[used] + start)
            cluster_ids = np.repeat(np.arange(len(first)), stop - first) + num_clusters
            clusters.append(cluster_ids[used])
            num_clusters += len(first)
        # A target or cluster of which only one sample is used constrains nothing.
        duplicate, target = _keep_shared(np.concatenate(duplicates), np.concatenate(targets))
        member, cluster = _keep_shared(np.concatenate(clustered), np.concatenate(clusters))
        numbers = np.union1d(duplicate, member)
        target_S, cluster_S = np.full((2, len(numbers)), -1, np.int64)
        target_S[np.searchsorted(numbers, duplicate)] = target
        cluster_S[np.searchsorted(numbers, member)] = cluster
        return cls(numbers, target_S, cluster_S)

    def place(self, num_batches: int, batch: int, rng: np.random.Generator) -> Int64Array:
        """Return the batch of each sample `[S]`, or -1 where all batches are full and the epoch leaves it out."""
        if (self.cluster >= 0).any():
            return _pack(self.target, self.cluster, num_batches, batch, rng)
        return _deal(self.target, num_batches, batch, rng)

    def notes(self, num_batches: int, batch: int) -> list[str]:
        """Describe what no order of an epoch can meet."""
        lines = []
        sizes = np.bincount(self.target[self.target >= 0])
        if crowded := int((sizes > num_batches).sum()):
            lines.append(
                f"{crowded} targets have more duplicates (up to {sizes.max()}) than an epoch has batches"
                f" ({num_batches}): some batches hold duplicates, which are not scored against each other"
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


def _deal(target_S: Int64Array, num_batches: int, batch: int, rng: np.random.Generator) -> Int64Array:
    """Deal the samples of each target to consecutive batches, which keeps equal targets apart."""
    num_targets = int(target_S.max(initial=-1)) + 1
    order = np.lexsort([rng.random(len(target_S)), rng.permutation(num_targets)[target_S]])
    dealt_S = np.full(len(target_S), -1, np.int64)
    order = order[: num_batches * batch]  # an epoch has whole batches only
    dealt_S[order] = (np.arange(len(order)) + rng.integers(num_batches)) % num_batches
    return dealt_S


def _pack(
    target_S: Int64Array, cluster_S: Int64Array, num_batches: int, batch: int, rng: np.random.Generator
) -> Int64Array:
    """Place the largest clusters first, then the duplicates of the most frequent target.

    Each goes into the emptiest of the batches with the fewest duplicates of it. A cluster that fits nowhere is divided.
    Some order without duplicates may exist where this greedy order finds none.
    """
    packer = _Packer(target_S, num_batches, batch, rng)
    clustered = np.flatnonzero(cluster_S >= 0)
    by_cluster = np.split(clustered, np.flatnonzero(np.diff(cluster_S[clustered])) + 1)
    single = np.flatnonzero(cluster_S < 0).tolist()
    shuffled = [by_cluster[i].tolist() for i in rng.permutation(len(by_cluster))]
    for members in sorted(shuffled, key=len, reverse=True):
        if not packer.put(members):
            single += members
    frequency = Counter(target_S[single].tolist())
    frequency[-1] = 0  # samples without a target conflict with nothing and go last, into whatever is free
    order = [single[i] for i in rng.permutation(len(single))]
    for member in sorted(order, key=lambda s: (-frequency[int(target_S[s])], int(target_S[s]))):
        packer.put([member])
    return packer.placed_S


class _Packer:
    """Free rows and placed targets of each batch B of an epoch."""

    def __init__(self, target_S: Int64Array, num_batches: int, batch: int, rng: np.random.Generator) -> None:
        self.placed_S = np.full(len(target_S), -1, np.int64)
        self._target_S = target_S
        self._free_B = np.full(num_batches, batch)
        self._tie_B = rng.random(num_batches)
        self._batches_of: dict[int, Counter[int]] = {}  # target -> batch -> duplicates in it

    def put(self, members: list[int]) -> bool:
        """Place the members in one batch. Return False if no batch has room for all of them."""
        targets = [int(target) for target in self._target_S[members] if target >= 0]
        fits = np.flatnonzero(self._free_B >= len(members))
        if not len(fits):
            return False
        duplicates_B = np.zeros(len(self._free_B), np.int64)
        for target in targets:
            for at, count in self._batches_of.get(target, {}).items():
                duplicates_B[at] += count
        # lexsort takes its last key first: fewest duplicates, then most room, then a random order.
        best = np.lexsort([self._tie_B[fits], -self._free_B[fits], duplicates_B[fits]])[0]
        chosen = int(fits[best])
        self.placed_S[members] = chosen
        self._free_B[chosen] -= len(members)
        for target in targets:
            self._batches_of.setdefault(target, Counter())[chosen] += 1
        return True
