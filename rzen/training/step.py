"""What a step of an embedder does: embed queries and targets, and contrast them across ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rzen.inputs.pairs import EncodedPairs
from rzen.inputs.processor import EncodedBatch
from rzen.model.activations import ChunkInputs
from rzen.model.chunks import Indices, chunks_of, embed, padding_fraction
from rzen.model.embedding_model import EmbeddingModel
from rzen.objective.loss import Objective
from rzen.training import embedding_held_out
from rzen.training.contrasted import OwnVectors, contrasted_batches
from rzen.training.example import example_batch
from rzen.training.held_out import CHUNK_TOKENS, HeldOutShare
from rzen.training.held_out_scores import SourceScore
from rzen.training.learner import Blocks, Learner
from rzen.training.lockstep import align_chunk_counts, dummy_input
from rzen.vectors import Vectors


class EmbeddingLearner(Learner):
    """An embedder and its objective.

    W ranks equal one process in the gradients of parameters and temperatures (tests/parity/test_training_step.py).
    """

    objective: Objective

    def __init__(
        self, embedder: EmbeddingModel, objective: Objective, chunk_tokens: int | None = None, *, lockstep: bool = False
    ) -> None:
        backbone: Any = embedder.backbone
        super().__init__(chunk_tokens, [dummy_input(backbone)] if lockstep else [])
        self.embedder = embedder
        self.objective = objective
        objective.widths(backbone.config.get_text_config().hidden_size)  # refuses a wider one before the first batch

    @property
    def model(self) -> EmbeddingModel:
        """The embedder."""
        return self.embedder

    def parts(self, batch: EncodedPairs) -> Iterator[EncodedPairs]:
        """Yield the batch: every pair is contrasted with all others."""
        yield batch

    def forward(self, pairs: EncodedPairs, blocks: Blocks, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss of the own queries, 0-dim fp32, and the objective's detached statistics.

        `blocks` are (task, own pairs) in the order of the pairs. The pairs of a block are contrasted with each other
        only, across ranks. A collective: every rank must bring the same blocks.
        """
        own, counts = self._vectors(pairs)
        losses: list[Tensor] = []
        stats: list[dict[str, Tensor]] = []
        objective = self.objective
        batches = contrasted_batches(
            own, pairs, blocks, needs_queries=objective.needs_queries, shares_mined=objective.shares_mined
        )
        for batch in batches:
            loss, block_stats = objective(batch, step)
            losses.append(loss)
            stats.append(block_stats)
        shares = torch.tensor([size for _, size in blocks], device=own.targets.device) / len(pairs)
        means = {name: _mean([some[name] for some in stats], shares) for name in stats[0]}
        return self._with_zero_grads(_mean(losses, shares)), means | counts

    def embed(self, inputs: Sequence[EncodedBatch], chunks: Sequence[Indices]) -> Vectors:
        """Return the vectors of `inputs`, which are batches of one input each, in their order.

        A collective where there are `blanks`: all ranks then embed equally many chunks.
        """
        called = align_chunk_counts(chunks, len(inputs), self.embedder.image_mean.device) if self.blanks else chunks
        twice = self.chunk_tokens is not None and len(called) > 1
        return embed(self.embedder, [*inputs, *self.blanks], called, twice=twice)[: len(inputs)]

    def statistics(self, batch: EncodedPairs, outputs: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Return the statistics of the only part."""
        (stats,) = outputs
        return stats

    def score(self, shares: Mapping[str, HeldOutShare]) -> dict[str, SourceScore]:
        """Search the queries of each source among its targets (`rzen.training.embedding_held_out`)."""
        return embedding_held_out.score(self._held_out_vectors, shares, device=str(self.embedder.image_mean.device))

    @torch.no_grad()
    def _held_out_vectors(self, batches: Sequence[EncodedBatch]) -> npt.NDArray[np.float32]:
        if not batches and not self.blanks:
            return np.zeros((0, 0), np.float32)
        lengths = np.concatenate([np.zeros(0, np.int32), *(batch.lengths for batch in batches)])
        inputs = [single for batch in batches for single in batch.split()]
        chunks = chunks_of(lengths, self.chunk_tokens or CHUNK_TOKENS, packed=self.embedder.packs)
        vectors: npt.NDArray[np.float32] = self.embed(inputs, chunks).float().cpu().numpy()
        return vectors

    def not_finite(self, batch: EncodedPairs) -> list[str]:
        """Return the keys of the pairs that have a vector which is not finite."""
        broken = []
        for key, inputs in zip(batch.keys, _inputs(batch), strict=True):
            # Blanks are embedded too, because ZeRO stage 3 needs them, and then left out.
            vectors = self.embedder(EncodedBatch.concat([*inputs, *self.blanks]))[: len(inputs)]
            if not vectors.isfinite().all():
                broken.append(key)
        return broken

    def example(self, inputs: ChunkInputs) -> Vectors:
        """Return the vectors of a chunk of empty inputs."""
        backbone: Any = self.embedder.backbone
        vectors: Vectors = self.embedder(example_batch(backbone.config, inputs))
        return vectors

    def _vectors(self, pairs: EncodedPairs) -> tuple[OwnVectors, dict[str, Tensor]]:
        """Return the vectors of queries, targets and mined negatives, and counts of tokens.

        All at once where `chunk_tokens` is None, but one role after the other: roles differ in length more than inputs
        of one role do. With chunks, all roles are mixed.
        """
        roles = [role for role in (pairs.queries, pairs.targets, pairs.negatives) if role is not None]
        sizes = [len(role) for role in roles]
        lengths = np.concatenate([role.lengths for role in roles])
        if self.chunk_tokens is None:
            chunks = np.split(np.arange(len(lengths)), np.cumsum(sizes)[:-1])
        else:
            chunks = chunks_of(lengths, self.chunk_tokens, packed=self.embedder.packs)
        vectors = self.embed([single for role in roles for single in role.split()], chunks)
        padding = padding_fraction(lengths, chunks, packed=self.embedder.packs)
        counts = {
            "tokens": torch.tensor(lengths.sum()),
            "padding_fraction": torch.tensor(padding),
            "no_teacher_fraction": torch.tensor(pairs.num_without_teacher / len(pairs)),
        }
        queries, targets, *mined = torch.split(vectors, sizes)
        return OwnVectors(queries, targets, mined[0] if mined else None), counts


def _inputs(pairs: EncodedPairs) -> Iterator[list[EncodedBatch]]:
    """Yield query, target and mined negatives of each pair."""
    start = 0
    for index, count in enumerate(pairs.negative_counts.tolist()):
        inputs = [role.slice(index, index + 1) for role in (pairs.queries, pairs.targets)]
        if pairs.negatives is not None:
            inputs.append(pairs.negatives.slice(start, start + count))
        start += count
        yield inputs


def _mean(values: Sequence[Tensor], shares: Tensor) -> Tensor:
    return values[0] if len(values) == 1 else (torch.stack(list(values)) * shares).sum()
