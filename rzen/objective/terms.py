"""The options of the objective as terms that compose. Each is one class and one entry of `TERMS`.

A term overrides the hooks that it needs. The engine calls the hooks of all terms, in the order of `TERMS`, for each
tile. To add an option, add a field to `ObjectiveConfig` and a class with an entry here; nothing else changes.

Shapes: R rows of a tile, C columns of all pools, K rows whose drops are capped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rzen.config import (
    DistillationConfig,
    EmbeddingDistillationConfig,
    FalseNegativeConfig,
    MinedConfig,
    ObjectiveConfig,
)
from rzen.objective.batch import Batch, queries_of
from rzen.objective.distillation import distillation_loss
from rzen.objective.pools import Pool, Tile, join_columns

Rounding = Literal["int8", "binary"]


class Term:
    """One option of the objective. Every hook here changes nothing; a term overrides those that it needs."""

    widths: tuple[int, ...] = ()
    """Widths below the full one at which vectors are scored as well. The loss is the mean over all widths."""
    roundings: tuple[Rounding, ...] = ()
    """How vectors of each width are rounded and scored as well."""
    rounded_weight: float = 0.0
    """Factor of the loss of rounded vectors, which is added."""
    reverse_share: float = 0.0
    """Share of the reverse direction, targets against queries, in the loss."""
    needs_queries: bool = False
    """Whether the batch must bring the queries of all ranks."""

    def pools(self, batch: Batch) -> list[Pool]:
        """Return further columns of the queries, behind the targets. They take no part in the reverse direction."""
        return []

    def drops(self, tile: Tile) -> Tensor | None:
        """Mark negatives to leave out, bool `[R, C]`, by what is known without their scores. Called once a tile."""
        return None

    def drops_by_score(self, tile: Tile, scores_RC: Tensor) -> Tensor | None:
        """Mark negatives to leave out, bool `[R, C]`, by their detached scores. Called for each width."""
        return None

    def further_positives(self, tile: Tile) -> Tensor | None:
        """Mark columns of the first pool that are positives too, bool. A row's loss is the mean over its positives."""
        return None

    def log_weights(self, tile: Tile, scores_RC: Tensor, dropped_RC: Tensor) -> Tensor | None:
        """Return log w of each column, `[R, C]`: w multiplies the exponential of the column's logit.

        `scores_RC` carries a gradient, `dropped_RC` marks every column that is no negative. The positive has w = 1.
        """
        return None

    def reweigh(self, loss_R: Tensor) -> Tensor:
        """Return the contrastive loss of each row, weighed by itself."""
        return loss_R

    def loss(self, tile: Tile, scores_RC: Tensor, tau: Tensor) -> Tensor | None:
        """Return a loss of each row, `[R]`, which is added to the contrastive one.

        Called for each width and each direction. Gradients by `scores_RC` and `tau` are taken by autograd. `tau` is
        0-dim, or `[R, 1]` where the rows differ in their task.
        """
        return None


class HardnessWeights(Term):
    """Weight w = exp(alpha s) of each negative (RzenEmbed, arXiv 2510.27350v1, section 3), by the setting of its pool.

    In log space a weight is an addition to the logit. The literal product overflows fp32 at tau = 0.01.
    """

    def log_weights(self, tile: Tile, scores_RC: Tensor, dropped_RC: Tensor) -> Tensor | None:
        """Return alpha s of each column; None where no pool has weights."""
        pools = tile.direction.pools
        if all(pool.hardness is None for pool in pools):
            return None
        weights: list[Tensor] = []
        for pool, part_RC, gone_RC in zip(pools, tile.split(scores_RC), tile.split(dropped_RC), strict=True):
            if pool.hardness is None:
                weights.append(torch.zeros_like(part_RC))
                continue
            source_RC = part_RC if pool.hardness.gradient == "flowing" else part_RC.detach()
            log_RC = pool.hardness.alpha * source_RC
            if pool.hardness.normalized:
                log_RC = log_RC - _log_mean_weight(log_RC, gone_RC)
            weights.append(log_RC)
        return join_columns(weights)


def _log_mean_weight(log_RC: Tensor, dropped_RC: Tensor) -> Tensor:
    """Return the log of the mean weight of each row's kept negatives, `[R, 1]`; 0 where a row has none."""
    kept_R1 = (~dropped_RC).sum(dim=1, keepdim=True).clamp(min=1).to(log_RC.dtype)
    total_R1 = log_RC.masked_fill(dropped_RC, -torch.inf).logsumexp(dim=1, keepdim=True)
    return torch.where(total_R1.isfinite(), total_R1 - kept_R1.log(), 0.0)


