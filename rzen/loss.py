"""The objective: InfoNCE with hardness weights, false-negative elimination and a temperature per task, and its options.

For a query q with positive k+ and negatives k_i, s the cosine (RzenEmbed, arXiv 2510.27350v1, section 3):

    L = -log  exp(s(q,k+)/tau) / ( exp(s(q,k+)/tau) + sum_{i kept} w_i exp(s(q,k_i)/tau) ),   w_i = exp(alpha s(q,k_i))

computed in log space, where a weight is an addition to the logit (the literal form overflows fp32 at tau = 0.01), as
softplus(log sum_i - s+/tau), which keeps its relative precision when the loss is small. Every option is a set of
columns, a term of a logit, a mask, or a weight of a row; all go through `_Rows`.

Shapes: B own queries, R rows of a tile, N pairs of all ranks, M mined negatives, C columns of a pool, T tasks, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, softplus
from torch.utils.checkpoint import checkpoint

from pipelines.errors import UserError
from rzen.config import FalseNegativeConfig, HardnessConfig, ObjectiveConfig


@dataclass(frozen=True)
class Mined:
    """Mined negatives of all ranks."""

    vectors: Tensor
    """`[M, D]`, L2-normalised, gathered with gradient. Rows without a negative may hold anything finite."""
    owners: Tensor
    """`[M]`, number of the query, among those of all ranks, that each was mined for; -1 where there is none."""


class Objective(nn.Module):
    """Loss of one rank's queries against the targets of all ranks; its mean over ranks is the loss of the whole batch.

    The temperatures are one vector `theta_T`, in the sorted order of `tasks`: every step gives it a gradient, zero for
    the other tasks, so that no parameter is ever unused, which data parallelism would have to be told.

    A theta outside its bounds counts as the bound, while its gradient passes unchanged (straight-through): that is
    linear, so averaging over ranks stays exact, and a theta at the bound can always return. Lest it runs away out
    there, whoever steps the optimizer projects it back after each step: `clamp_`, or, where the optimizer keeps a
    master copy (DeepSpeed), a step hook of the inner optimizer that clamps its temperature group to `bounds`.

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
        """Whether `forward` wants the queries of all ranks."""
        return self.config.symmetric > 0 or "queries" in self.config.same_side

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
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss over the own queries (0-dim, fp32 or wider) and detached 0-dim statistics.

        All embeddings are L2-normalised. `targets_ND` are gathered with gradient (`rzen.gather`); the positive of query
        b is row `positive_offset + b`. `queries_ND`, gathered alike, where `needs_queries`. Targets whose id equals the
        positive's are copies of it and never negatives, at any `step`.
        """
        num_queries, num_targets = len(queries_BD), len(targets_ND)
        assert 0 <= positive_offset <= num_targets - num_queries, "positives lie outside the targets"
        config, own = self.config, slice(positive_offset, positive_offset + num_queries)
        rule = (
            config.false_negatives if config.false_negatives and step >= config.false_negatives.warmup_steps else None
        )
        # The 0.95 threshold and the softmax need fp32, whatever the model computes in.
        with torch.autocast(queries_BD.device.type, enabled=False):
            queries_BD, targets_ND = _widen(queries_BD), _widen(targets_ND)
            targets_BD = targets_ND[own]
            among_targets = _Pool(queries_BD, targets_ND, targets_ND, target_ids_N, config.hardness)
            pools = [among_targets]
            if "queries" in config.same_side:
                others_ND = _given(queries_ND)
                pools.append(_Pool(queries_BD, others_ND, targets_ND, target_ids_N, config.hardness, own))
            if "targets" in config.same_side:
                pools.append(_Pool(targets_BD, targets_ND, targets_ND, target_ids_N, config.hardness, own))
            if mined is not None:
                vectors_MD = _widen(mined.vectors)
                settings, owners_M = config.mined, mined.owners
                pools.append(
                    _Pool(queries_BD, vectors_MD, vectors_MD, None, settings.hardness, None, owners_M, settings.shared)
                )
            tau = self.temperature(task)
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
        num_rows = len(pools[0].rows)
        tile = self.config.tile_rows or num_rows
        work = _Rows(self.config, pools, offset, tau, rule)
        losses: list[Tensor] = []
        sums: list[Tensor] = []
        for start in range(0, num_rows, tile):
            rows = slice(start, min(start + tile, num_rows))
            whole = tile >= num_rows or not torch.is_grad_enabled()
            loss, found = work(rows) if whole else checkpoint(work, rows, use_reentrant=False, preserve_rng_state=False)
            losses.append(loss)
            sums.append(found)
        return torch.stack(losses).sum() / num_rows, _statistics(torch.stack(sums).sum(dim=0), num_rows)


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
    """`[C]`, content of the keys, equal for copies."""
    hardness: HardnessConfig | None
    itself: slice | None = None
    """The columns that are the rows themselves, and no negatives."""
    owners: Tensor | None = None
    """`[C]`, query that each column belongs to, -1 for none."""
    shared: bool = True
    """Whether columns with an owner are negatives of other rows."""


@dataclass(frozen=True)
class _Rows:
    """What a tile of rows adds to the loss: a function of the rows alone, so that it can be recomputed."""

    config: ObjectiveConfig
    pools: Sequence[_Pool]
    offset: int
    tau: Tensor
    rule: FalseNegativeConfig | None

    def __call__(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Sum of the losses (0-dim), and sums of the statistics, named in `_statistics`."""
        config, first = self.config, self.pools[0]
        positive_R = self.offset + torch.arange(rows.start, rows.stop, device=first.rows.device)
        with torch.no_grad():
            is_positive_RC = torch.cat([self._is_positive(pool, positive_R) for pool in self.pools], dim=1)
            absent_RC = torch.cat([self._is_absent(pool, positive_R) for pool in self.pools], dim=1)
            copies_RC = torch.cat([self._is_copy(pool, positive_R) for pool in self.pools], dim=1)
            neither_RC = is_positive_RC | absent_RC
            copies_RC &= ~neither_RC
            dropped_RC = copies_RC
            if self.rule is not None:
                keys_RD = first.keys[positive_R]
                likeness_RC = torch.cat([keys_RD @ pool.keys.T for pool in self.pools], dim=1)
                dropped_RC = copies_RC | false_negatives(likeness_RC, neither_RC, copies_RC, self.rule)
            wanted_RC = is_positive_RC
            if config.copies == "positive":
                # Copies among the columns of the first pool have been scored as targets; others are only left out.
                wanted_RC = is_positive_RC | copies_RC & self._in_first_pool()
        width = first.columns.shape[1]
        losses: list[Tensor] = []
        for dims in (*config.matryoshka, width):
            scores = [_cosines(pool.rows[rows], pool.columns, dims) for pool in self.pools]
            scores_RC = torch.cat(scores, dim=1)
            out_RC = dropped_RC | absent_RC
            if config.margin is not None:
                positive_R1 = scores_RC.detach()[is_positive_RC][:, None]
                out_RC = out_RC | (scores_RC.detach() > positive_R1 + config.margin) & ~is_positive_RC
            out_RC = out_RC | is_positive_RC
            weights_RC = torch.cat(self._log_weights(scores, out_RC), dim=1)
            others_RC = (scores_RC / self.tau + weights_RC).masked_fill(out_RC, -torch.inf)
            gaps_RC = others_RC.logsumexp(dim=1, keepdim=True) - scores_RC / self.tau
            loss_R = softplus(gaps_RC).masked_fill(~wanted_RC, 0.0).sum(dim=1) / wanted_RC.sum(dim=1)
            if config.focal_gamma is not None:
                loss_R = (-torch.expm1(-loss_R)).clamp(min=1e-12) ** config.focal_gamma * loss_R
            losses.append(loss_R)
        with torch.no_grad():
            found = _sums(scores_RC, weights_RC, is_positive_RC, out_RC, absent_RC)
        return torch.stack(losses).mean(dim=0).sum(), found

    def _is_positive(self, pool: _Pool, positive_R: Tensor) -> Tensor:
        marks_RC = _no(pool, positive_R)
        return marks_RC.scatter_(1, positive_R[:, None], True) if pool is self.pools[0] else marks_RC

    def _is_absent(self, pool: _Pool, positive_R: Tensor) -> Tensor:
        """Columns that are no candidates of a row at all."""
        marks_RC = _no(pool, positive_R)
        if pool.itself is not None:
            marks_RC.scatter_(1, positive_R[:, None], True)
        if pool.owners is not None:
            marks_RC |= pool.owners[None, :] < 0
            if not pool.shared:
                marks_RC |= pool.owners[None, :] != positive_R[:, None]
        return marks_RC

    def _is_copy(self, pool: _Pool, positive_R: Tensor) -> Tensor:
        """Columns that stand for the content of a row's positive."""
        if pool.ids is None:
            return _no(pool, positive_R)
        return pool.ids[positive_R, None] == pool.ids[None, :]

    def _in_first_pool(self) -> Tensor:
        sizes = [len(pool.columns) for pool in self.pools]
        return torch.arange(sum(sizes), device=self.tau.device) < sizes[0]

    def _log_weights(self, scores: Sequence[Tensor], out_RC: Tensor) -> list[Tensor]:
        """log w of every column, pool by pool."""
        weights: list[Tensor] = []
        sizes = [part_RC.shape[1] for part_RC in scores]
        for pool, scores_RC, gone_RC in zip(self.pools, scores, torch.split(out_RC, sizes, dim=1), strict=True):
            if pool.hardness is None:
                weights.append(torch.zeros_like(scores_RC))
                continue
            source_RC = scores_RC if pool.hardness.gradient == "flowing" else scores_RC.detach()
            log_RC = pool.hardness.alpha * source_RC
            if pool.hardness.normalized:
                kept_R1 = (~gone_RC).sum(dim=1, keepdim=True).clamp(min=1).to(log_RC.dtype)
                total_R1 = log_RC.masked_fill(gone_RC, -torch.inf).logsumexp(dim=1, keepdim=True)
                log_RC = log_RC - torch.where(total_R1.isfinite(), total_R1 - kept_R1.log(), 0.0)
            weights.append(log_RC)
        return weights


