"""Items of a benchmark to pixels, for whatever encodes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipelines.benchmarks.frames import choose_frames
from pipelines.benchmarks.types import FRAMES, Item
from pipelines.config import MediaConfig
from pipelines.errors import BadMedia
from pipelines.media.decode import Decoder
from pipelines.media.documents import extract_page
from pipelines.media.files import read_file
from pipelines.media.images import decode_image
from pipelines.samples import DecodedInput, FileRef, Media, UInt8Array, Visual


class ItemDecoder:
    """Decodes for one worker, in its process but for decord: benchmarks are files that one trusts."""

    def __init__(self, config: MediaConfig) -> None:
        self._config = config
        self._decoder = Decoder(config)

    def side(self, item: Item) -> DecodedInput:
        """Text, pixels and instruction. Raises `BadMedia` that names the file: missing_file, unreadable_file,
        too_many_bytes, unequal_frames, and the reasons of `pipelines.media`.
        """
        visuals = tuple(self._visual(media, item.files[media.member]) for media in item.side.media)
        return DecodedInput(item.side.text, visuals, item.instruction)

    def _visual(self, media: Media, ref: FileRef) -> Visual:
        try:
            if media.member.endswith(f".{FRAMES}"):
                return Visual("video", self._frames(Path(ref.path)))
            data = read_file(ref.path, self._config)
            page = data if ref.page is None else extract_page(data, ref.page, self._config)
            return self._decoder.member(media.kind, page)
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
