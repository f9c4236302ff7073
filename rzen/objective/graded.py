"""Graded pairs: each pair says how well its target answers its query. Only the order of these grades is learned.

Terms for negatives do not apply. Temperature and Matryoshka widths do. Shape: N pairs of all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pipelines.errors import UserError
from rzen.objective.batch import Batch, queries_of
from rzen.objective.similarity import Similarity
from rzen.objective.statistics import graded_means
from rzen.vectors import cut


def is_graded(batch: Batch) -> bool:
    """Return whether the pairs have a relevance.

    Raises `UserError` where only some of them have one. Raises it too where graded own pairs are of several tasks.
    """
    if batch.relevance is None:
        return False
    num_pairs, num_graded = len(batch.relevance), int((~batch.relevance.isnan()).sum())
    tasks = sorted({batch.tasks} if isinstance(batch.tasks, str) else set(batch.tasks))
    place = f"task {', '.join(map(repr, tasks))}"
    if 0 < num_graded < num_pairs:
        raise UserError(
            place,
            f"{num_graded} of {num_pairs} pairs that are contrasted have a relevance, the others have none",
            "give one to all samples of a source (of a group in data.mixture.groups), or to none",
        )
    if num_graded and len(tasks) > 1:
        raise UserError(place, "graded pairs of several tasks are contrasted", "keep them in batches of their own")
    return num_graded > 0


def graded_loss(
    batch: Batch, similarity: Similarity, widths: Sequence[int], tau: Tensor, tile_rows: int | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of the pairs of all ranks, equal on each, and statistics."""
    queries, relevance_N = queries_of(batch), batch.relevance
    assert relevance_N is not None
    losses: list[Tensor] = []
    for dims in widths:
        scores_N = similarity.pair_scores(cut(queries, dims), cut(batch.targets, dims))
        losses.append(cosent(scores_N, relevance_N, tau))
    return torch.stack(losses).mean(), graded_means(scores_N.detach(), relevance_N, batch.own, tile_rows)


def cosent(scores_N: Tensor, relevance_N: Tensor, tau: Tensor) -> Tensor:
    """Return log(1 + sum over all (i, j) with relevance_i > relevance_j of exp((s_j - s_i) / tau)), 0-dim.

    `scores_N` are the similarities of the pairs. Only the order of the relevance counts (CoSENT, Huang et al. 2024,
    doi 10.1109/TASLP.2024.3402087). In that order the sum over j is a running sum, in fp64. Memory is linear in N.
    """
    relevance_N, order_N = relevance_N.sort()
    logits_N = scores_N[order_N].double() / tau
    num_lower_N = torch.searchsorted(relevance_N, relevance_N)
    lower_N = logits_N.logcumsumexp(dim=0)[(num_lower_N - 1).clamp(min=0)]
    gap = (lower_N - logits_N).masked_fill(num_lower_N == 0, -torch.inf).logsumexp(dim=0)
    return softplus(gap).to(scores_N.dtype)
