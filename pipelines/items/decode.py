"""Items to pixels, for the tasks that decode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np

from pipelines.config import DataConfig, MediaConfig
from pipelines.errors import BadMedia, UserError
from pipelines.feed.reader import Reader
from pipelines.items.frames import choose_frames
from pipelines.items.types import FRAMES, Item
from pipelines.media.decode import Decoder
from pipelines.media.files import read_file
from pipelines.media.images import decode_image
from pipelines.samples import DecodedInput, FileRef, Media, Rejected, UInt8Array, Visual


class ItemDecoder:
    """Decodes the items of one process. `data` says where the shards are, for items that are rows of them.

    `fingerprints` has the manifest's of each split, by which the items were listed: rows of another one are others.

    Videos and documents are decoded in a sandbox, unless they are rows of a dataset with `data.trusted`.
    """

    def __init__(
        self, config: MediaConfig, data: DataConfig | None = None, fingerprints: Mapping[str, str] | None = None
    ) -> None:
        self._config = config
        self._fingerprints = fingerprints or {}
        self._decoder = Decoder(config)
        self._data = data
        self._readers: dict[str, Reader] = {}

    def inputs(self, items: Sequence[Item]) -> Iterator[DecodedInput | Rejected]:
        """Yield the input of each item in order, or why it cannot be decoded.

        Adjacent rows of a shard that follow each other in `items` cost one request.
        """
        for place, group in groupby(items, key=_place):
            members = list(group)
            if place is None:
                yield from map(self._one, members)
            else:
                yield from self._rows(*place, members)

    def input(self, item: Item) -> DecodedInput:
        """Text, pixels and instruction of one item.

        Raises `BadMedia` that names the file: missing_file, unreadable_file, too_many_bytes, unequal_frames, and the
        reasons of `pipelines.media`.
        """
        if item.row is None or not item.input.media:
            return self._from_files(item)
        (found,) = self._rows(item.row.split, item.row.source, [item])
        if isinstance(found, Rejected):
            raise BadMedia(found.reason, f"{found.origin}: {found.detail}".removesuffix(": "))
        return found

    def _one(self, item: Item) -> DecodedInput | Rejected:
        try:
            return self._from_files(item)
        except BadMedia as error:
            return Rejected(item.name, error.reason, error.detail)

    def _from_files(self, item: Item) -> DecodedInput:
        visuals = tuple(self._visual(media, item.files[media.member]) for media in item.input.media)
        return DecodedInput(item.input.text, visuals, item.instruction)

    def _rows(self, split: str, source: str, items: list[Item]) -> Iterator[DecodedInput | Rejected]:
        assert self._data is not None, "items that are rows need the dataset"
        if split not in self._readers:
            data = self._data.model_copy(update={"split": split, "media": self._config})
            reader = Reader(data)
            if self._fingerprints.get(split, reader.fingerprint) != reader.fingerprint:
                raise UserError(f"{data.root} {split}", "was replaced while it was read", "run the job again")
            self._readers[split] = reader
        for index, group in groupby(items, key=_divided_row):
            members = list(group)
            for item, found in zip(members, self._read(self._readers[split], source, index, members), strict=True):
                yield found if isinstance(found, Rejected) else replace(found, instruction=item.instruction)

    def _read(
        self, reader: Reader, source: str, index: int | None, items: list[Item]
    ) -> Iterator[DecodedInput | Rejected]:
        """Yield rows of a source, or the segments of the video in row `index`."""
        if index is None:
            return reader.inputs(source, [(item.row.index, item.row.role) for item in items if item.row is not None])
        return reader.segments(source, index, [item.segment for item in items if item.segment is not None])

    def _visual(self, media: Media, ref: FileRef) -> Visual:
        try:
            if media.member.endswith(f".{FRAMES}"):
                return Visual("video", self._frames(Path(ref.path)))
            data = read_file(ref.path, self._config)
            return self._decoder.member(media.kind, data, ref.page)
        except BadMedia as error:
            raise BadMedia(error.reason, f"{ref.path}: {error.detail}".removesuffix(": ")) from error

    def _frames(self, folder: Path) -> UInt8Array:
        """`[T, H, W, 3]` of a folder of pictures, `MediaConfig.frames` of them."""
        paths = choose_frames(folder, self._config.frames)
        data = [read_file(str(path), self._config) for path in paths]
        frames = [decode_image(some, self._config, self._config.image_pixels) for some in data]
        if len({frame.shape for frame in frames}) != 1:
            shapes = {f"{frame.shape[1]} x {frame.shape[0]}" for frame in frames}
            raise BadMedia("unequal_frames", f"frames of {', '.join(sorted(shapes)) or 'no picture'}")
        return np.stack(frames)


def _divided_row(item: Item) -> int | None:
    """Return the row of a video of which the item is a segment."""
    return item.row.index if item.row is not None and item.segment is not None else None


def _place(item: Item) -> tuple[str, str] | None:
    """Split and source of an item whose bytes are in a shard; a text is complete without them."""
    return None if item.row is None or not item.input.media else (item.row.split, item.row.source)