def false_negatives(likeness_RC: Tensor, neither_RC: Tensor, copies_RC: Tensor, rule: FalseNegativeConfig) -> Tensor:
    """Mark, bool `[R, C]`, the negatives that look like the positive (paper, section 3), within the cap of `rule`.

    `likeness_RC` is the cosine of each column with the row's positive, fp32; `neither_RC` marks what is no negative.
    The cap becomes a second threshold per row: the most similar negative that has to stay. Copies fill the cap first.
    Ties at the cap stay.
    """
    most_R = (rule.max_dropped_fraction * (~neither_RC).sum(dim=1)).long()
    likeness_RC = likeness_RC.masked_fill(copies_RC, torch.inf).masked_fill(neither_RC, -torch.inf)
    ranked_RK = likeness_RC.topk(int(most_R.max()) + 1, dim=1).values
    cutoff_R1 = ranked_RK.gather(1, most_R[:, None])
    return likeness_RC > cutoff_R1.clamp(min=rule.threshold)


def _cosines(rows_RD: Tensor, columns_CD: Tensor, dims: int) -> Tensor:
    if dims < rows_RD.shape[1]:
        rows_RD, columns_CD = normalize(rows_RD[:, :dims], dim=1), normalize(columns_CD[:, :dims], dim=1)
    return rows_RD @ columns_CD.T


