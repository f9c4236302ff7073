"""The batches that the objective is given: own vectors, and what is gathered from all ranks, block by block.

Shapes: B own pairs, N pairs of all ranks, K mined negatives of a query at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from rzen.inputs.pairs import EncodedPairs
from rzen.objective.batch import Batch, Mined, TeacherVectors
from rzen.objective.gather import gather_ids, gather_with_gradient
from rzen.vectors import Vectors, take, zeros


@dataclass(frozen=True)
class OwnVectors:
    """Vectors of one rank's pairs."""

    queries: Vectors
    targets: Vectors
    mined: Vectors | None
    """Mined negatives, those of query 0 first; None where this rank has none."""


@dataclass(frozen=True)
class _AllRanks:
    """Pairs of all ranks, rank after rank. Every rank has B of them."""

    targets: Vectors
    ids: Tensor
    """`[N, 3]`: ids of targets, queries and instructions."""
    queries: Vectors | None
    relevance: Tensor | None
    teacher_vectors: Tensor | None
    """`[N, 2, Dt]`: those of queries and targets."""


def contrasted_batches(
    own: OwnVectors,
    pairs: EncodedPairs,
    blocks: Sequence[tuple[str, int]],
    *,
    needs_queries: bool,
    shares_mined: Callable[[str], bool],
) -> Iterator[Batch]:
    """Yield the batch of each block. The pairs of a block are contrasted with each other only, across ranks.

    `blocks` are (task, own pairs) in the order of the pairs, equal on all ranks. `shares_mined` says of a task whether
    its mined negatives are gathered. The first step of the iterator is a collective.
    """
    gathered = _gather(own, pairs, needs_queries)
    is_shared_B = np.repeat([shares_mined(task) for task, _ in blocks], [size for _, size in blocks])
    shared = _gather_mined(own, pairs, is_shared_B)
    rank = dist.get_rank() if dist.is_initialized() else 0
    start = 0
    for task, size in blocks:
        rows = slice(start, start + size)

        def of_block(values: Tensor, rows: slice = rows) -> Tensor:
            return values.view(-1, len(pairs), *values.shape[1:])[:, rows].flatten(0, 1)

        mined = None
        if not is_shared_B[start]:
            mined = _places(own, pairs, rows).as_own(rank * size)
        elif shared is not None:
            first = int(is_shared_B[:start].sum())
            mined = shared.of_block(slice(first, first + size), int(is_shared_B.sum())).as_shared()
        target_ids, query_ids, instruction_ids = of_block(gathered.ids).unbind(dim=1)
        yield Batch(
            take(own.queries, rows),
            of_block(gathered.targets),
            task,
            rank * size,
            all_queries=None if gathered.queries is None else of_block(gathered.queries),
            mined=mined,
            target_ids=target_ids,
            query_ids=query_ids,
            instruction_ids=instruction_ids,
            relevance=None if gathered.relevance is None else of_block(gathered.relevance),
            teacher_scores=torch.tensor(pairs.teacher_scores[rows], device=own.targets.device),
            teacher_vectors=None
            if gathered.teacher_vectors is None
            else TeacherVectors(*of_block(gathered.teacher_vectors).unbind(dim=1)),
        )
        start += size


def _gather(own: OwnVectors, pairs: EncodedPairs, needs_queries: bool) -> _AllRanks:
    device = own.targets.device
    ids = np.stack([pairs.target_ids, pairs.query_ids, pairs.instruction_ids], axis=1)
    relevance_N = gather_ids(torch.tensor(pairs.relevance, device=device))
    is_graded = not bool(relevance_N.isnan().all())
    teacher = pairs.teacher_vectors
    return _AllRanks(
        targets=gather_with_gradient(own.targets),
        ids=gather_ids(torch.tensor(ids, device=device)),
        queries=gather_with_gradient(own.queries) if is_graded or needs_queries else None,
        relevance=relevance_N if is_graded else None,
        teacher_vectors=None if teacher is None else gather_ids(torch.tensor(teacher, device=device)),
    )


