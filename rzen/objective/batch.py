"""What the objective is given: the vectors of one rank's queries, and everything that they are contrasted with.

Shapes: B own pairs, N pairs of all ranks, M mined negatives of all ranks, K of one query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from rzen.objective.identity import Identity
from rzen.vectors import Vectors, take, widen


@dataclass(frozen=True)
class Mined:
    """Mined negatives: of all ranks, and of every query (`[M]`), or K of each own query, and of no other (`[B, K]`)."""

    vectors: Vectors
    """M rows, gathered with gradient, or B rows of K vectors. Places without a negative may hold anything finite."""
    owners: Tensor
    """`[M]` or `[B, K]`, number of the query, among those of all ranks, that each was mined for; -1 for none."""
    teacher_scores: Tensor | None = None
    """`[M]` or `[B, K]`, score that a teacher gives each negative for its owner; NaN where unknown."""
    ids: Tensor | None = None
    """`[M]` or `[B, K]`, content of each negative, equal to the id of a target or query of equal content. Without them,
    a negative that is a right answer of a row counts as a negative of it."""

    @property
    def is_shared(self) -> bool:
        """Whether each is a negative of all queries."""
        return self.owners.ndim == 1


@dataclass(frozen=True)
class TeacherVectors:
    """Vectors that a larger model gives the pairs of all ranks, of its own width. NaN where unknown, no gradient."""

    queries: Vectors
    """`[N, Dt]`."""
    targets: Vectors
    """`[N, Dt]`."""

    def widened(self) -> TeacherVectors:
        """Return the vectors in fp32 or wider."""
        return TeacherVectors(widen(self.queries), widen(self.targets))


@dataclass(frozen=True)
class Batch:
    """One rank's share of a batch, with the targets of all ranks."""

    queries: Vectors
    """B own query inputs."""
    targets: Vectors
    """N target inputs of all ranks, gathered with gradient. The positive of query b is row `positive_offset + b`."""
    tasks: str | Sequence[str]
    """Task of the batch, or of each own pair. A task owns a temperature."""
    positive_offset: int = 0
    """Row of `targets` that is the positive of the first own query."""
    all_queries: Vectors | None = None
    """N query inputs of all ranks, gathered with gradient. Needed where `Objective.needs_queries`, and by graded pairs.
    """
    mined: Mined | None = None
    """Mined negatives."""
    target_ids: Tensor | None = None
    """`[N]`, equal for targets of equal content. Such targets are duplicates, and never negatives of each other."""
    query_ids: Tensor | None = None
    """`[N]`, content of each query, equal to the id of a target or mined negative of equal content."""
    instruction_ids: Tensor | None = None
    """`[N]`, equal for queries that are asked with equal instructions. Queries are equal by content and instruction.
    None where all have the same."""
    relevance: Tensor | None = None
    """`[N]`, grade of each pair of all ranks; NaN for pairs without one. Graded pairs are trained on their order."""
    teacher_scores: Tensor | None = None
    """`[B]`, score that a teacher gives each own positive; NaN where unknown. Read by terms that distill."""
    teacher_vectors: TeacherVectors | None = None
    """Vectors that a teacher gives the pairs of all ranks."""

    def __post_init__(self) -> None:
        assert 0 <= self.positive_offset <= len(self.targets) - len(self.queries), "positives lie outside the targets"
        assert isinstance(self.tasks, str) or len(self.tasks) == len(self.queries), "each own pair needs a task"

    @property
    def own(self) -> slice:
        """Rows of the own pairs among those of all ranks."""
        return slice(self.positive_offset, self.positive_offset + len(self.queries))

    @cached_property
    def positives(self) -> Vectors:
        """Targets of the own queries. One slice for all who use it, so that their gradients meet in one place."""
        return take(self.targets, self.own)

    @cached_property
    def identity(self) -> Identity:
        """What the ids say about columns that are no negatives."""
        return Identity.of(
            self.target_ids,
            self.query_ids,
            self.instruction_ids,
            None if self.mined is None or self.mined.ids is None else self.mined.ids.flatten(),
            num_pairs=len(self.targets),
            num_mined=0 if self.mined is None else self.mined.owners.numel(),
            device=self.targets.device,
        )

    def widened(self) -> Batch:
        """Return the batch with all vectors in fp32 or wider. The 0.95 threshold and the softmax need it."""
        mined = self.mined and replace(self.mined, vectors=widen(self.mined.vectors))
        return replace(
            self,
            queries=widen(self.queries),
            targets=widen(self.targets),
            all_queries=None if self.all_queries is None else widen(self.all_queries),
            mined=mined,
            teacher_vectors=self.teacher_vectors and self.teacher_vectors.widened(),
        )


def queries_of(batch: Batch) -> Vectors:
    """Return the queries of all ranks."""
    assert batch.all_queries is not None, "this objective needs the queries of all ranks"
    return batch.all_queries
