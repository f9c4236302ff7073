"""Videos that benchmarks ship as folders of pictures: which of them a model sees."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

_PICTURES = (".jpg", ".jpeg", ".png")
_NUMBER = re.compile(r"(\d+)")


def choose_frames(folder: Path, num_frames: int) -> list[Path]:
    """Return `num_frames` pictures of a folder, evenly from first to last, by the numbers in their names.

    MMEB-V2 keeps at most 64 of a video and shows 8: those at `linspace(0, num_kept - 1, num_frames)` rounded down. A
    folder with fewer shows all of them.
    """
    pictures = sorted((path for path in folder.iterdir() if path.suffix.lower() in _PICTURES), key=_numbered)
    if num_frames >= len(pictures):
        return pictures
    return [pictures[number] for number in np.linspace(0, len(pictures) - 1, num_frames, dtype=int)]


def _numbered(path: Path) -> list[tuple[int, int | str]]:
    """`frame_10` after `frame_9`: numbers by value, the rest by letters."""
    parts = _NUMBER.split(path.name)
    return [(0, int(part)) if number % 2 else (1, part.lower()) for number, part in enumerate(parts)]