@dataclass(frozen=True)
class FalseNegatives(Term):
    """Leave out negatives that look like the positive (RzenEmbed, section 3), after the warm-up."""

    rule: FalseNegativeConfig

    def drops(self, tile: Tile) -> Tensor | None:
        """Mark them; None during the warm-up."""
        if tile.direction.step < self.rule.warmup_steps:
            return None
        return false_negatives(tile.positive_similarity(), tile.excluded, tile.related, self.rule)


def false_negatives(
    similarity_RC: Tensor, excluded_RC: Tensor, related_RC: Tensor, rule: FalseNegativeConfig
) -> Tensor:
    """Mark the negatives that look like the positive, bool `[R, C]`, within the cap of `rule`.

    `similarity_RC` is the score of each column's key with the row's positive, fp32; `excluded_RC` marks what is no
    negative. The cap becomes a second threshold of each row: the most similar negative that has to stay. What the ids
    show to be no negatives (`related_RC`) fills the cap first. Ties at the cap stay.
    """
    most_R = (rule.max_dropped_fraction * (~excluded_RC).sum(dim=1)).long()
    similarity_RC = similarity_RC.masked_fill(related_RC, torch.inf).masked_fill(excluded_RC, -torch.inf)
    alike_RC = similarity_RC > rule.threshold
    crowded_K = (alike_RC.sum(dim=1) > most_R).nonzero()[:, 0]
    if len(crowded_K):  # only these need to be ranked, which costs more than everything else
        similarity_KC, most_K = similarity_RC[crowded_K], most_R[crowded_K]
        cutoff_K1 = similarity_KC.topk(int(most_K.max()) + 1, dim=1).values.gather(1, most_K[:, None])
        alike_RC[crowded_K] &= similarity_KC > cutoff_K1
    return alike_RC


class DuplicatesAsPositives(Term):
    """Duplicates of the positive, and the targets of equal queries, are positives too. The engine never takes them for
    negatives.
    """

    def further_positives(self, tile: Tile) -> Tensor | None:
        """Mark them in the first pool. Those in other pools have not been scored as targets."""
        return tile.further_answers()


@dataclass(frozen=True)
class Margin(Term):
    """Leave out negatives with s > s(q, k+) + margin (Qwen3-Embedding)."""

    margin: float

    def drops_by_score(self, tile: Tile, scores_RC: Tensor) -> Tensor | None:
        """Mark them."""
        positive_R1 = scores_RC.gather(1, tile.positives[:, None])
        return scores_RC > positive_R1 + self.margin


@dataclass(frozen=True)
class FocalWeights(Term):
    """Weigh each row by (1 - p)^gamma, p the probability of its positive (Lin et al., arXiv 1708.02002)."""

    gamma: float

    def reweigh(self, loss_R: Tensor) -> Tensor:
        """Return the weighed loss. 1 - p is -expm1(-loss), which stays exact for small losses."""
        return (-torch.expm1(-loss_R)).clamp(min=1e-12) ** self.gamma * loss_R


@dataclass(frozen=True)
class Symmetric(Term):
    """Add the reverse direction, targets against all queries."""

    reverse_share: float
    needs_queries: bool = True


@dataclass(frozen=True)
class OtherQueries(Term):
    """Other queries are negatives of a query (GTE)."""

    config: ObjectiveConfig
    needs_queries: bool = True

    def pools(self, batch: Batch) -> list[Pool]:
        """Return the queries of all ranks."""
        related = batch.identity.query_to_queries
        queries, hardness = queries_of(batch), self.config.hardness
        return [Pool(batch.queries, queries, batch.targets, related, hardness, includes_row=True)]


@dataclass(frozen=True)
class OtherTargets(Term):
    """Other targets are negatives of a query's positive (GTE)."""

    config: ObjectiveConfig

    def pools(self, batch: Batch) -> list[Pool]:
        """Return the targets of all ranks, scored with the own positives."""
        related = batch.identity.target_to_targets
        hardness = self.config.hardness
        return [Pool(batch.positives, batch.targets, batch.targets, related, hardness, includes_row=True)]


@dataclass(frozen=True)
class MinedNegatives(Term):
    """Mined negatives, with weights of their own."""

    config: MinedConfig

    def pools(self, batch: Batch) -> list[Pool]:
        """Return those that the batch brings: of all ranks, or of the own queries."""
        mined = batch.mined
        if mined is None:
            return []
        assert mined.is_shared == self.config.shared, "mined negatives are gathered if they are shared, and only then"
        identity, num_own = batch.identity, len(batch.queries)

        def related_to_own(row_R: Tensor) -> Tensor:
            return identity.query_to_own_mined(row_R, row_R - batch.positive_offset, num_own)

        return [
            Pool(
                batch.queries,
                mined.vectors,
                mined.vectors,
                identity.query_to_mined if mined.is_shared else related_to_own,
                self.config.hardness,
                owners=mined.owners,
                per_row=not mined.is_shared,
                teacher_scores=mined.teacher_scores,
            )
        ]


