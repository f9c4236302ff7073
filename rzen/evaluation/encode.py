"""Sides to vectors, for evaluation, embedding and search: no gradients, a batch at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from pipelines.samples import DecodedInput
from rzen.inputs.processor import Processor
from rzen.model.embedding_model import EmbeddingModel


def embed_inputs(
    processor: Processor, embedder: EmbeddingModel, sides: Sequence[DecodedInput], batch_size: int
) -> npt.NDArray[np.float32]:
    """Unit vectors `[len(sides), D]` in the order given; at least one side.

    Raises `BadMedia` for a side that the backbone cannot take.
    """
    encoded = processor.encode(sides)
    with torch.inference_mode():
        parts = [
            embedder(encoded.slice(start, start + batch_size)).cpu().numpy()
            for start in range(0, len(sides), batch_size)
        ]
    return np.concatenate(parts)
