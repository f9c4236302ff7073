"""What a step reports about its rows next to the loss: sums of a tile, means of a batch.

Shapes: R rows of a tile, C columns of all pools.
"""

from __future__ import annotations

import torch
from torch import Tensor


def tile_sums(
    scores_RC: Tensor,
    weights_RC: Tensor | None,
    positive_R: Tensor,
    excluded_RC: Tensor,
    related_RC: Tensor,
    dropped_RC: Tensor,
) -> Tensor:
    """Return the sums over a tile from which `batch_means` makes the statistics, in its order.

    `excluded_RC` marks what is no negative at all. `dropped_RC` also marks the negatives that were left out, among them
    those of `related_RC`, which the ids show.
    """
    num_excluded, num_dropped_R = excluded_RC.sum(), dropped_RC.sum(dim=1)
    positive_score_R = scores_RC.gather(1, positive_R[:, None])[:, 0]
    hardest_R = scores_RC.masked_fill(dropped_RC, -torch.inf).amax(dim=1)
    num_kept_R = scores_RC.shape[1] - num_dropped_R
    lead_R = (positive_score_R - hardest_R).masked_fill(num_kept_R == 0, 0.0)
    if weights_RC is None:
        effective_R = num_kept_R
    else:
        effective_R = _effective_number(weights_RC.masked_fill(dropped_RC, -torch.inf))
    return torch.stack(
        [
            excluded_RC.numel() - num_excluded,
            num_dropped_R.sum() - num_excluded,
            positive_score_R.sum(),
            scores_RC.masked_fill(excluded_RC, 0.0).sum(),
            (positive_score_R > hardest_R).sum(),
            (effective_R / num_kept_R.clamp(min=1)).sum(),
            (related_RC & ~excluded_RC).sum(),
            lead_R.sum(),
            (num_kept_R > 0).sum(),
        ]
    )


def batch_means(sums: Tensor, num_rows: int) -> dict[str, Tensor]:
    """Return the means over a batch of `num_rows` rows.

    A query is right when its positive scores higher than every kept negative. Ties count against it. `margin` is the
    mean over the queries with a kept negative.
    """
    num_negatives, dropped, positives, negatives, right, effective, duplicates, leads, num_contrasted = sums
    num_negatives = num_negatives.clamp(min=1)
    return {
        "dropped_fraction": dropped / num_negatives,
        "duplicate_fraction": duplicates / num_negatives,
        "effective_fraction": effective / num_rows,
        "positive_similarity": positives / num_rows,
        "negative_similarity": negatives / num_negatives,
        "margin": leads / num_contrasted.clamp(min=1),
        "accuracy": right / num_rows,
    }


def _effective_number(log_weights_RC: Tensor) -> Tensor:
    """Return Kish's (sum w)^2 / sum w^2 of each row: the number of equal weights that would vary as much; 0 of none."""
    weights_RC = (log_weights_RC - log_weights_RC.amax(dim=1, keepdim=True)).exp_()
    root_R: Tensor = weights_RC.sum(dim=1) / torch.linalg.vector_norm(weights_RC, dim=1)
    return root_R.square().nan_to_num()


def graded_means(scores_N: Tensor, relevance_N: Tensor, own: slice, tile_rows: int | None) -> dict[str, Tensor]:
    """Return statistics of graded pairs under the names of `batch_means`. Their mean over ranks is that of all pairs.

    `accuracy` looks at all two pairs of unequal relevance: it is the share that is scored in that order. Equal scores
    count against it. The similarities are those of the pairs above the mean relevance, and of the others. `margin` is
    their difference.
    """
    own_B = torch.arange(len(scores_N), device=scores_N.device)[own]
    share = len(scores_N) / len(own_B)  # the own pairs stand for all
    num_right = torch.zeros_like(own_B).sum()
    for rows_R in torch.split(own_B, tile_rows or len(own_B)):
        is_higher_RN = relevance_N[rows_R, None] > relevance_N
        num_right += (is_higher_RN & (scores_N[rows_R, None] > scores_N)).sum()
    ordered_N = relevance_N.sort().values
    num_unequal = torch.searchsorted(ordered_N, ordered_N).sum()
    upper_N = relevance_N > relevance_N.mean()
    zero = scores_N.new_zeros(())
    positive = (scores_N * upper_N).sum() / upper_N.sum().clamp(min=1)
    negative = (scores_N * ~upper_N).sum() / (~upper_N).sum().clamp(min=1)
    return {
        "dropped_fraction": zero,
        "duplicate_fraction": zero,
        "effective_fraction": zero + 1,
        "positive_similarity": positive,
        "negative_similarity": negative,
        "margin": positive - negative,
        "accuracy": share * num_right / num_unequal.clamp(min=1),
    }
