"""What a batch is drawn from: one source, or several merged into one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipelines.config import MixtureConfig
from pipelines.plan.epoch import Epoch
from pipelines.plan.placement import ConstrainedSamples
from pipelines.plan.subset import SourceSubset
from pipelines.plan.types import Int64Array, Row, SourceTable
from pipelines.plan.weights import table_of_epoch

_FEW = 0.01  # a share of the samples that is left out without a note
_OPTIONAL = ("clustered", "clusters", "dropped", "weighted", "weights", "alternatives")
"""Columns of a table, without which its fingerprint is that of versions of rzen that knew none."""
_EPOCHS_KEPT = 3  # tasks run ahead, and look back for reserves


class PlanSource:
    """One source, or several merged ones: `members`, and the number of their used samples in `sizes`.

    `batch` samples are contrasted with each other. `blocks` times as many, of several sources, make a global batch.
    Each used sample has a number in 0 .. num_samples - 1, counted through all members.
    """

    def __init__(
        self, name: str, tables: Mapping[str, SourceTable], batch: int, blocks: int, mixture: MixtureConfig, seed: int
    ) -> None:
        self.name = name
        self.members = tuple(tables)
        self.batch = batch
        self.blocks = blocks
        self.run_length = mixture.run_length
        self._tables, self._mixture, self._seed = dict(tables), mixture, seed
        self._epochs: dict[int, _Members] = {}  # of sources with weights, the last few; else one for all epochs
        self.num_stored = sum(table.num_samples for table in tables.values())
        self.num_dropped = sum(len(table.dropped) for table in tables.values())
        self.num_weighted = sum(len(table.weighted) for table in tables.values())
        self.num_drawn = sum(table.num_drawn for table in tables.values())
        self.num_alternatives = sum(int((table.alternatives >= 0).sum()) for table in tables.values())
        self.num_kept = sum(table.num_kept for table in tables.values())
        self.sizes = tuple(subset.size for subset in self._members(0).subsets)  # the same in every epoch
        self.num_samples = sum(self.sizes)
        self.tables_fingerprint = _fingerprint(tables)
        if not self.num_weighted:
            self._tables = {}  # a plan is sent to every task

    @property
    def batches_per_epoch(self) -> int:
        """Whole batches of one epoch. Left-over samples are dropped, different ones in each epoch."""
        return self.num_samples // self.batch

    @property
    def step_samples(self) -> int:
        """Samples of a global batch of this source only."""
        return self.batch * self.blocks

    def draw_epoch(self, seed: int, epoch: int) -> Epoch:
        """Return the order of one epoch."""
        constrained = self._members(epoch).constrained
        return Epoch.draw(constrained, self.num_samples, self.batch, self.run_length, seed, self.name, epoch)

    def rows(self, numbers: Int64Array, epoch: int) -> tuple[Row, ...]:
        """Return the samples with these numbers in an epoch."""
        some = self._members(epoch)
        member_R = np.searchsorted(some.starts, numbers, side="right") - 1
        index_R = numbers - some.starts[member_R]
        for ordinal in np.unique(member_R):
            of_member = member_R == ordinal
            index_R[of_member] = some.subsets[ordinal].samples(index_R[of_member])
        return tuple((self.members[m], i) for m, i in zip(member_R.tolist(), index_R.tolist(), strict=True))

    def reserves(
        self, rng: np.random.Generator, member: str, epoch: int, used: Int64Array, position: int, count: int
    ) -> list[Row]:
        """Return up to `count` random samples of a member that are not `used`, of those that the epoch takes.

        Rows of one global batch get different reserves as long as the member has enough samples.
        """
        subset = self._members(epoch).subsets[self.members.index(member)]
        num_rows = self.batch * self.blocks
        drawn = rng.choice(subset.size, min(subset.size, len(used) + count * num_rows), replace=False)
        samples = subset.samples(drawn)
        free = samples[~np.isin(samples, used)]
        own = free[position::num_rows]  # every row takes another residue, so that no two rows share a reserve
        others = np.roll(free, -position)
        distinct = dict.fromkeys([*own.tolist(), *others[:count].tolist()])
        return [(member, index) for index in distinct][:count]

    def notes(self) -> list[str]:
        """Describe, one line each, what the order of an epoch cannot meet."""
        left = self.num_samples % self.batch
        lines = []
        if self.num_dropped:
            lines.append(f"{self.num_dropped} of {self.num_stored} samples are dropped by candidate tables")
        if self.num_weighted:
            lines.append(f"{self.num_weighted} samples have a weight, and each epoch takes {self.num_drawn} of them")
        if self.num_alternatives:
            lines.append(f"{self.num_alternatives} of these share their query, and each epoch takes one of a query")
        if self.num_samples < self.num_kept:
            same = "" if self.num_weighted else ", the same in every epoch"
            lines.append(
                f"{self.num_samples} of {self.num_kept} samples are used{same}: data.mixture.max_samples_per_source"
            )
        if left > _FEW * self.num_samples:
            lines.append(
                f"each epoch leaves out {left} of {self.num_samples} samples, others each time: no whole batch"
            )
        constrained, draws_positives = self._members(0).constrained, self.num_alternatives > 0
        return lines + constrained.notes(self.batches_per_epoch, self.batch, draws_positives=draws_positives)

    def _members(self, epoch: int) -> _Members:
        """Return the samples that an epoch takes."""
        key = epoch if self.num_weighted else 0
        if key not in self._epochs:
            tables = [table_of_epoch(table, name, self._seed, key) for name, table in self._tables.items()]
            subsets = [
                SourceSubset.choose(table, self._mixture, self._seed, name)
                for name, table in zip(self.members, tables, strict=True)
            ]
            starts = np.concatenate([[0], np.cumsum([subset.size for subset in subsets])]).astype(np.int64)
            self._epochs[key] = _Members(subsets, starts, ConstrainedSamples.find(tables, subsets, starts))
            if len(self._epochs) > _EPOCHS_KEPT:
                del self._epochs[next(iter(self._epochs))]  # the one that was found first
        return self._epochs[key]


@dataclass(frozen=True, slots=True, eq=False)
class _Members:
    """The samples of an epoch. Member m numbers its samples from `starts[m]` on."""

    subsets: list[SourceSubset]
    starts: Int64Array
    constrained: ConstrainedSamples


def _fingerprint(tables: Mapping[str, SourceTable]) -> str:
    digest = hashlib.sha256()
    for name, table in tables.items():
        digest.update(f"{name} {table.num_samples} ".encode())
        for array in (table.duplicates, table.targets, table.queries):
            digest.update(np.ascontiguousarray(array).tobytes())
        for kind in _OPTIONAL:
            if len(array := getattr(table, kind)):
                digest.update(f" {kind} {len(array)} ".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]
