"""Vectors as JSON has them: numbers, base64 of float32, or one bit for each value."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from rzen.serving.types import VectorFormat, Vectors


def as_json(vectors_ND: Vectors, form: VectorFormat) -> list[Any]:
    """Return one value for each vector.

    `base64` is that of little-endian float32. `ubinary` packs the bits `value >= 0`, the first in the highest place,
    into numbers of 0 to 255. `binary` has these numbers less 128.
    """
    match form:
        case "float":
            found: list[Any] = vectors_ND.astype(np.float32, copy=False).tolist()
            return found
        case "base64":
            return [base64.b64encode(np.ascontiguousarray(row, dtype="<f4").tobytes()).decode() for row in vectors_ND]
    bits = np.packbits(vectors_ND >= 0, axis=1)
    numbers: list[Any] = (bits if form == "ubinary" else bits.astype(np.int16) - 128).tolist()
    return numbers


def embedding_list(vectors_ND: Vectors, form: VectorFormat, model: str, usage: dict[str, int]) -> dict[str, Any]:
    """Return the body of an answer as OpenAI and Voyage have it."""
    rows = as_json(vectors_ND, form)
    return {
        "object": "list",
        "model": model,
        "data": [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(rows)],
        "usage": usage,
    }


def cut_vectors(vectors_ND: Vectors, dimensions: int | None) -> Vectors:
    """Return the first values of each vector, of length 1 again."""
    if dimensions is None or dimensions == vectors_ND.shape[1]:
        return vectors_ND
    cut = vectors_ND[:, :dimensions]
    lengths_N = np.linalg.norm(cut, axis=1, keepdims=True)
    shorter: Vectors = cut / np.maximum(lengths_N, np.float32(1e-12))
    return shorter
