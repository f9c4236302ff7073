"""What a batch is drawn from: one source, or several merged into one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np

from pipelines.config import MixtureConfig
from pipelines.plan.epoch import Epoch
from pipelines.plan.placement import ConstrainedSamples
from pipelines.plan.subset import SourceSubset
from pipelines.plan.types import Int64Array, Row, SourceTable

_FEW = 0.01  # a share of the samples that is left out without a note


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
        self._subsets = [SourceSubset.choose(table, mixture, seed, member) for member, table in tables.items()]
        self.sizes = tuple(subset.size for subset in self._subsets)
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)
        self.num_samples = int(self._starts[-1])
        self.num_stored = sum(table.num_samples for table in tables.values())
        self.num_kept = sum(table.num_kept for table in tables.values())
        self._constrained = ConstrainedSamples.find(list(tables.values()), self._subsets, self._starts)
        self.tables_fingerprint = _fingerprint(tables)

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
        return Epoch.draw(self._constrained, self.num_samples, self.batch, self.run_length, seed, self.name, epoch)

    def rows(self, numbers: Int64Array) -> tuple[Row, ...]:
        """Return the samples with these numbers."""
        member_R = np.searchsorted(self._starts, numbers, side="right") - 1
        index_R = numbers - self._starts[member_R]
        for ordinal in np.unique(member_R):
            of_member = member_R == ordinal
            index_R[of_member] = self._subsets[ordinal].samples(index_R[of_member])
        return tuple((self.members[m], i) for m, i in zip(member_R.tolist(), index_R.tolist(), strict=True))

    def reserves(self, rng: np.random.Generator, member: str, used: Int64Array, position: int, count: int) -> list[Row]:
        """Return up to `count` random samples of a member that are not `used`.

        Rows of one global batch get different reserves as long as the member has enough samples.
        """
        subset = self._subsets[self.members.index(member)]
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
        if self.num_kept < self.num_stored:
            lines.append(
                f"{self.num_stored - self.num_kept} of {self.num_stored} samples are dropped by candidate tables"
            )
        if self.num_samples < self.num_kept:
            cut = f"{self.num_samples} of {self.num_kept} samples are used, the same in every epoch"
            lines.append(f"{cut}: data.mixture.max_samples_per_source")
        if left > _FEW * self.num_samples:
            lines.append(
                f"each epoch leaves out {left} of {self.num_samples} samples, others each time: no whole batch"
            )
        return lines + self._constrained.notes(self.batches_per_epoch, self.batch)


def _fingerprint(tables: Mapping[str, SourceTable]) -> str:
    digest = hashlib.sha256()
    for name, table in tables.items():
        digest.update(f"{name} {table.num_samples} ".encode())
        for array in (table.duplicates, table.targets, table.queries):
            digest.update(np.ascontiguousarray(array).tobytes())
        for kind in ("clustered", "clusters", "dropped"):  # a table without them has the hash that it had before
            if len(array := getattr(table, kind)):
                digest.update(f" {kind} {len(array)} ".encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]
