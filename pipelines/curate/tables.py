"""The features of many inputs as arrays. M inputs have F frames of media in all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

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
        """Return the features of several files together."""
        table = _joined(tables)
        if table is None:
            return cls.unknown(0)
        hashes_list = table["hashes"].combine_chunks()
        return cls(
            kinds=np.array(table["kinds"].to_pylist(), _KINDS_TYPE),
            content=table["content"].to_numpy(),
            width=table["width"].to_numpy().astype(np.int64),
            height=table["height"].to_numpy().astype(np.int64),
            bounds=hashes_list.offsets.to_numpy().astype(np.int64),
            hashes=hashes_list.flatten().to_numpy(),
            grids=_bytes_of(table["grids"]).reshape(-1, GRID_BYTES),
            reasons={place: reason for place, reason in enumerate(table["reason"].to_pylist()) if reason},
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
        """Return the features of several files together."""
        table = _joined(tables)
        assert table is not None, "an empty split has no rules"
        ngrams = table["ngrams"].combine_chunks()
        return cls(
            keys=table["key"],
            content=_bytes_of(table["content"]).view("S16"),
            graded=table["graded"].to_numpy(zero_copy_only=False),
            num_media=table["num_media"].to_numpy().astype(np.int64),
            texts=table["text"],
            num_chars=table["num_chars"].to_numpy().astype(np.int64),
            min_hash=_bytes_of(table["min_hash"]).view(np.uint32).reshape(-1, NUM_PERMUTATIONS),
            bounds=ngrams.offsets.to_numpy().astype(np.int64),
            ngrams=ngrams.flatten().to_numpy(),
            languages=table["language"],
            confidence=table["confidence"].to_numpy(),
        )


def _joined(tables: Iterable[pa.Table]) -> pa.Table | None:
    some = list(tables)
    if not some:
        return None
    # Lists and bytes of many files together may pass 2 GB, which the small types cannot address.
    wide = pa.schema([field.with_type(_WIDE.get(field.type, field.type)) for field in some[0].schema])
    return pa.concat_tables(table.cast(wide) for table in some).combine_chunks()


_WIDE = {
    pa.string(): pa.large_string(),
    pa.binary(): pa.large_binary(),
    pa.list_(pa.uint64()): pa.large_list(pa.uint64()),
}


def _bytes_of(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """Return the bytes of all values, one after the other, uint8."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = array.chunk(0) if array.num_chunks else pa.array([], column.type)
    data = array.buffers()[-1]
    if data is None:
        return np.zeros(0, np.uint8)
    if pa.types.is_fixed_size_binary(array.type):
        width = array.type.byte_width
        return np.frombuffer(data, np.uint8)[array.offset * width : (array.offset + len(array)) * width]
    offsets = array[0:].buffers()[1]
    ends = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
    return np.frombuffer(data, np.uint8)[int(ends[0]) : int(ends[-1])]
