"""The loss of a tile of rows, as a function of its scores: InfoNCE in log space, with the terms' hooks around it.

    L = softplus( log sum over kept i of w_i exp(s_i / tau)  -  s+ / tau )

A difference of logarithms would cancel where the loss is small. softplus keeps the relative precision.

Shapes: R rows of a tile, C columns of all pools, P positives of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.nn.functional import softplus

from rzen.objective.pools import Tile
from rzen.objective.statistics import tile_sums
from rzen.objective.terms import Term


def tile_loss(
    tile: Tile, terms: Sequence[Term], scores_by_view: Sequence[Tensor], weights: Sequence[float], tau: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the sum of the rows' losses (0-dim), and the sums of their statistics.

    `scores_by_view` are `[R, C]` each, those of whole and unrounded vectors last. `weights` are the share of each view
    in the loss. `tau` is 0-dim, or `[R, 1]`.
    """
    with torch.no_grad():
        not_negative_RC = tile.excluded | tile.related
        for term in terms:
            marks_RC = term.drops(tile)
            if marks_RC is not None:
                not_negative_RC |= marks_RC
        row_P, column_P = _positives(tile, terms)
    losses: list[Tensor] = []
    for scores_RC, weight in zip(scores_by_view, weights, strict=True):
        dropped_RC = _with_drops_by_score(tile, terms, scores_RC.detach(), not_negative_RC)
        weights_RC = _log_weights(tile, terms, scores_RC, dropped_RC)
        logits_RC = scores_RC / tau
        if weights_RC is not None:
            logits_RC += weights_RC
        negatives_R = logits_RC.masked_fill_(dropped_RC, -torch.inf).logsumexp(dim=1)
        tau_P = tau if tau.ndim == 0 else tau[row_P, 0]
        loss_P = softplus(negatives_R[row_P] - scores_RC[row_P, column_P] / tau_P)
        num_positives_R = row_P.bincount(minlength=len(negatives_R))
        loss_R = torch.zeros_like(negatives_R).index_add(0, row_P, loss_P) / num_positives_R
        for term in terms:
            loss_R = term.reweigh(loss_R)
        for term in terms:
            own_R = term.loss(tile, scores_RC, tau)
            if own_R is not None:
                loss_R = loss_R + own_R
        losses.append(weight * loss_R.sum())
    with torch.no_grad():
        sums = tile_sums(scores_RC, weights_RC, tile.positives, tile.excluded, tile.related, dropped_RC)
    return torch.stack(losses).sum(), sums


def _positives(tile: Tile, terms: Sequence[Term]) -> tuple[Tensor, Tensor]:
    """Return row and column of each positive, row after row."""
    further = [marks for term in terms if (marks := term.further_positives(tile)) is not None]
    if not further:
        return torch.arange(len(tile.positives), device=tile.positives.device), tile.positives
    marks = reduce(torch.logical_or, further).scatter(1, tile.positives[:, None], True)
    row_P, column_P = marks.nonzero(as_tuple=True)
    return row_P, column_P


def _with_drops_by_score(tile: Tile, terms: Sequence[Term], scores_RC: Tensor, not_negative_RC: Tensor) -> Tensor:
    """Return the marks with those that depend on the scores of one view. Leaves `not_negative_RC` as it is."""
    for term in terms:
        dropped_RC = term.drops_by_score(tile, scores_RC)
        if dropped_RC is not None:
            not_negative_RC = not_negative_RC | dropped_RC
    return not_negative_RC


def _log_weights(tile: Tile, terms: Sequence[Term], scores_RC: Tensor, dropped_RC: Tensor) -> Tensor | None:
    """Return the sum of the terms' log weights; None where there are none, so that no zeros are added."""
    total_RC: Tensor | None = None
    for term in terms:
        weights_RC = term.log_weights(tile, scores_RC, dropped_RC)
        if weights_RC is not None:
            total_RC = weights_RC if total_RC is None else total_RC + weights_RC
    return total_RC
