"""What a step of a re-ranker does: score each query with its candidates, part after part, without gradient caching.

The loss is a sum over pairs (`bce`) or lists (`listwise`). So each part has its own backward pass, and its activations
are gone before the next part. A tower that is not trained reads each medium of a batch once.

Shapes: B queries, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rzen.config import RerankObjectiveConfig
from rzen.families import part_of
from rzen.inputs.processor import EncodedBatch
from rzen.model.activations import ChunkInputs
from rzen.model.chunks import Indices, chunks_of, padding_fraction
from rzen.reranking.encoder import JointBatch, MediumKey
from rzen.reranking.lists import CrossedGroups, RerankBatch
from rzen.reranking.loss import listwise_loss, pair_weights, pointwise_loss
from rzen.reranking.model import MediumFeatures, ScoringModel
from rzen.training import rerank_held_out
from rzen.training.example import example_batch
from rzen.training.held_out import CHUNK_TOKENS, HeldOutShare
from rzen.training.held_out_scores import SourceScore
from rzen.training.learner import Blocks, Learner
from rzen.training.lockstep import align_chunk_counts, dummy_input

_BLANK = b"blank"
"""Start of the keys of media that have no content."""


@dataclass(frozen=True)
class RerankPart:
    """Pairs that are read together, and what their loss needs to know of the batch."""

    pairs: Indices
    """[p], their numbers in the batch."""
    joint: JointBatch
    """The same, and behind them the blanks of ZeRO stage 3, which have no loss."""
    is_positive: Tensor
    """[p], bool."""
    weights: Tensor
    """[p], fp32: share of each pair in the loss of the batch."""
    counts: tuple[int, ...]
    """Pairs of each list, where lists are whole."""
    num_queries: int
    """Queries of the batch."""
    features: dict[MediumKey, MediumFeatures]
    """What the tower made of media for earlier parts, if it is not trained. All parts of a batch have the same."""
    needed_later: frozenset[MediumKey]
    """Media that later parts show."""


class RerankLearner(Learner):
    """A re-ranker and its loss.

    Gradients are those of transformers' whole model, for any parts and any number of ranks
    (tests/parity/test_rerank_training.py).
    """

    makes = "score"

    def __init__(
        self,
        scorer: ScoringModel,
        config: RerankObjectiveConfig,
        chunk_tokens: int | None = None,
        *,
        lockstep: bool = False,
    ) -> None:
        super().__init__(chunk_tokens, [dummy_input(scorer.backbone)] if lockstep else [])
        self.scorer = scorer
        self.config = config
        self.objective = None
        tower = part_of(scorer.backbone, "visual")
        # In ZeRO stage 3, all ranks must call the tower equally often, whatever they have read before.
        self.reads_media_once = not lockstep and not any(weight.requires_grad for weight in tower.parameters())

    @property
    def model(self) -> ScoringModel:
        """The scoring model."""
        return self.scorer

    def parts(self, batch: RerankBatch) -> Iterator[RerankPart]:
        """Yield pairs that are read together. Lists stay whole where the loss needs them, or where they fit."""
        device = self.scorer.image_mean.device
        is_positive_P = torch.tensor(batch.is_positive)
        weights_P = pair_weights(torch.tensor(batch.counts), is_positive_P, self.config.positive_weight)
        chunks = self._chunks(batch)
        last = {key: number for number, pairs in enumerate(chunks) for key in batch.joint.shown_by(pairs)}
        features: dict[MediumKey, MediumFeatures] = {}
        for number, pairs in enumerate(chunks):
            # A part of whole lists has each of them from its positive on.
            starts = np.flatnonzero(batch.is_positive[pairs])
            yield RerankPart(
                pairs,
                self._with_blanks(batch.joint, pairs),
                is_positive_P[pairs].to(device),
                weights_P[pairs].to(device),
                tuple(np.diff([*starts, len(pairs)]).tolist()) if self.config.loss == "listwise" else (),
                len(batch),
                features,
                frozenset(key for key, part in last.items() if part > number),
            )

    def forward(self, part: RerankPart, blocks: Blocks, step: int) -> tuple[Tensor, tuple[Indices, Tensor]]:
        """Return the part's share of the mean loss of the own queries, and its pairs with their z, detached.

        Nothing is sent between ranks.
        """
        z_P = self._score(part)[: len(part.weights)]
        loss = loss_of(self.config, z_P, part.is_positive, part.weights, part.counts, part.num_queries)
        return self._with_zero_grads(loss), (part.pairs, z_P.detach())

    def _score(self, part: RerankPart) -> Tensor:
        if not self.reads_media_once:
            return self.scorer.score(part.joint)
        new = {key: medium for key, medium in part.joint.media.items() if key not in part.features}
        with torch.no_grad():  # gradient checkpointing of adapters would give the tower a graph, for one part only
            part.features.update(zip(new, self.scorer.features(list(new.values())), strict=True))
        z_P: Tensor = self.scorer(part.joint.sequences, [part.features[key] for key in part.joint.shown])
        for key in part.features.keys() - part.needed_later:
            del part.features[key]
        return z_P

    def statistics(self, batch: RerankBatch, outputs: Sequence[tuple[Indices, Tensor]]) -> dict[str, Tensor]:
        """Return loss, accuracy, mean probabilities of yes, and counts of tokens."""
        chunks = [pairs for pairs, _ in outputs]
        order = torch.from_numpy(np.argsort(np.concatenate(chunks)))
        z_P = torch.cat([z for _, z in outputs]).cpu()[order]
        is_positive_P = torch.tensor(batch.is_positive)
        counts = batch.counts.tolist()
        weights_P = pair_weights(torch.tensor(batch.counts), is_positive_P, self.config.positive_weight)
        loss = loss_of(self.config, z_P, is_positive_P, weights_P, counts, len(batch))
        of_queries = torch.split(z_P, counts)
        wins_B = [bool((z[0] > z[1:]).all()) for z in of_queries]
        probability_P = z_P.sigmoid()
        negatives = probability_P[~is_positive_P]
        lengths = batch.joint.sequences.lengths
        filled = [chunk for chunk in chunks if len(chunk)]
        padding = padding_fraction(lengths, filled, packed=self.scorer.packs)
        return {
            "loss": loss,
            "accuracy": torch.tensor(float(np.mean(wins_B))),
            "positive_probability": probability_P[is_positive_P].mean(),
            "negative_probability": negatives.mean() if len(negatives) else torch.tensor(0.0),
            "tokens": torch.tensor(lengths.sum()),
            "padding_fraction": torch.tensor(padding),
        }

    def score(self, shares: Mapping[str, HeldOutShare]) -> dict[str, SourceScore]:
        """Rank the targets of small groups for each of their queries (`rzen.training.rerank_held_out`)."""
        return rerank_held_out.score(self._held_out_log_odds, shares)

    @torch.no_grad()
    def _held_out_log_odds(self, groups: CrossedGroups | None) -> npt.NDArray[np.float32]:
        if groups is None:
            return self.log_odds(None, []).numpy()
        lengths = groups.joint.sequences.lengths
        chunks = chunks_of(lengths, self.chunk_tokens or CHUNK_TOKENS, packed=self.scorer.packs)
        return self.log_odds(groups.joint, chunks).numpy()

    def log_odds(self, joint: JointBatch | None, chunks: Sequence[Indices]) -> Tensor:
        """Return z of all pairs in their order, fp32 on the CPU. None: there are none on this rank.

        A collective where there are `blanks`.
        """
        z_P = torch.empty(0 if joint is None else len(joint))
        for chunk in self._aligned(chunks):
            z_P[chunk] = self.scorer.score(self._with_blanks(joint, chunk))[: len(chunk)].cpu()
        return z_P

    def not_finite(self, batch: RerankBatch) -> list[str]:
        """Return the keys of the samples with a pair whose score is not finite."""
        ends = np.cumsum(batch.counts)
        broken = []
        for key, start, end in zip(batch.keys, ends - batch.counts, ends, strict=True):
            z = [self.scorer.score(self._with_blanks(batch.joint, np.array([pair])))[0] for pair in range(start, end)]
            if not torch.stack(z).isfinite().all():
                broken.append(key)
        return broken

    def example(self, inputs: ChunkInputs) -> Tensor:
        """Return z of pairs without content, each with a medium of its own."""
        backbone: Any = self.scorer.backbone
        return self.scorer.score(_as_pairs(example_batch(backbone.config, inputs)))

    def _chunks(self, batch: RerankBatch) -> list[Indices]:
        """Return which pairs are read together, in order. All at once where `chunk_tokens` is None."""
        lengths = batch.joint.sequences.lengths
        chunks = [np.arange(len(lengths))]
        if self.chunk_tokens is not None:
            whole = self.config.loss == "listwise"
            chunks = list_chunks(lengths, batch.counts, self.chunk_tokens, packed=self.scorer.packs, whole=whole)
        return self._aligned(chunks)

    def _aligned(self, chunks: Sequence[Indices]) -> list[Indices]:
        """Return equally many chunks on every rank in ZeRO stage 3, with empty ones at the end."""
        if not self.blanks:
            return list(chunks)
        none = -1  # the blank is no pair of the batch
        return [chunk[chunk != none] for chunk in align_chunk_counts(chunks, none, self.scorer.image_mean.device)]

    def _with_blanks(self, joint: JointBatch | None, pairs: Indices) -> JointBatch:
        some = [joint.take(pairs)] if joint is not None and len(pairs) else []
        return JointBatch.concat([*some, *(_as_pairs(blank) for blank in self.blanks)])


def loss_of(
    config: RerankObjectiveConfig,
    z_P: Tensor,
    is_positive_P: Tensor,
    weights_P: Tensor,
    counts: Sequence[int],
    num_queries: int,
) -> Tensor:
    """Return the share of these pairs in the mean loss of `num_queries` queries, 0-dim fp32.

    `weights_P` are those of `pair_weights`, for `bce`. `counts` are the pairs of each list, for `listwise`.
    """
    if config.loss == "bce":
        return pointwise_loss(z_P, is_positive_P, weights_P)
    return listwise_loss(z_P, counts, config.list_temperature) / num_queries


def list_chunks(
    lengths: npt.NDArray[np.int32], counts: Indices, max_tokens: int, *, packed: bool, whole: bool
) -> list[Indices]:
    """Return which pairs are read together: at most `max_tokens` tokens, padding included unless `packed`.

    Pairs of a list lie one after the other, `counts` of each. They share the media of their query, so that they stay
    together where they fit. The longest lists come first. A longer pair is a chunk of its own. With `whole`, a list is
    never divided, however long it is.
    """
    ends = np.cumsum(counts)
    units = [np.arange(start, end) for start, end in zip(ends - counts, ends, strict=True)]
    if not whole:
        units = [run for unit in units for run in _runs(unit, lengths, max_tokens, packed)]
    units.sort(key=lambda unit: -int(lengths[unit].max()))  # stable: equal lengths stay in their order
    chunks: list[list[Indices]] = []
    for unit in units:
        together = np.concatenate([*chunks[-1], unit]) if chunks else unit
        if chunks and _cost(lengths[together], packed) <= max_tokens:
            chunks[-1].append(unit)
        else:
            chunks.append([unit])
    return [np.concatenate(chunk) for chunk in chunks]


def _runs(unit: Indices, lengths: npt.NDArray[np.int32], max_tokens: int, packed: bool) -> Iterator[Indices]:
    """Yield a list in pieces that fit, one pair at least."""
    start = 0
    for end in range(1, len(unit) + 1):
        if end - start > 1 and _cost(lengths[unit[start:end]], packed) > max_tokens:
            yield unit[start : end - 1]
            start = end - 1
    yield unit[start:]


def _cost(lengths: npt.NDArray[np.int32], packed: bool) -> int:
    return int(lengths.sum()) if packed else len(lengths) * int(lengths.max())


def _as_pairs(inputs: EncodedBatch) -> JointBatch:
    """Return inputs with visuals as pairs that show the same. Each visual is a medium of its own."""
    media = {_BLANK + number.to_bytes(4): visual for number, visual in enumerate(inputs.visuals())}
    return JointBatch(inputs.without_patches(), tuple(media), media)
