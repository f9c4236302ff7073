"""Gradient caching: vectors of a batch of any size within the memory of one chunk, with the gradient of the whole.

GradCache (Gao et al., arXiv 2101.06983): embed chunk by chunk and keep the vectors alone; take the loss of the whole
batch and its gradient for the vectors; embed each chunk again and go on from there. A checkpoint of torch around each
chunk does exactly that, in one graph: a parameter gets its gradient once, after the last chunk, so that data
parallelism reduces it once. Dropout is replayed (tests/parity/test_chunks.py).

Shapes: B sides, D width of the vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rzen.inputs.processor import EncodedBatch
from rzen.model.embedding_model import EmbeddingModel
from rzen.vectors import Vectors, concat, take

Indices = npt.NDArray[np.int64]


def chunks_of(lengths: npt.NDArray[np.int32], max_tokens: int, *, packed: bool) -> list[Indices]:
    """Which sides are embedded together, the longest first: neighbors in length, so that little is padding.

    A chunk has at most `max_tokens` tokens, padding included unless `packed`; a longer side is a chunk of its own.
    """
    order = np.argsort(-lengths, kind="stable")
    chunks = []
    start = 0
    while start < len(order):
        rest = lengths[order[start:]]
        costs = np.cumsum(rest) if packed else np.arange(1, len(rest) + 1) * rest[0]
        size = max(1, int(np.searchsorted(costs, max_tokens, side="right")))
        chunks.append(order[start : start + size])
        start += size
    return chunks


def padding_fraction(lengths: npt.NDArray[np.int32], chunks: Sequence[Indices], *, packed: bool) -> float:
    """Padding among all tokens that the backbone is given."""
    padded = sum(len(chunk) * int(lengths[chunk].max()) for chunk in chunks)
    return 0.0 if packed else 1 - int(lengths.sum()) / padded


def embed(
    embedder: EmbeddingModel, sides: Sequence[EncodedBatch], chunks: Sequence[Indices], *, twice: bool
) -> Vectors:
    """Vectors `[B, D]` of B batches of one side each, in their order; `twice` is gradient caching.

    A side that is in several chunks has a vector of each, one after the other.
    """
    vectors = []
    for chunk in chunks:
        batch = EncodedBatch.concat([sides[side] for side in chunk])
        if twice and torch.is_grad_enabled():
            # A tensor among the arguments tells torch on which device random numbers have to be replayed.
            again = partial(_embed, embedder, batch)
            vectors.append(checkpoint(again, embedder.image_mean, use_reentrant=False))
        else:
            vectors.append(embedder(batch))
    return take(concat(vectors), torch.from_numpy(np.argsort(np.concatenate(chunks))))


def _embed(embedder: EmbeddingModel, batch: EncodedBatch, _: Tensor) -> Vectors:
    vectors: Vectors = embedder(batch)
    return vectors
