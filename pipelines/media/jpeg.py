"""JPEG files that are sure to decode if their first block does.

Decoding a JPEG fails for two reasons: its headers are wrong, or its data end too soon. Wrong data in between only give
wrong pixels. So a file with one scan, whose data reach the end marker, needs its first block decoded, and not the rest.
"""

from __future__ import annotations

import re

from pipelines.config import MediaConfig
from pipelines.errors import BadMedia
from pipelines.media.images import check_size

_START, _END = b"\xff\xd8", b"\xff\xd9"
_FRAME, _SCAN, _RESTART_INTERVAL = 0xC0, 0xDA, 0xDD
_VERBATIM = {0xC4, 0xDB, 0xFE, *range(0xE0, 0xF0)}  # tables, comments, data of applications
_SEVERAL_PICTURES = b"MPF\0"  # begins the segment by which PIL reads a file as more than one picture
_MARKER = re.compile(rb"\xff[^\x00]")
_MARKER_BUT_RESTART = re.compile(rb"\xff[^\x00\xd0-\xd7]")
_BLOCK_PX = 8
_FIRST_BYTES = 1024  # of the data: more than a block takes
_LARGEST_PX = 16_384  # far below libjpeg's own limit
_PIXELS_PER_CPU_S = 1_000_000  # libjpeg takes less than a tenth of the time
_BYTES_PER_PIXEL = 32  # in memory while a picture is decoded, and as much again


def first_block(data: bytes, config: MediaConfig) -> bytes | None:
    """Return a JPEG of the first block of `data`. If it decodes, so does `data`, within the limits of `config`.

    None where this is unknown: another format, several scans, unusual sampling, too many pixels, data without an end.
    Such a file has to be decoded as a whole. `tests/faults/test_jpeg.py` compares both.
    """
    if not data.startswith(_START):
        return None
    place, frame, restarts = 2, None, False
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        length = int.from_bytes(data[place + 2 : place + 4])
        following = place + 2 + length
        segment = data[place + 4 : following]
        if following > len(data) or length < 2:
            return None
        if marker == _SCAN:
            return _shortened(data, frame, segment, following, restarts) if frame else None
        if marker == _FRAME and frame is None:
            frame = _Frame.read(segment, place + 5, config)
            if frame is None:
                return None
        elif marker == _RESTART_INTERVAL:
            restarts = segment != b"\0\0"
        elif marker not in _VERBATIM or segment.startswith(_SEVERAL_PICTURES):
            return None
        place = following
    return None


class _Frame:
    """Components of a picture, and where its height and width are in the file."""

    def __init__(self, components: bytes, place: int, size: bytes) -> None:
        self.components, self.place, self.size = components, place, size

    @classmethod
    def read(cls, segment: bytes, place: int, config: MediaConfig) -> _Frame | None:
        """Return the frame of 8-bit grey or color, sampled fully or half, within limits. None for any other."""
        if len(segment) not in (9, 15) or segment[0] != 8 or len(segment) != 6 + 3 * segment[5]:
            return None
        height, width = int.from_bytes(segment[1:3]), int.from_bytes(segment[3:5])
        ids, sampling = segment[6::3], segment[7::3]
        if not 0 < height <= _LARGEST_PX or not 0 < width <= _LARGEST_PX or len(set(ids)) < len(ids):
            return None
        try:
            check_size(width, height, config)
        except BadMedia:
            return None
        pixels = height * width
        if pixels > _PIXELS_PER_CPU_S * config.max_cpu_s or 2 * _BYTES_PER_PIXEL * pixels > config.max_memory_bytes:
            return None
        across, down = sampling[0] >> 4, sampling[0] & 15
        if across not in (1, 2) or down not in (1, 2) or any(other != 0x11 for other in sampling[1:]):
            return None
        block = [min(pixels, _BLOCK_PX * factor) for pixels, factor in ((height, down), (width, across))]
        return cls(ids, place, b"".join(edge.to_bytes(2) for edge in block))


def _shortened(data: bytes, frame: _Frame | None, scan: bytes, start: int, restarts: bool) -> bytes | None:
    """Return the file with the first of its data and the size of a block, if its one scan has all data to the end."""
    assert frame is not None
    count = len(frame.components)
    is_whole = len(scan) == 4 + 2 * count and scan[0] == count and scan[-3:] == b"\0\x3f\0"
    if not is_whole or scan[1:-3:2] != frame.components:
        return None
    found = (_MARKER_BUT_RESTART if restarts else _MARKER).search(data, start)
    if found is None or found[0] != _END:
        return None
    first = data[start : min(start + _FIRST_BYTES, found.start())].rstrip(b"\xff")
    return data[: frame.place] + frame.size + data[frame.place + 4 : start] + first + _END
