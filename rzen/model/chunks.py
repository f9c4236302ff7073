"""Gradient caching: embed a batch of any size within the memory of one chunk, with the gradient of the whole batch.

GradCache (Gao et al., arXiv 2101.06983) embeds chunk by chunk and keeps only the vectors. It takes the loss of the
whole batch and its gradient for the vectors. Then it embeds each chunk again, and continues the backward pass.

A torch checkpoint around each chunk does exactly that, in one graph. A parameter gets its gradient once, after the last
chunk, so that data parallelism reduces it once. Dropout is replayed (tests/parity/test_chunks.py).
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
    """Return which inputs are embedded together, the longest first. Similar lengths meet, so that little is padding.

    A chunk has at most `max_tokens` tokens, padding included unless `packed`. A longer input is a chunk of its own.
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
    """Return the share of padding among all tokens that the backbone is given."""
    padded = sum(len(chunk) * int(lengths[chunk].max()) for chunk in chunks)
    return 0.0 if packed else 1 - int(lengths.sum()) / padded


def embed(
    embedder: EmbeddingModel, inputs: Sequence[EncodedBatch], chunks: Sequence[Indices], *, twice: bool
) -> Vectors:
    """Return the vectors of `inputs`, which are batches of one input each, in their order. `twice` is gradient caching.

    An input that is in several chunks has a vector for each, one after the other.
    """
    vectors = []
    for chunk in chunks:
        batch = EncodedBatch.concat([inputs[index] for index in chunk])
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
