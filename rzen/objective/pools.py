"""The columns that rows are scored against, and which of them are negatives.

A direction has rows (queries, or targets in the reverse direction) and pools of columns of several kinds. The positive
of a row is in the first pool. A tile is a stretch of the rows. Shapes: B rows, R rows of a tile, C columns of one pool
or of all, K columns of one row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from rzen.config import HardnessConfig
from rzen.objective.batch import Batch
from rzen.objective.similarity import Similarity
from rzen.vectors import Vectors, take

Related = Callable[[Tensor], Tensor]
"""Numbers of R rows among the pairs of all ranks -> bool `[R, C]`."""


@dataclass(frozen=True)
class Pool:
    """Columns of one kind, and the vectors that the rows are scored with there.

    With `per_row`, each row has K columns of its own: columns and keys are B rows of K vectors.
    """

    rows: Vectors
    columns: Vectors
    keys: Vectors
    """One for each column: what is compared with a row's positive to find false negatives. It is the column itself
    where columns are targets, and the target of the column where they are queries."""
    related: Related
    """Marks the columns that the ids show to be no negatives."""
    hardness: HardnessConfig | None
    """Weights of these negatives; None: all 1."""
    includes_row: bool = False
    """Whether the row itself is a column, at the place of its positive. It is no negative."""
    only_positives: bool = False
    """Whether the columns are there for the positives only, and are no negatives."""
    owners: Tensor | None = None
    """`[C]` or `[B, K]`, query that each column was mined for, -1 for none."""
    per_row: bool = False
    teacher_scores: Tensor | None = None
    """`[C]` or `[B, K]`, score that a teacher gives each column for its owner; NaN where unknown."""

    @property
    def num_columns(self) -> int:
        """Number of columns of a row."""
        return self.columns.shape[1] if self.per_row else len(self.columns)


@dataclass(frozen=True)
class Direction:
    """Rows and all their columns: own queries against targets, or own targets against queries."""

    pools: Sequence[Pool]
    batch: Batch
    step: int
    """Steps done, for rules with a warm-up."""
    similarity: Similarity
    is_reverse: bool = False

    @property
    def num_rows(self) -> int:
        """Number of rows, which is that of the own pairs."""
        return len(self.pools[0].rows)

    def split(self, values_RC: Tensor) -> tuple[Tensor, ...]:
        """Return the part of each pool, as views."""
        return torch.split(values_RC, [pool.num_columns for pool in self.pools], dim=1)


@dataclass(frozen=True)
class Tile:
    """Some rows of a direction, and what is known about their columns before they are scored."""

    direction: Direction
    rows: slice
    positives: Tensor
    """`[R]`, column of each row's positive, in the first pool."""
    excluded: Tensor
    """Bool `[R, C]`: the positive, and columns that are no candidates of the row at all."""
    related: Tensor
    """Bool `[R, C]`: other columns that the ids show to be no negatives: duplicates of the positive, other right
    answers of the query, the query itself (`rzen.objective.identity`)."""

    def split(self, values_RC: Tensor) -> tuple[Tensor, ...]:
        """Return the part of each pool, as views."""
        return self.direction.split(values_RC)

    def positive_similarity(self) -> Tensor:
        """Return the score of each column's key with the row's positive, `[R, C]`."""
        pools, similarity = self.direction.pools, self.direction.similarity
        positives = take(pools[0].keys, self.positives)
        found: dict[int, Tensor] = {}
        for pool in pools:  # pools may share their keys, which are then scored once
            if id(pool.keys) not in found:
                if pool.per_row:
                    found[id(pool.keys)] = similarity.own_scores(positives, take(pool.keys, self.rows))
                else:
                    found[id(pool.keys)] = similarity.scores(positives, pool.keys)
        return join_columns([found[id(pool.keys)] for pool in pools])

    def further_answers(self) -> Tensor:
        """Mark the columns of the first pool that form a pair with the row in the batch, bool."""
        identity = self.direction.batch.identity
        return (identity.askers if self.direction.is_reverse else identity.answers)(self.positives)

    @cached_property
    def teacher_cosines(self) -> Tensor | None:
        """What the teacher's vectors give the row and the columns of the first pool, NaN where one is unknown.

        `[R, N]`; None where the batch brings no such vectors.
        """
        teacher = self.direction.batch.teacher_vectors
        if teacher is None:
            return None
        rows, columns = teacher.queries, teacher.targets
        if self.direction.is_reverse:
            rows, columns = columns, rows
        return self.direction.similarity.scores(take(rows, self.positives), columns)

    def teacher_scores(self) -> Tensor | None:
        """Return what the teacher gives the positive and the row's own mined negatives, `[R, C]`, NaN elsewhere.

        None where the batch brings no teacher scores, and in the reverse direction.
        """
        of_positives = self.direction.batch.teacher_scores
        if of_positives is None or self.direction.is_reverse:
            return None
        scores_RC = of_positives.new_full(self.excluded.shape, torch.nan)
        for pool, part_RC in zip(self.direction.pools, self.split(scores_RC), strict=True):
            if pool.owners is not None and pool.teacher_scores is not None:
                owners, scores = pool.owners, pool.teacher_scores
                if pool.per_row:
                    owners, scores = owners[self.rows], scores[self.rows]
                part_RC.copy_(torch.where(owners == self.positives[:, None], scores, torch.nan))
        return scores_RC.scatter_(1, self.positives[:, None], of_positives[self.rows, None])


def tile_of(direction: Direction, rows: slice) -> Tile:
    """Mark the columns of these rows."""
    offset, device = direction.batch.positive_offset, direction.pools[0].columns.device
    positive_R = offset + torch.arange(rows.start, rows.stop, device=device)
    shape = len(positive_R), sum(pool.num_columns for pool in direction.pools)
    excluded_RC = torch.zeros(shape, dtype=torch.bool, device=device)
    related_RC = torch.zeros_like(excluded_RC)
    excluded_RC.scatter_(1, positive_R[:, None], True)
    parts = zip(direction.pools, direction.split(excluded_RC), direction.split(related_RC), strict=True)
    for pool, out_RC, same_RC in parts:
        if pool.includes_row:
            out_RC.scatter_(1, positive_R[:, None], True)
        if pool.only_positives:
            out_RC.fill_(True)
        if pool.owners is not None:
            out_RC |= (pool.owners[rows] if pool.per_row else pool.owners) < 0
        same_RC.copy_(pool.related(positive_R))
    return Tile(direction, rows, positive_R, excluded_RC, related_RC.logical_and_(~excluded_RC))


def join_columns(parts: Sequence[Tensor]) -> Tensor:
    """Put the columns of all pools next to each other; a single part is returned as it is."""
    return parts[0] if len(parts) == 1 else torch.cat([*parts], dim=1)
