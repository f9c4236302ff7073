"""Small pictures inside the page, each distinct one stored once."""

from __future__ import annotations

import base64
import hashlib
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipelines.samples import UInt8Array

MAX_HEIGHT_PX = 160
MAX_WIDTH_PX = 3 * MAX_HEIGHT_PX
QUALITY = 80


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """A picture of the page: element id, size in pixels, and its bytes as a `data:` URI."""

    id: str
    width: int
    height: int
    uri: str


class ThumbnailPool:
    """Encodes pictures and gives equal pixels the same `Thumbnail`."""

    def __init__(self) -> None:
        self._by_digest: dict[bytes, Thumbnail] = {}

    def add(self, pixels: UInt8Array) -> Thumbnail:
        """The thumbnail of uint8 RGB `[H, W, 3]`. Raises `ValueError` for any other array."""
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
            raise ValueError(f"a thumbnail is uint8 [H, W, 3], not {pixels.dtype} {list(pixels.shape)}")
        digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()
        if digest not in self._by_digest:
            self._by_digest[digest] = _encode(pixels, id=f"thumbnail-{len(self._by_digest)}")
        return self._by_digest[digest]

    def all(self) -> list[Thumbnail]:
        """Every distinct thumbnail, in order of first use."""
        return list(self._by_digest.values())


def _encode(pixels: UInt8Array, id: str) -> Thumbnail:
    image = Image.fromarray(pixels)
    image.thumbnail((MAX_WIDTH_PX, MAX_HEIGHT_PX), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=QUALITY)
    uri = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Thumbnail(id, image.width, image.height, uri)