def _no(pool: _Pool, positive_R: Tensor) -> Tensor:
    return torch.zeros(len(positive_R), len(pool.columns), dtype=torch.bool, device=positive_R.device)


def _sums(scores_RC: Tensor, weights_RC: Tensor, is_positive_RC: Tensor, out_RC: Tensor, absent_RC: Tensor) -> Tensor:
    is_negative_RC = ~(is_positive_RC | absent_RC)
    positive_R = scores_RC[is_positive_RC]
    hardest_R = scores_RC.masked_fill(out_RC, -torch.inf).amax(dim=1)
    kept_RC = ~out_RC
    weights_RC = weights_RC.masked_fill(out_RC, -torch.inf)
    # Kish: (sum w)^2 / sum w^2, the number of equally weighted negatives that would vary as much.
    effective_R = (2 * weights_RC.logsumexp(dim=1) - (2 * weights_RC).logsumexp(dim=1)).exp().nan_to_num()
    return torch.stack(
        [
            is_negative_RC.sum(),
            (is_negative_RC & out_RC).sum(),
            positive_R.sum(),
            scores_RC[is_negative_RC].sum(),
            (positive_R > hardest_R).sum(),
            (effective_R / kept_RC.sum(dim=1).clamp(min=1)).sum(),
        ]
    )


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
