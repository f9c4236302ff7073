"""The similarity of two representations, and its gradient: the only place that multiplies vectors.

The tiled engine asks for scores and hands back their gradients, so that it never sees what a representation looks like.
Cosine is the only similarity. Shapes: R rows, C columns, K columns of one row, N pairs.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from rzen.vectors import Vectors


class Similarity(Protocol):
    """Scores in [-1, 1] of rows against columns, with a gradient that is computed by hand."""

    def scores(self, rows: Vectors, columns: Vectors) -> Tensor:
        """Return the score of each row with each column, `[R, C]`."""

    def own_scores(self, rows: Vectors, columns: Vectors) -> Tensor:
        """Return the score of each row with the K columns of its own, `[R, K]`. `columns` are R rows of K vectors."""

    def pair_scores(self, first: Vectors, second: Vectors) -> Tensor:
        """Return the score of row i of `first` with row i of `second`, `[N]`, differentiable by autograd."""

    def add_gradients(
        self, by_scores_RC: Tensor, rows: Vectors, columns: Vectors, by_rows: Tensor | None, by_columns: Tensor | None
    ) -> None:
        """Write the gradient of the rows into `by_rows` and add that of the columns to `by_columns`, both in place.

        `by_scores_RC` is the gradient of the scores. A gradient that is None is not wanted.
        """

    def add_own_gradients(
        self, by_scores_RK: Tensor, rows: Vectors, columns: Vectors, by_rows: Tensor | None, by_columns: Tensor | None
    ) -> None:
        """Do the same for the scores of `own_scores`."""


class Cosine:
    """The product of unit vectors."""

    def scores(self, rows: Vectors, columns: Vectors) -> Tensor:
        """Return the cosine of each row with each column, `[R, C]`."""
        return rows @ columns.T

    def own_scores(self, rows: Vectors, columns: Vectors) -> Tensor:
        """Return the cosine of each row with the columns of its own, `[R, K]`."""
        return torch.einsum("rd,rkd->rk", rows, columns)

    def pair_scores(self, first: Vectors, second: Vectors) -> Tensor:
        """Return the cosine of row i of both, `[N]`."""
        return (first * second).sum(dim=1)

    def add_gradients(
        self, by_scores_RC: Tensor, rows: Vectors, columns: Vectors, by_rows: Tensor | None, by_columns: Tensor | None
    ) -> None:
        """Write the gradient of the rows, and add that of the columns, as `Similarity` says."""
        if by_rows is not None:
            torch.mm(by_scores_RC, columns, out=by_rows)
        if by_columns is not None:
            by_columns.addmm_(by_scores_RC.T, rows)

    def add_own_gradients(
        self, by_scores_RK: Tensor, rows: Vectors, columns: Vectors, by_rows: Tensor | None, by_columns: Tensor | None
    ) -> None:
        """Write the gradient of the rows, and add that of their own columns."""
        if by_rows is not None:
            by_rows.copy_(torch.einsum("rk,rkd->rd", by_scores_RK, columns))
        if by_columns is not None:
            by_columns.addcmul_(by_scores_RK[..., None], rows[:, None])