@dataclass(frozen=True)
class _MinedPlaces:
    """K places for the mined negatives of each of Q queries, as many as the query with the most has."""

    vectors: Tensor
    """Q rows of K vectors, zero behind those that a query has."""
    ids: Tensor
    """`[Q, K]`, 0 where there is none."""
    teacher_scores: Tensor
    """`[Q, K]`, NaN where there is none, or no score."""
    counts: Tensor
    """`[Q]`, mined negatives of each query."""

    def of_block(self, rows: slice, num_own: int) -> _MinedPlaces:
        """Return the places of a block: `rows` of the `num_own` queries of every rank."""

        def cut(values: Tensor) -> Tensor:
            return values.view(-1, num_own, *values.shape[1:])[:, rows].flatten(0, 1)

        return _MinedPlaces(cut(self.vectors), cut(self.ids), cut(self.teacher_scores), cut(self.counts))

    def as_shared(self) -> Mined:
        """Return the negatives of all queries of a block."""
        owners, scores = self._owners(0).flatten(), self.teacher_scores.flatten()
        return Mined(self.vectors.flatten(0, 1), owners, scores, self.ids.flatten())

    def as_own(self, offset: int) -> Mined | None:
        """Return the negatives of own queries, which are numbered from `offset` on. None where they have none."""
        if not self.ids.numel():
            return None
        return Mined(self.vectors, self._owners(offset), self.teacher_scores, self.ids)

    def _owners(self, offset: int) -> Tensor:
        """Return the query of each place, `[Q, K]`, -1 where it is empty."""
        query_Q1 = offset + torch.arange(len(self.counts), device=self.counts.device)[:, None]
        return query_Q1.where(_is_filled(self.counts, self.ids.shape[1]), -1)


def _gather_mined(own: OwnVectors, pairs: EncodedPairs, is_shared_B: npt.NDArray[np.bool_]) -> _MinedPlaces | None:
    """Return the mined negatives of all ranks, for queries that share them. None where there are none.

    A collective where any query shares them. Every rank then takes part in the backward pass, whether it has some.
    """
    if not is_shared_B.any():
        return None
    counts_N = gather_ids(torch.tensor(pairs.negative_counts[is_shared_B], device=own.targets.device))
    most = int(counts_N.max())
    if not most:
        return None
    places = _places(own, pairs, is_shared_B, most)
    vectors = gather_with_gradient(places.vectors)
    return _MinedPlaces(vectors, gather_ids(places.ids), gather_ids(places.teacher_scores), counts_N)


def _places(
    own: OwnVectors, pairs: EncodedPairs, rows: slice | npt.NDArray[np.bool_], most: int | None = None
) -> _MinedPlaces:
    """Put the mined negatives of some own queries into places: `most` of each, or as many as one of them has."""
    counts = pairs.negative_counts[rows]
    is_wanted_B = np.zeros(len(pairs), bool)
    is_wanted_B[rows] = True
    is_wanted_M = np.repeat(is_wanted_B, pairs.negative_counts)
    device = own.targets.device
    counts_Q = torch.tensor(counts, device=device)
    most = int(counts.max(initial=0)) if most is None else most
    filled_QK = _is_filled(counts_Q, most)
    vectors = zeros(own.targets, len(counts), most)
    if own.mined is None:
        # Gathering them must have a backward pass on this rank too, as other ranks wait for it.
        vectors.requires_grad_(torch.is_grad_enabled())
    else:
        vectors[filled_QK] = own.mined[torch.tensor(is_wanted_M, device=device)]
    ids_QK = torch.zeros(len(counts), most, dtype=torch.int64, device=device)
    ids_QK[filled_QK] = torch.tensor(pairs.negative_ids[is_wanted_M], device=device)
    scores_QK = torch.full((len(counts), most), torch.nan, device=device)
    scores_QK[filled_QK] = torch.tensor(pairs.negative_teacher_scores[is_wanted_M], device=device)
    return _MinedPlaces(vectors, ids_QK, scores_QK, counts_Q)


def _is_filled(counts_N: Tensor, most: int) -> Tensor:
    """Mark, bool `[N, K]`, the places that hold a negative."""
    return torch.arange(most, device=counts_N.device) < counts_N[:, None]
