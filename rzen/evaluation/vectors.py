"""What ranking takes for granted of vectors, and when two scores are equal."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipelines.errors import UserError

FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.int64]

NONE = -1
"""The row of a candidate that there is not."""
TIE = 1e-6
"""Cosines closer than this are equal: the rounding of fp32 products must not decide a rank. Our choice."""
COLLAPSE_VARIANCE = 1e-5
"""Total variance of unit vectors below which they are one vector: their mean pairwise cosine exceeds 0.99999."""


def check_vectors(vectors_ND: FloatArray, place: str) -> None:
    """Raise `UserError` unless these are finite unit vectors (within 1%, the rounding of bf16)."""
    if vectors_ND.ndim != 2 or len(vectors_ND) == 0:
        raise UserError(place, f"shape {vectors_ND.shape} is not [rows, dimensions]", "give at least one vector")
    lengths_N = np.linalg.norm(vectors_ND.astype(np.float32, copy=False), axis=1)
    for wrong_N, problem in ((~np.isfinite(lengths_N), "is not finite"), (abs(lengths_N - 1) > 0.01, "is not unit")):
        if wrong_N.any():
            row = int(np.argmax(wrong_N))
            raise UserError(
                f"{place}[{row}]", f"{problem} ({wrong_N.sum()} of {len(wrong_N)})", "check the model that made them"
            )


def check_block_by_block(vectors_ND: FloatArray, place: str, block_rows: int = 8192) -> None:
    """The same for any number of them, memory-mapped for example. Also raises for two or more that are one vector."""
    total_D = np.zeros(vectors_ND.shape[-1])
    square = 0.0
    for first in range(0, max(len(vectors_ND), 1), block_rows):
        block_TD = vectors_ND[first : first + block_rows]
        check_vectors(block_TD, f"{place}[{first}:]" if first else place)
        total_D += block_TD.sum(axis=0, dtype=np.float64)
        square += float(np.einsum("td,td->", block_TD, block_TD, dtype=np.float64))
    mean_D = total_D / len(vectors_ND)
    variance = square / len(vectors_ND) - float(mean_D @ mean_D)
    if len(vectors_ND) > 1 and variance < COLLAPSE_VARIANCE:
        problem = f"all {len(vectors_ND)} are one vector (variance {variance:.1e})"
        raise UserError(place, problem, "check the model: it tells nothing apart")
