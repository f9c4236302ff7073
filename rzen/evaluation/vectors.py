"""The one place that knows what a vector of an input is: fp32 when stored, of one width, finite, of length 1.

The vector store, scoring and search check what they are given with these functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipelines.errors import UserError
from pipelines.items.types import as_ids

FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.int64]
StoredArray = npt.NDArray[np.float32]

NONE = -1
"""The row of a candidate that there is not."""
TIE = 1e-6
"""Cosines closer than this are equal: the rounding of fp32 products must not decide a rank. Our choice."""
COLLAPSE_VARIANCE = 1e-5
"""Total variance of unit vectors below which they are one vector: their mean pairwise cosine exceeds 0.99999."""


@dataclass(frozen=True, slots=True)
class Vectors:
    """Unit vectors `[N, D]` of any float type, memory-mapped if they are many, and their ids `[N]` (as bytes)."""

    ids: npt.NDArray[np.bytes_]
    rows: FloatArray

    @classmethod
    def of(cls, ids: Iterable[str], rows: FloatArray) -> Vectors:
        return cls(as_ids(ids), rows)

    @classmethod
    def join(cls, parts: Sequence[tuple[Iterable[str], FloatArray]]) -> Vectors:
        """Join several shards in memory. Padding must have been cut off: an id that came twice is an error later."""
        ids = np.concatenate([as_ids(ids) for ids, _ in parts])
        return cls(ids, np.concatenate([rows for _, rows in parts]))

    def places(self, wanted: npt.NDArray[np.bytes_], place: str) -> IntArray:
        """Rows of the wanted ids, which must be all that there are, each once. Raises `UserError` otherwise."""
        if len(self.ids) != len(self.rows):
            raise UserError(place, f"{len(self.ids)} ids for {len(self.rows)} vectors", "repair the encoding")
        order = np.argsort(self.ids)
        known = self.ids[order]
        for wrong, problem in (
            (known[1:][known[1:] == known[:-1]], "came twice"),
            (np.setdiff1d(wanted, known), "did not come back"),
            (np.setdiff1d(known, wanted), "was not asked for"),
        ):
            if len(wrong):
                fix = "encode it again, and cut off what pads the shards"
                raise UserError(f"{place} {wrong[0].decode()}", f"{problem} ({len(wrong)} such ids)", fix)
        return order[np.searchsorted(known, wanted)]


def as_stored(rows: npt.ArrayLike) -> StoredArray:
    """Return vectors as the store keeps them: fp32 `[n, D]`, contiguous. Raises `ValueError` for another shape."""
    stored = np.ascontiguousarray(rows, dtype=np.float32)
    if stored.ndim != 2:
        raise ValueError(f"vectors of shape {stored.shape} are not [rows, dimensions]")
    return stored


def check_width(rows: FloatArray, width: int, place: str) -> None:
    """Raise `UserError` unless the vectors `[n, D]` are `width` wide."""
    if rows.shape[1] != width:
        problem = f"has vectors of width {rows.shape[1]}, not {width}"
        raise UserError(place, problem, "embed queries and candidates with one model")


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


def check_block_by_block(
    vectors_ND: FloatArray, place: str, block_rows: int = 8192, *, collapse_is_error: bool = True
) -> bool:
    """Check any number of vectors, memory-mapped for example. Return whether two or more of them are one vector.

    Raises `UserError` as `check_vectors` does, and for such a collapse unless it is no error.
    """
    total_D = np.zeros(vectors_ND.shape[-1])
    square = 0.0
    for first in range(0, max(len(vectors_ND), 1), block_rows):
        block_TD = vectors_ND[first : first + block_rows]
        check_vectors(block_TD, f"{place}[{first}:]" if first else place)
        total_D += block_TD.sum(axis=0, dtype=np.float64)
        square += float(np.einsum("td,td->", block_TD, block_TD, dtype=np.float64))
    mean_D = total_D / len(vectors_ND)
    variance = square / len(vectors_ND) - float(mean_D @ mean_D)
    collapsed = len(vectors_ND) > 1 and variance < COLLAPSE_VARIANCE
    if collapsed and collapse_is_error:
        problem = f"all {len(vectors_ND)} are one vector (variance {variance:.1e})"
        raise UserError(place, problem, "check the model: all inputs look the same to it")
    return collapsed
