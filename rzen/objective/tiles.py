"""The engine under all terms: scores a few rows at a time, and takes their gradient at once.

The loss comes last in a step, so that the gradient of a tile can be taken as soon as the tile is scored. It is kept
until the backward pass scales it. No scores are kept or computed twice, and no row waits for another. Autograd
differentiates the loss by the scores; the similarity does the rest. Shapes: R rows of a tile, C columns, T tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rzen.objective.contrast import tile_loss
from rzen.objective.pools import Direction, join_columns, tile_of
from rzen.objective.similarity import Similarity
from rzen.objective.terms import Term
from rzen.vectors import Vectors, cut


@dataclass(frozen=True)
class View:
    """One way in which vectors are scored: their first values, rounded or not. `weight` is its share of the loss."""

    dims: int
    rounded: Callable[[Vectors], Vectors] | None
    weight: float

    def of(self, vectors: Vectors) -> Vectors:
        """Return vectors of length 1, with gradient."""
        part = cut(vectors, self.dims)
        return part if self.rounded is None else self.rounded(part)


@dataclass(frozen=True)
class Work:
    """What is the same for all tiles of a direction."""

    direction: Direction
    terms: Sequence[Term]
    views: Sequence[View]
    """How vectors are scored. Whole and unrounded vectors come last, and give the statistics."""
    tile_rows: int | None
    """Rows of a tile; None: all rows at once."""


def tiled_loss(work: Work, tau: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean loss of the rows (0-dim, differentiable), and the sums of their statistics.

    `tau` is 0-dim where all rows share a task, otherwise `[B]`. Memory is that of one tile's scores. The size of a tile
    changes rounding only (tests/parity/test_loss.py).
    """
    vectors: list[Vectors] = []
    for view in work.views:
        for pool in work.direction.pools:
            vectors += [view.of(pool.rows), view.of(pool.columns)]
    loss, sums = _Tiles.apply(work, torch.is_grad_enabled(), tau, *vectors)  # type: ignore[no-untyped-call]
    return loss, sums


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, work: Work, with_gradient: bool, tau: Tensor, *vectors: Vectors) -> tuple[Tensor, Tensor]:
        """`vectors` are the rows and columns of each pool, view after view."""
        num_rows = work.direction.num_rows
        step = work.tile_rows or num_rows
        gradients: list[Tensor | None] = []
        for part, needed in zip((tau, *vectors), ctx.needs_input_grad[2:], strict=True):
            gradients.append(torch.zeros_like(part) if with_gradient and needed else None)
        losses: list[Tensor] = []
        sums: list[Tensor] = []
        for start in range(0, num_rows, step):
            loss, tile_sums = _tile(work, slice(start, min(start + step, num_rows)), tau, vectors, gradients)
            losses.append(loss)
            sums.append(tile_sums)
        ctx.save_for_backward(*gradients)
        total = torch.stack(sums).sum(dim=0)
        ctx.mark_non_differentiable(total)
        return torch.stack(losses).sum(), total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(part if part is None else part * gradients[0] for part in ctx.saved_tensors)


def _tile(
    work: Work, rows: slice, tau: Tensor, vectors: Sequence[Vectors], gradients: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Return what a tile adds to the mean loss, and to the sums of the statistics.

    Adds its gradients to `gradients`, which are in the order of `tau` and `vectors`; None where none is wanted.
    """
    direction, similarity = work.direction, work.direction.similarity
    by_tau, *by_vectors = gradients
    wanted = any(gradient is not None for gradient in gradients)
    scored = list(_scored(work, vectors, by_vectors))
    scores = [join_columns([part.scores(similarity, rows) for part in scored_in_view]) for scored_in_view in scored]
    # Leaves of a graph of their own, which ends with this tile.
    own_tau = (tau if tau.ndim == 0 else tau[rows, None]).detach().requires_grad_(wanted)
    scores = [scores_RC.requires_grad_(wanted) for scores_RC in scores]
    with torch.set_grad_enabled(wanted):
        weights = [view.weight for view in work.views]
        loss, sums = tile_loss(tile_of(direction, rows), work.terms, scores, weights, own_tau)
        loss = loss / direction.num_rows
    if wanted:
        *by_scores, by_own_tau = torch.autograd.grad(loss, (*scores, own_tau))
        if by_tau is not None:
            (by_tau if tau.ndim == 0 else by_tau[rows, None]).add_(by_own_tau)
        for scored_in_view, by_scores_RC in zip(scored, by_scores, strict=True):
            for part, by_part_RC in zip(scored_in_view, direction.split(by_scores_RC), strict=True):
                part.add_gradients(similarity, rows, by_part_RC)
    return loss.detach(), sums


@dataclass(frozen=True)
class _Scored:
    """Rows and columns of one pool in one view, and where their gradients go."""

    per_row: bool
    rows: Vectors
    columns: Vectors
    by_rows: Tensor | None
    by_columns: Tensor | None

    def scores(self, similarity: Similarity, rows: slice) -> Tensor:
        """Return the scores of a tile, `[R, C]`."""
        if self.per_row:
            return similarity.own_scores(self.rows[rows], self.columns[rows])
        return similarity.scores(self.rows[rows], self.columns)

    def add_gradients(self, similarity: Similarity, rows: slice, by_scores_RC: Tensor) -> None:
        """Put the gradients of a tile where they go."""
        by_rows = None if self.by_rows is None else self.by_rows[rows]
        if self.per_row:
            by_columns = None if self.by_columns is None else self.by_columns[rows]
            similarity.add_own_gradients(by_scores_RC, self.rows[rows], self.columns[rows], by_rows, by_columns)
        else:
            similarity.add_gradients(by_scores_RC, self.rows[rows], self.columns, by_rows, self.by_columns)


def _scored(work: Work, vectors: Sequence[Vectors], by_vectors: Sequence[Tensor | None]) -> Iterator[list[_Scored]]:
    """Yield the pools of each view."""
    num_parts = 2 * len(work.direction.pools)
    for first in range(0, len(vectors), num_parts):
        starts = range(first, first + num_parts, 2)
        yield [
            _Scored(pool.per_row, *vectors[i : i + 2], *by_vectors[i : i + 2])
            for i, pool in zip(starts, work.direction.pools, strict=True)
        ]
