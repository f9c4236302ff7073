"""The batches that the objective is given: own vectors, and what is gathered from all ranks, block by block.

Shapes: B own pairs, N pairs of all ranks, K mined negatives of a query at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from rzen.inputs.pairs import EncodedPairs
from rzen.objective.batch import Batch, Mined
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
    num_mined: Tensor
    """`[N]`, mined negatives of each query."""
    mined: Tensor | None
    """K vectors for each of N queries, zero behind those that a query has; None where no rank has any."""
    mined_ids: Tensor | None
    """Their ids, `[N, K]`."""
    queries: Vectors | None
    relevance: Tensor | None


def contrasted_batches(
    own: OwnVectors, pairs: EncodedPairs, blocks: Sequence[tuple[str, int]], *, needs_queries: bool
) -> Iterator[Batch]:
    """Yield the batch of each block. The pairs of a block are contrasted with each other only, across ranks.

    `blocks` are (task, own pairs) in the order of the pairs, equal on all ranks. The first step of the iterator is a
    collective.
    """
    gathered = _gather(own, pairs, needs_queries)
    rank = dist.get_rank() if dist.is_initialized() else 0
    start = 0
    for task, size in blocks:
        rows = slice(start, start + size)

        def of_block(values: Tensor, rows: slice = rows) -> Tensor:
            return values.view(-1, len(pairs), *values.shape[1:])[:, rows].flatten(0, 1)

        mined = None
        if gathered.mined is not None and gathered.mined_ids is not None:
            mined = _mined(of_block(gathered.mined), of_block(gathered.num_mined), of_block(gathered.mined_ids))
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
        )
        start += size


def _gather(own: OwnVectors, pairs: EncodedPairs, needs_queries: bool) -> _AllRanks:
    device = own.targets.device
    counts_N = gather_ids(torch.tensor(pairs.negative_counts, device=device))
    most = int(counts_N.max())
    room = _with_room(own, pairs.negative_counts, most)
    ids = np.stack([pairs.target_ids, pairs.query_ids, pairs.instruction_ids], axis=1)
    relevance_N = gather_ids(torch.tensor(pairs.relevance, device=device))
    is_graded = not bool(relevance_N.isnan().all())
    return _AllRanks(
        targets=gather_with_gradient(own.targets),
        ids=gather_ids(torch.tensor(ids, device=device)),
        num_mined=counts_N,
        mined=gather_with_gradient(room) if most else None,
        mined_ids=gather_ids(_ids_with_room(pairs, most).to(device)) if most else None,
        queries=gather_with_gradient(own.queries) if is_graded or needs_queries else None,
        relevance=relevance_N if is_graded else None,
    )


def _with_room(own: OwnVectors, counts: npt.NDArray[np.int64], most: int) -> Tensor:
    """Return the mined negatives with room for `most` of each query, so that ranks have equally many rows."""
    room = zeros(own.targets, len(counts), most)
    if own.mined is None:
        # Gathering them must have a backward pass on this rank too, as other ranks wait for it.
        return room.requires_grad_(torch.is_grad_enabled())
    room[_is_filled(torch.tensor(counts, device=room.device), most)] = own.mined
    return room


def _ids_with_room(pairs: EncodedPairs, most: int) -> Tensor:
    """Return the ids of the mined negatives in the places of `_with_room`, 0 where there is none."""
    counts_B = torch.tensor(pairs.negative_counts)
    room_BK = torch.zeros(len(counts_B), most, dtype=torch.int64)
    room_BK[_is_filled(counts_B, most)] = torch.tensor(pairs.negative_ids)
    return room_BK


def _mined(vectors: Tensor, counts_N: Tensor, ids_NK: Tensor) -> Mined:
    """Return the negatives of a block with their owners; -1 owns what is empty."""
    owners_N1 = torch.arange(len(counts_N), device=counts_N.device)[:, None]
    owners_NK = owners_N1.where(_is_filled(counts_N, vectors.shape[1]), -1)
    return Mined(vectors.flatten(0, 1), owners_NK.flatten(), ids=ids_NK.flatten())


def _is_filled(counts_N: Tensor, most: int) -> Tensor:
    """Mark, bool `[N, K]`, the places that hold a negative."""
    return torch.arange(most, device=counts_N.device) < counts_N[:, None]
