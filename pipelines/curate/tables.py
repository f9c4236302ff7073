"""The features of many inputs as arrays. M inputs have F frames of media in all.

Large columns are in memory-mapped files (`columns.py`), so that a table of millions of inputs needs little memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.curate.columns import Column, ListColumn, TextColumns
from pipelines.curate.hamming import Hashes, Ints
from pipelines.curate.pictures import GRID_BYTES, Grids
from pipelines.curate.texts import NUM_PERMUTATIONS, MinHashes

Bools = npt.NDArray[np.bool_]
_KINDS_TYPE = "S16"  # letters of as many media


@dataclass(frozen=True, slots=True)
class MediaTable:
    """The media of M inputs. Frames of input m are at `bounds[m]:bounds[m + 1]`."""

    kinds: npt.NDArray[np.bytes_]
    """`[M]`, a letter for each medium."""
    content: Hashes
    """`[M]`, hash of the bytes of all media. 0 without media, or for media that are parts of files."""
    width: Ints
    height: Ints
    bounds: Ints
    """`[M + 1]`."""
    hashes: Hashes
    """`[F]`, dHash of each frame."""
    grids: Grids
    """`[F, 768]`, colors of each frame."""
    reasons: dict[int, str]
    """Input -> why its media cannot be decoded."""

    @classmethod
    def of(cls, tables: Iterable[pa.Table]) -> MediaTable:
        """Return the features of several files together. Each is read when the one before has been taken in."""
        columns = {name: Column() for name in ("kinds", "content", "width", "height", "grids")}
        frames, reasons, num_inputs = ListColumn(), dict[int, str](), 0
        for table in tables:
            kinds = table["kinds"].to_pylist()
            columns["kinds"].append(np.array(kinds, _KINDS_TYPE))
            columns["content"].append(table["content"].to_numpy())
            columns["width"].append(table["width"].to_numpy().astype(np.int64))
            columns["height"].append(table["height"].to_numpy().astype(np.int64))
            columns["grids"].append(_bytes_of(table["grids"]))
            frames.append(*_lists_of(table["hashes"]))
            texts = enumerate(table["reason"].to_pylist(), start=num_inputs)
            reasons |= {place: reason for place, reason in texts if reason}
            num_inputs += len(table)
        bounds, hashes = frames.arrays(np.uint64)
        return cls(
            kinds=columns["kinds"].array(_KINDS_TYPE),
            content=columns["content"].array(np.uint64),
            width=columns["width"].array(np.int64),
            height=columns["height"].array(np.int64),
            bounds=bounds,
            hashes=hashes,
            grids=columns["grids"].array(np.uint8).reshape(-1, GRID_BYTES),
            reasons=reasons,
        )

    @classmethod
    def unknown(cls, num_inputs: int) -> MediaTable:
        """Return a table of inputs whose media were not looked at."""
        zeros, hashes = np.zeros(num_inputs, np.int64), np.zeros(0, np.uint64)
        grids = np.zeros((0, GRID_BYTES), np.uint8)
        bounds = np.zeros(num_inputs + 1, np.int64)
        content = np.zeros(num_inputs, np.uint64)
        return cls(np.zeros(num_inputs, _KINDS_TYPE), content, zeros, zeros, bounds, hashes, grids, {})

    @property
    def num_frames(self) -> Ints:
        """Return the frames of each input, `[M]`."""
        return np.diff(self.bounds)

    @property
    def middle(self) -> Hashes:
        """Return the hash of the middle frame of each input that has one, `[M]`. Others have 0."""
        found = np.zeros(len(self.kinds), np.uint64)
        has = self.num_frames > 0
        found[has] = self.hashes[(self.bounds[:-1] + self.num_frames // 2)[has]]
        return found


@dataclass(frozen=True, slots=True)
class TextTable:
    """The texts of M inputs. N-grams of input m are at `bounds[m]:bounds[m + 1]`."""

    keys: pa.ChunkedArray
    content: npt.NDArray[np.bytes_]
    """`[M]`, 16 bytes that identify text and media. Zeros for a sample that cannot be read."""
    graded: Bools
    num_media: Ints
    texts: pa.ChunkedArray
    """`[M]`, normalized."""
    num_chars: Ints
    min_hash: MinHashes
    """`[M, 120]`."""
    bounds: Ints
    ngrams: Hashes
    languages: pa.ChunkedArray
    confidence: npt.NDArray[np.float32]

    @classmethod
    def of(cls, tables: Iterable[pa.Table]) -> TextTable:
        """Return the features of several files together. Each is read when the one before has been taken in."""
        columns = {name: Column() for name in ("content", "graded", "num_media", "num_chars", "min_hash", "confidence")}
        ngrams, texts = ListColumn(), TextColumns("key", "text", "language")
        for table in tables:
            columns["content"].append(_bytes_of(table["content"]))
            columns["graded"].append(table["graded"].to_numpy(zero_copy_only=False))
            columns["num_media"].append(table["num_media"].to_numpy().astype(np.int64))
            columns["num_chars"].append(table["num_chars"].to_numpy().astype(np.int64))
            columns["min_hash"].append(_bytes_of(table["min_hash"]))
            columns["confidence"].append(table["confidence"].to_numpy())
            ngrams.append(*_lists_of(table["ngrams"]))
            texts.append(table)
        keys, shown, languages = texts.arrays()
        bounds, values = ngrams.arrays(np.uint64)
        return cls(
            keys=keys,
            content=columns["content"].array("S16"),
            graded=columns["graded"].array(np.bool_),
            num_media=columns["num_media"].array(np.int64),
            texts=shown,
            num_chars=columns["num_chars"].array(np.int64),
            min_hash=columns["min_hash"].array(np.uint32).reshape(-1, NUM_PERMUTATIONS),
            bounds=bounds,
            ngrams=values,
            languages=languages,
            confidence=columns["confidence"].array(np.float32),
        )


def _lists_of(column: pa.ChunkedArray) -> tuple[Ints, npt.NDArray[Any]]:
    """Return the length of each list, and the values of all."""
    lists = column.combine_chunks()
    return np.diff(lists.offsets.to_numpy().astype(np.int64)), lists.flatten().to_numpy()


def _bytes_of(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """Return the bytes of all values, one after the other, uint8."""
    array = column.combine_chunks()
    data = array.buffers()[-1]
    if data is None or not len(array):
        return np.zeros(0, np.uint8)
    if pa.types.is_fixed_size_binary(array.type):
        width = array.type.byte_width
        return np.frombuffer(data, np.uint8)[array.offset * width : (array.offset + len(array)) * width]
    ends = np.frombuffer(array.buffers()[1], np.int32)[array.offset : array.offset + len(array) + 1]
    return np.frombuffer(data, np.uint8)[int(ends[0]) : int(ends[-1])]
