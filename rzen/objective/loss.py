"""The objective: InfoNCE with hardness weights, false-negative elimination and a temperature per task, and its options.

For a query q with positive k+ and negatives k_i, s the cosine (RzenEmbed, arXiv 2510.27350v1, section 3):

    L = -log  exp(s(q,k+)/tau) / ( exp(s(q,k+)/tau) + sum_{i kept} w_i exp(s(q,k_i)/tau) ),   w_i = exp(alpha s(q,k_i))

computed in log space, where a weight is an addition to the logit (the literal form overflows fp32 at tau = 0.01), as
softplus(log sum_i - s+/tau), which keeps its relative precision when the loss is small. Every option is a set of
columns, a term of a logit, a mask, or a weight of a row; all go through `_Rows`. Pairs that are graded by a number are
trained on its order instead (`cosent`).

Shapes: B own queries, R rows of a tile, P positives of these, N pairs of all ranks, M mined negatives, C columns of one
pool or of all, T tasks, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, softplus

from pipelines.errors import UserError
from rzen.config import FalseNegativeConfig, HardnessConfig, ObjectiveConfig


@dataclass(frozen=True)
class Mined:
    """Mined negatives of all ranks."""

    vectors: Tensor
    """`[M, D]`, L2-normalized, gathered with gradient. Rows without a negative may hold anything finite."""
    owners: Tensor
    """`[M]`, number of the query, among those of all ranks, that each was mined for; -1 where there is none."""


class Objective(nn.Module):
    """Loss of one rank's queries against the targets of all ranks; its mean over ranks is the loss of the whole batch.

    The temperatures are one vector `theta_T`, in the sorted order of `tasks`: every step gives it a gradient, zero for
    the other tasks, so that no parameter is ever unused, which data parallelism would have to be told.

    A theta outside its bounds counts as the bound, while its gradient passes unchanged (straight-through): that is
    linear, so averaging over ranks stays exact, and a theta at the bound can always return. Lest it runs away out
    there, whoever steps the optimizer projects it back after each step: `clamp_`, or, where the optimizer keeps a
    master duplicate (DeepSpeed), a step hook of the inner optimizer that clamps its temperature group to `bounds`.

    Gradients equal a double loop in fp64 (tests/parity/test_loss.py), across ranks (tests/parity/test_gather.py).
    """

    def __init__(self, config: ObjectiveConfig, tasks: Sequence[str]) -> None:
        super().__init__()
        if not tasks:
            raise UserError("tasks", "none given", "name the task of every source")
        temperature = config.temperature
        self.config = config
        self.tasks = tuple(sorted(set(tasks)))
        self.bounds = (math.log(temperature.minimum), math.log(temperature.maximum))
        theta_T = torch.full((len(self.tasks),), math.log(temperature.initial))
        self.theta_T = nn.Parameter(theta_T, requires_grad=temperature.learnable)

    @property
    def needs_queries(self) -> bool:
        """Whether `forward` wants the queries of all ranks, which it always does of graded pairs."""
        return self.config.symmetric > 0 or "queries" in self.config.same_side

    def widths(self, full: int) -> tuple[int, ...]:
        """Widths of the vectors that are scored, the full one last. Raises `UserError` for wider ones than that."""
        if (widest := max(self.config.matryoshka, default=0)) >= full:
            problem = f"{widest} is not below {full}, the width of the model's vectors"
            raise UserError("objective.matryoshka", problem, f"name widths from 1 to {full - 1}")
        return (*self.config.matryoshka, full)

    def temperature(self, task: str) -> Tensor:
        """tau = exp(theta) of a task within its bounds: 0-dim, with gradient. Raises `UserError` for unknown tasks."""
        if task not in self.tasks:
            raise UserError(f"task {task!r}", "has no temperature", f"known tasks: {', '.join(self.tasks)}")
        theta = self.theta_T[self.tasks.index(task)]
        if theta.dtype in (torch.bfloat16, torch.float16):
            theta = theta.float()
        return torch.exp(theta + (theta.clamp(*self.bounds) - theta).detach())

    @torch.no_grad()
    def clamp_(self) -> None:
        """Project `theta_T` onto its bounds, in place."""
        self.theta_T.clamp_(*self.bounds)

    def forward(
        self,
        queries_BD: Tensor,
        targets_ND: Tensor,
        task: str,
        *,
        positive_offset: int,
        step: int,
        queries_ND: Tensor | None = None,
        mined: Mined | None = None,
        target_ids_N: Tensor | None = None,
        relevance_N: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss over the own queries (0-dim, fp32 or wider) and detached 0-dim statistics.

        All embeddings are L2-normalized. `targets_ND` are gathered with gradient (`objective.gather`); the positive of
        query b is row `positive_offset + b`. `queries_ND`, gathered alike, where `needs_queries`. Targets whose id
        equals the positive's are duplicates of it and never negatives, at any `step`.

        `relevance_N` (NaN for pairs without one) makes it the loss of the graded pairs of all ranks, equal on each of
        them. Raises `UserError` where some pairs have one and some have none.
        """
        num_queries, num_targets = len(queries_BD), len(targets_ND)
        assert 0 <= positive_offset <= num_targets - num_queries, "positives lie outside the targets"
        config, own = self.config, slice(positive_offset, positive_offset + num_queries)
        tau = self.temperature(task)
        # The 0.95 threshold and the softmax need fp32, whatever the model computes in.
        with torch.autocast(queries_BD.device.type, enabled=False):
            queries_BD, targets_ND = _widen(queries_BD), _widen(targets_ND)
            if relevance_N is not None and _all_graded(relevance_N, task):
                loss, stats = self._graded(_given(queries_ND), targets_ND, relevance_N, own, tau)
                return loss, {"loss": loss.detach(), "temperature": tau.detach(), **stats}
            rule = config.false_negatives
            if rule is not None and step < rule.warmup_steps:
                rule = None
            targets_BD = targets_ND[own]
            among_targets = _Pool(queries_BD, targets_ND, targets_ND, target_ids_N, config.hardness)
            pools = [among_targets]
            if "queries" in config.same_side:
                others_ND = _given(queries_ND)
                pools.append(_Pool(queries_BD, others_ND, targets_ND, target_ids_N, config.hardness, itself=True))
            if "targets" in config.same_side:
                pools.append(_Pool(targets_BD, targets_ND, targets_ND, target_ids_N, config.hardness, itself=True))
            if mined is not None:
                vectors_MD = _widen(mined.vectors)
                hardness, shared = config.mined.hardness, config.mined.shared
                pools.append(
                    _Pool(queries_BD, vectors_MD, vectors_MD, None, hardness, owners=mined.owners, shared=shared)
                )
            loss, stats = self._direction(pools, positive_offset, tau, rule)
            if config.symmetric:
                among_queries = _Pool(targets_BD, _given(queries_ND), targets_ND, target_ids_N, config.hardness)
                reverse, _ = self._direction([among_queries], positive_offset, tau, rule)
                loss = (1 - config.symmetric) * loss + config.symmetric * reverse
        return loss, {"loss": loss.detach(), "temperature": tau.detach(), **stats}

    def _direction(
        self, pools: Sequence[_Pool], offset: int, tau: Tensor, rule: FalseNegativeConfig | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of the rows, whose positives are in the first pool from `offset` on, and statistics."""
        num_rows, width = pools[0].rows.shape
        vectors = [
            _cut(part, dims) for dims in self.widths(width) for pool in pools for part in (pool.rows, pool.columns)
        ]
        work = _Rows(self.config, pools, offset, rule)
        loss, sums = _Tiles.apply(work, torch.is_grad_enabled(), tau, *vectors)  # type: ignore[no-untyped-call]
        return loss, _statistics(sums, num_rows)

    def _graded(
        self, queries_ND: Tensor, targets_ND: Tensor, relevance_N: Tensor, own: slice, tau: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the pairs of all ranks, and statistics whose mean over ranks is that of all pairs."""
        widths = self.widths(targets_ND.shape[1])
        scores = [(_cut(queries_ND, dims) * _cut(targets_ND, dims)).sum(dim=1) for dims in widths]
        loss = torch.stack([cosent(scores_N, relevance_N, tau) for scores_N in scores]).mean()
        return loss, _graded_statistics(scores[-1].detach(), relevance_N, own, self.config.tile_rows)


class _Tiles(torch.autograd.Function):
    """Mean loss of all rows, and the sums of their statistics, `tile_rows` rows at a time.

    As the loss comes last, the gradient of a tile is taken as soon as the tile is scored, and kept until the backward
    pass scales it: no scores are kept or computed again, and no row waits for another. What is differentiated by
    autograd is the loss by the scores; the rest is a product of matrices.
    """

    @staticmethod
    def forward(ctx: Any, work: _Rows, with_gradient: bool, tau: Tensor, *vectors: Tensor) -> tuple[Tensor, Tensor]:
        """`vectors` are rows and columns of each pool, width after width."""
        num_rows = len(vectors[0])
        tile = work.config.tile_rows or num_rows
        needed = [with_gradient and need for need in ctx.needs_input_grad[2:]]
        gradients = [
            torch.zeros_like(part) if need else None for part, need in zip((tau, *vectors), needed, strict=True)
        ]
        tiles = [slice(start, min(start + tile, num_rows)) for start in range(0, num_rows, tile)]
        losses, sums = zip(*[_tile(work, rows, tau, vectors, gradients) for rows in tiles], strict=True)
        ctx.save_for_backward(*gradients)
        total = torch.stack(sums).sum(dim=0)
        ctx.mark_non_differentiable(total)
        return torch.stack(losses).sum(), total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(part if part is None else part * gradients[0] for part in ctx.saved_tensors)


def _tile(
    work: _Rows, rows: slice, tau: Tensor, vectors: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """What a tile adds to the mean loss, and to the sums of the statistics. Adds its gradients to `gradients`, in the
    order of `tau` and `vectors`; None where none is wanted.
    """
    by_tau, *by_vectors = gradients
    num_pools, num_rows = len(work.pools), len(vectors[0])
    sides = [*zip(vectors[::2], vectors[1::2], by_vectors[::2], by_vectors[1::2], strict=True)]
    scores = [
        _joined([rows_BD[rows] @ columns_CD.T for rows_BD, columns_CD, _, _ in sides[first : first + num_pools]])
        for first in range(0, len(sides), num_pools)
    ]
    wanted = any(gradient is not None for gradient in gradients)
    # Leaves of a graph of their own, which ends with this tile.
    tau = tau.detach().requires_grad_(wanted)
    scores = [scores_RC.requires_grad_(wanted) for scores_RC in scores]
    with torch.set_grad_enabled(wanted):
        loss, sums = work(rows, scores, tau)
        loss = loss / num_rows
    if wanted:
        *by_scores, by_own_tau = torch.autograd.grad(loss, (*scores, tau))
        if by_tau is not None:
            by_tau += by_own_tau
        by_parts = (part for by_scores_RC in by_scores for part in work.split(by_scores_RC))
        for (rows_BD, columns_CD, by_rows_BD, by_columns_CD), by_part_RC in zip(sides, by_parts, strict=True):
            if by_rows_BD is not None:
                torch.mm(by_part_RC, columns_CD, out=by_rows_BD[rows])
            if by_columns_CD is not None:
                by_columns_CD.addmm_(by_part_RC.T, rows_BD[rows])
    return loss.detach(), sums


@dataclass(frozen=True)
class _Pool:
    """Columns of one kind, and the vectors that the rows are scored with there."""

    rows: Tensor
    """`[B, D]`."""
    columns: Tensor
    """`[C, D]`."""
    keys: Tensor
    """`[C, D]`: what is compared with a row's positive to find false negatives: a target itself, or that of a query."""
    ids: Tensor | None
    """`[C]`, content of the keys, equal for duplicates."""
    hardness: HardnessConfig | None
    itself: bool = False
    """Whether a row is among the columns, where its positive is in the first pool. It is no negative."""
    owners: Tensor | None = None
    """`[C]`, query that each column belongs to, -1 for none."""
    shared: bool = True
    """Whether columns with an owner are negatives of other rows."""


@dataclass(frozen=True)
class _Rows:
    """What a tile of rows adds to the loss: a function of its scores."""

    config: ObjectiveConfig
    pools: Sequence[_Pool]
    offset: int
    rule: FalseNegativeConfig | None

    def __call__(self, rows: slice, scores: Sequence[Tensor], tau: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the losses (0-dim), and sums of the statistics, named in `_statistics`.

        `scores` are `[R, C]` each, the columns of one pool after the other, one for each width, the full one last.
        """
        config = self.config
        positive_R = self.offset + torch.arange(rows.start, rows.stop, device=tau.device)
        with torch.no_grad():
            neither_RC, duplicates_RC = self._marks(scores[0], positive_R)
            out_RC = neither_RC | duplicates_RC
            if self.rule is not None:
                out_RC |= false_negatives(self._likeness(positive_R), neither_RC, duplicates_RC, self.rule)
            row_P, column_P = torch.arange(len(positive_R), device=tau.device), positive_R
            if config.duplicates == "positive":
                # Copies among the columns of the first pool have been scored as targets; others are only left out.
                wanted_RC = self.split(duplicates_RC)[0].scatter(1, positive_R[:, None], True)
                row_P, column_P = wanted_RC.nonzero(as_tuple=True)
        losses: list[Tensor] = []
        for scores_RC in scores:
            kept_out_RC = out_RC
            if config.margin is not None:
                positive_R1 = scores_RC.detach().gather(1, positive_R[:, None])
                kept_out_RC = out_RC | (scores_RC.detach() > positive_R1 + config.margin)
            weights_RC = self._log_weights(scores_RC, kept_out_RC)
            others_RC = scores_RC / tau
            if weights_RC is not None:
                others_RC += weights_RC
            others_R = others_RC.masked_fill_(kept_out_RC, -torch.inf).logsumexp(dim=1)
            loss_P = softplus(others_R[row_P] - scores_RC[row_P, column_P] / tau)
            loss_R = torch.zeros_like(others_R).index_add(0, row_P, loss_P) / row_P.bincount(minlength=len(positive_R))
            if config.focal_gamma is not None:
                loss_R = (-torch.expm1(-loss_R)).clamp(min=1e-12) ** config.focal_gamma * loss_R
            losses.append(loss_R)
        with torch.no_grad():
            sums = _sums(scores_RC, weights_RC, positive_R, neither_RC, kept_out_RC)
        return torch.stack(losses).mean(dim=0).sum(), sums

    def split(self, marks_RC: Tensor) -> tuple[Tensor, ...]:
        """The part of each pool."""
        return torch.split(marks_RC, [len(pool.columns) for pool in self.pools], dim=1)

    def _marks(self, scores_RC: Tensor, positive_R: Tensor) -> tuple[Tensor, Tensor]:
        """Columns that are no negatives, being the positive or no candidate of the row at all; other columns that stand
        for the content of the positive. Bool `[R, C]`.
        """
        neither_RC, duplicates_RC = (torch.zeros_like(scores_RC, dtype=torch.bool) for _ in range(2))
        neither_RC.scatter_(1, positive_R[:, None], True)
        for pool, none_RC, same_RC in zip(self.pools, self.split(neither_RC), self.split(duplicates_RC), strict=True):
            if pool.itself:
                none_RC.scatter_(1, positive_R[:, None], True)
            if pool.owners is not None:
                none_RC |= pool.owners < 0
                if not pool.shared:
                    none_RC |= pool.owners != positive_R[:, None]
            if pool.ids is not None:
                torch.eq(pool.ids[positive_R, None], pool.ids, out=same_RC)
        return neither_RC, duplicates_RC.logical_and_(~neither_RC)

    def _likeness(self, positive_R: Tensor) -> Tensor:
        """Cosine of each column's key with the row's positive."""
        keys_RD = self.pools[0].keys[positive_R]
        found = {id(pool.keys): pool.keys for pool in self.pools}  # pools may share their keys
        likeness = {name: keys_RD @ keys_CD.T for name, keys_CD in found.items()}
        return _joined([likeness[id(pool.keys)] for pool in self.pools])

    def _log_weights(self, scores_RC: Tensor, out_RC: Tensor) -> Tensor | None:
        """log w of every column; None where all are 0."""
        if all(pool.hardness is None for pool in self.pools):
            return None
        weights: list[Tensor] = []
        for pool, part_RC, gone_RC in zip(self.pools, self.split(scores_RC), self.split(out_RC), strict=True):
            if pool.hardness is None:
                weights.append(torch.zeros_like(part_RC))
                continue
            source_RC = part_RC if pool.hardness.gradient == "flowing" else part_RC.detach()
            log_RC = pool.hardness.alpha * source_RC
            if pool.hardness.normalized:
                kept_R1 = (~gone_RC).sum(dim=1, keepdim=True).clamp(min=1).to(log_RC.dtype)
                total_R1 = log_RC.masked_fill(gone_RC, -torch.inf).logsumexp(dim=1, keepdim=True)
                log_RC = log_RC - torch.where(total_R1.isfinite(), total_R1 - kept_R1.log(), 0.0)
            weights.append(log_RC)
        return _joined(weights)


def cosent(scores_N: Tensor, relevance_N: Tensor, tau: Tensor) -> Tensor:
    """log(1 + sum over all (i, j) with relevance_i > relevance_j of exp((s_j - s_i) / tau)), 0-dim, in fp64 within.

    `scores_N` are the cosines of the pairs; of the relevance only the order counts (CoSENT, Huang et al. 2024,
    doi 10.1109/TASLP.2024.3402087). In that order the sum over j is a running sum: memory grows with N alone.
    """
    relevance_N, order_N = relevance_N.sort()
    logits_N = scores_N[order_N].double() / tau
    num_lower_N = torch.searchsorted(relevance_N, relevance_N)
    lower_N = logits_N.logcumsumexp(dim=0)[(num_lower_N - 1).clamp(min=0)]
    gap = (lower_N - logits_N).masked_fill(num_lower_N == 0, -torch.inf).logsumexp(dim=0)
    return softplus(gap).to(scores_N.dtype)


def false_negatives(
    likeness_RC: Tensor, neither_RC: Tensor, duplicates_RC: Tensor, rule: FalseNegativeConfig
) -> Tensor:
    """Mark, bool `[R, C]`, the negatives that look like the positive (paper, section 3), within the cap of `rule`.

    `likeness_RC` is the cosine of each column with the row's positive, fp32; `neither_RC` marks what is no negative.
    The cap becomes a second threshold per row: the most similar negative that has to stay. Copies fill the cap first.
    Ties at the cap stay.
    """
    most_R = (rule.max_dropped_fraction * (~neither_RC).sum(dim=1)).long()
    likeness_RC = likeness_RC.masked_fill(duplicates_RC, torch.inf).masked_fill(neither_RC, -torch.inf)
    alike_RC = likeness_RC > rule.threshold
    crowded_K = (alike_RC.sum(dim=1) > most_R).nonzero()[:, 0]
    if len(crowded_K):  # only these need to be ranked, which costs more than all else
        likeness_KC, most_K = likeness_RC[crowded_K], most_R[crowded_K]
        cutoff_K1 = likeness_KC.topk(int(most_K.max()) + 1, dim=1).values.gather(1, most_K[:, None])
        alike_RC[crowded_K] &= likeness_KC > cutoff_K1
    return alike_RC


def _all_graded(relevance_N: Tensor, task: str) -> bool:
    """Whether the pairs have a relevance. Raises `UserError` where only some of them have."""
    num_graded = int((~relevance_N.isnan()).sum())
    if 0 < num_graded < len(relevance_N):
        raise UserError(
            f"task {task!r}",
            f"{num_graded} of {len(relevance_N)} pairs that are contrasted have a relevance, the others have none",
            "give one to every sample of a source, and to every source of a group in data.mixture.groups, or to none",
        )
    return num_graded > 0


def _cut(vectors_ND: Tensor, dims: int) -> Tensor:
    """The first `dims` numbers of each vector, as a vector of length 1."""
    return vectors_ND if dims == vectors_ND.shape[1] else normalize(vectors_ND[:, :dims], dim=1)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([*parts], dim=1)


def _sums(
    scores_RC: Tensor, weights_RC: Tensor | None, positive_R: Tensor, neither_RC: Tensor, out_RC: Tensor
) -> Tensor:
    num_neither, num_out_R = neither_RC.sum(), out_RC.sum(dim=1)
    positive_score_R = scores_RC.gather(1, positive_R[:, None])[:, 0]
    hardest_R = scores_RC.masked_fill(out_RC, -torch.inf).amax(dim=1)
    num_kept_R = scores_RC.shape[1] - num_out_R
    effective_R = num_kept_R if weights_RC is None else _effective_number(weights_RC.masked_fill(out_RC, -torch.inf))
    return torch.stack(
        [
            neither_RC.numel() - num_neither,
            num_out_R.sum() - num_neither,
            positive_score_R.sum(),
            scores_RC.masked_fill(neither_RC, 0.0).sum(),
            (positive_score_R > hardest_R).sum(),
            (effective_R / num_kept_R.clamp(min=1)).sum(),
        ]
    )


def _effective_number(log_weights_RC: Tensor) -> Tensor:
    """Kish: (sum w)^2 / sum w^2, the number of equally weighted negatives that would vary as much; 0 of none."""
    weights_RC = (log_weights_RC - log_weights_RC.amax(dim=1, keepdim=True)).exp_()
    root_R: Tensor = weights_RC.sum(dim=1) / torch.linalg.vector_norm(weights_RC, dim=1)
    return root_R.square().nan_to_num()


def _graded_statistics(scores_N: Tensor, relevance_N: Tensor, own: slice, tile_rows: int | None) -> dict[str, Tensor]:
    """Under the names of `_statistics`: `accuracy` is the share of two pairs of unlike relevance that are scored in
    that order, the similarities are those of the pairs above the mean relevance and of the others.
    """
    own_B = torch.arange(len(scores_N), device=scores_N.device)[own]
    share = len(scores_N) / len(own_B)  # the own pairs stand for all
    num_right = torch.zeros_like(own_B).sum()
    for rows_R in torch.split(own_B, tile_rows or len(own_B)):
        is_higher_RN = relevance_N[rows_R, None] > relevance_N
        num_right += (is_higher_RN & (scores_N[rows_R, None] > scores_N)).sum()
    ordered_N = relevance_N.sort().values
    num_unlike = torch.searchsorted(ordered_N, ordered_N).sum()
    upper_N = relevance_N > relevance_N.mean()
    zero = scores_N.new_zeros(())
    return {
        "dropped_fraction": zero,
        "effective_fraction": zero + 1,
        "positive_similarity": (scores_N * upper_N).sum() / upper_N.sum().clamp(min=1),
        "negative_similarity": (scores_N * ~upper_N).sum() / (~upper_N).sum().clamp(min=1),
        "accuracy": share * num_right / num_unlike.clamp(min=1),
    }


def _statistics(sums: Tensor, num_rows: int) -> dict[str, Tensor]:
    """Means over the batch; a query is right when its positive beats every kept negative, ties count against it."""
    num_negatives, dropped, positives, negatives, right, effective = sums
    num_negatives = num_negatives.clamp(min=1)
    return {
        "dropped_fraction": dropped / num_negatives,
        "effective_fraction": effective / num_rows,
        "positive_similarity": positives / num_rows,
        "negative_similarity": negatives / num_negatives,
        "accuracy": right / num_rows,
    }


def _given(queries_ND: Tensor | None) -> Tensor:
    assert queries_ND is not None, "this objective needs the queries of all ranks"
    return _widen(queries_ND)


def _widen(embeddings: Tensor) -> Tensor:
    return embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