@dataclass(frozen=True)
class Distillation(Term):
    """Learn the teacher's scores of the positive and of the row's own mined negatives."""

    config: DistillationConfig

    def reweigh(self, loss_R: Tensor) -> Tensor:
        """Return the contrastive loss with its weight."""
        return loss_R * self.config.contrastive_weight

    def loss(self, tile: Tile, scores_RC: Tensor, tau: Tensor) -> Tensor | None:
        """Return the weighted loss against the teacher; None where the batch has no teacher."""
        teacher_RC = tile.teacher_scores()
        if teacher_RC is None:
            return None
        loss_R = distillation_loss(scores_RC, teacher_RC, tile.positives, tau, self.config)
        if self.config.only_if_right:
            best_R = teacher_RC.nan_to_num(nan=-torch.inf).amax(dim=1)
            is_right_R = teacher_RC.gather(1, tile.positives[:, None])[:, 0] >= best_R
            loss_R = torch.where(is_right_R, loss_R, 0.0)
        return self.config.weight * loss_R


@dataclass(frozen=True)
class EmbeddingDistillation(Term):
    """Learn the teacher's cosines with the columns of the first pool, in each direction that the loss has.

    Duplicates of the positive stay: teacher and student both give them the positive's score.
    """

    config: EmbeddingDistillationConfig
    reweighs: bool
    """Whether this term weighs the contrastive loss. Not where `Distillation` does."""

    def reweigh(self, loss_R: Tensor) -> Tensor:
        """Return the contrastive loss with its weight."""
        return loss_R * self.config.contrastive_weight if self.reweighs else loss_R

    def loss(self, tile: Tile, scores_RC: Tensor, tau: Tensor) -> Tensor | None:
        """Return the weighted loss against the teacher; None where the batch has no vectors of one."""
        teacher_RN = tile.teacher_cosines
        if teacher_RN is None:
            return None
        scores_RN = tile.split(scores_RC)[0]
        return self.config.weight * distillation_loss(scores_RN, teacher_RN, tile.positives, tau, self.config)


@dataclass(frozen=True)
class Matryoshka(Term):
    """Score the first values of a vector as a vector, too (Kusupati et al., arXiv 2205.13147)."""

    widths: tuple[int, ...]


@dataclass(frozen=True)
class Quantized(Term):
    """Score the rounded vectors, too (`rzen.objective.quantized`)."""

    roundings: tuple[Rounding, ...]
    rounded_weight: float


def _embedding_distillation(config: ObjectiveConfig) -> list[Term]:
    teacher = config.embedding_distillation
    return [EmbeddingDistillation(teacher, reweighs=config.distillation is None)] if teacher else []


def _same_side(config: ObjectiveConfig) -> list[Term]:
    terms: list[Term] = [OtherQueries(config)] if "queries" in config.same_side else []
    return terms + ([OtherTargets(config)] if "targets" in config.same_side else [])


TERMS: Mapping[str, Callable[[ObjectiveConfig], list[Term]]] = {
    "same_side": _same_side,
    "mined": lambda config: [MinedNegatives(config.mined)],
    "hardness": lambda config: [HardnessWeights()],  # also the weights of mined negatives
    "false_negatives": lambda config: [FalseNegatives(config.false_negatives)] if config.false_negatives else [],
    "duplicates": lambda config: [DuplicatesAsPositives()] if config.duplicates == "positive" else [],
    "margin": lambda config: [] if config.margin is None else [Margin(config.margin)],
    "focal_gamma": lambda config: [] if config.focal_gamma is None else [FocalWeights(config.focal_gamma)],
    "distillation": lambda config: [Distillation(config.distillation)] if config.distillation else [],
    "embedding_distillation": _embedding_distillation,
    "symmetric": lambda config: [Symmetric(config.symmetric)] if config.symmetric else [],
    "matryoshka": lambda config: [Matryoshka(tuple(config.matryoshka))] if config.matryoshka else [],
    "quantized": lambda config: (
        [Quantized(tuple(config.quantized.types), config.quantized.weight)] if config.quantized else []
    ),
}
"""Field of `ObjectiveConfig` -> the terms that it makes. The order is that in which pools are laid and hooks called."""


def terms_of(config: ObjectiveConfig) -> list[Term]:
    """Return the terms that a configuration asks for."""
    return [term for make in TERMS.values() for term in make(config)]
