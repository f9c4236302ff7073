"""What is compared of media: a hash of 64 bits, a grid of colors, and the size of the file's picture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipelines.imports import import_extra
from pipelines.media.images import open_image
from pipelines.samples import MediaKind, UInt8Array

GRID = 16
GRID_BYTES = GRID * GRID * 3
_LARGEST_PX = 512  # larger pictures are first shrunk by whole factors, which is cheaper
_BITS = np.uint64(1) << np.arange(64, dtype=np.uint64)

Grids = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Picture:
    """One frame: `hash` is its dHash, `grid` are its mean colors in 16 x 16 cells, uint8 RGB `[16, 16, 3]`."""

    hash: int
    grid: UInt8Array


def picture_of(frame_HWC: UInt8Array) -> Picture:
    """Return what is compared of a frame, uint8 RGB `[H, W, 3]`."""
    imagehash = import_extra("imagehash", "curation", "curate")
    image = Image.fromarray(frame_HWC)
    if (factor := max(image.size) // _LARGEST_PX) > 1:
        image = image.reduce(factor)
    bits = imagehash.dhash(image.convert("L")).hash.ravel()
    grid = np.asarray(image.resize((GRID, GRID), Image.Resampling.BOX))
    return Picture(int(_BITS[bits].sum()), grid)


def stored_size(kind: MediaKind, data: bytes, frames_THWC: UInt8Array) -> tuple[int, int]:
    """Return width and height of a medium as it is stored, in pixels. Pages have no pixels, and their shape counts."""
    if kind == "image":
        with open_image(data) as image:
            return image.size
    return frames_THWC.shape[2], frames_THWC.shape[1]


def grid_distances(one_PTC: Grids, other_PTC: Grids) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return the mean difference of P pairs of grids, and the largest in one cell, both of 255.

    Grids are `[P, 768]`. The difference of a cell is the mean of its three colors.
    """
    shape = (len(one_PTC), GRID * GRID, 3)
    apart = np.abs(one_PTC.reshape(shape).astype(np.int16) - other_PTC.reshape(shape).astype(np.int16))
    cells = apart.mean(axis=2, dtype=np.float32)
    return cells.mean(axis=1, dtype=np.float32), cells.max(axis=1)
